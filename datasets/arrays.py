"""Checks of arguments that are arrays: one array or list of numbers, or several in a structure.

The inputs of an example may be one array or several: a dictionary, a tuple or any other pytree of
arrays with a common first axis. A list is data, and becomes one array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.unroll import Masked


def one_array(what: str, name: str, value: Any, shape: str) -> np.ndarray | jax.Array:
    """Return an array unchanged, and a list of numbers as an array.

    Args:
      what: the class or function, as the user writes it: "TrainingRuns".
      name: of the argument.
      value: of the argument.
      shape: for the message: "[n, ...]".

    Raises:
      TypeError: if the value is neither, or holds anything but numbers.
    """
    if isinstance(value, Mapping):
        keys = ", ".join(repr(key) for key in value)
        raise TypeError(
            f"`{what}` got {name} that are a {type(value).__name__} with the keys {keys}, but "
            f"{name} are one array {shape}, a row for each example. Pass one of them, or join them "
            "along their last axis. Examples of several arrays: a class of your own "
            "(`metalearn.Tasks`), whose episodes may be any pytree."
        )
    array = value
    if not isinstance(value, np.ndarray | jax.Array):
        try:
            array = np.asarray(value)
        except (ValueError, TypeError) as error:  # for instance rows of unequal length
            raise _no_array(what, name, f"a {type(value).__name__}", shape) from error
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
        kind = "nothing" if value is None else f"{type(value).__name__} of {array.dtype}"
        raise _no_array(what, name, kind, shape)
    return array


def _no_array(what: str, name: str, kind: str, shape: str) -> TypeError:
    return TypeError(
        f"`{what}` got {kind} for its {name}, but {name} are an array of numbers {shape}, or a "
        "list of them. Stack examples with `np.stack(examples)`, which takes those of one shape; "
        "number classes that have names with `np.unique(labels, return_inverse=True)[1]`."
    )


def arrays(what: str, name: str, value: Any, shape: str) -> Any:
    """Return a pytree of arrays; lists in it become arrays, arrays are unchanged.

    Args:
      what: the class or function, as the user writes it.
      name: of the argument.
      value: of the argument: an array, a list, or a dictionary, tuple or other pytree of them.
      shape: for the message: "[n, ...]".

    Raises:
      TypeError: if there is no array in it, or a leaf holds anything but numbers.
    """
    leaves, treedef = jax.tree.flatten(value, is_leaf=_is_data)
    if not leaves:
        raise _no_array(what, name, f"an empty {type(value).__name__}", shape)
    return jax.tree.unflatten(treedef, [one_array(what, name, leaf, shape) for leaf in leaves])


def _is_data(value: Any) -> bool:
    return value is None or isinstance(value, list)


def rows_of(what: str, name: str, tree: Any) -> int:
    """Return the length of the first axis that all arrays of a pytree share.

    Raises:
      ValueError: if an array has no axis, or the lengths differ.
    """
    counts = {
        jax.tree_util.keystr(path) or name: jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{key}: {count}" for key, count in counts.items())
        raise ValueError(
            f"`{what}` got {name} of unequal length ({listed}), but row i of each array belongs to "
            "example i. Pass arrays with one row for each example."
        )
    return next(iter(counts.values()))


def map_arrays(function: Callable[[np.ndarray], np.ndarray], tree: Any) -> Any:
    """Apply a function to each array of a pytree, as arrays of NumPy."""
    return jax.tree.map(lambda leaf: function(np.asarray(leaf)), tree, is_leaf=_is_data)


def least_and_largest(*labels: Any) -> tuple[int, int] | None:
    """Return the least and the largest integer in some arrays, read on the host.

    None if no array has integers, or none can be read in this process. Of `Masked` ones the padding
    is left out.
    """
    bounds = []
    for array in labels:
        mask = array.mask if isinstance(array, Masked) else None
        array = array if mask is None else array.values
        readable = isinstance(array, np.ndarray) or (
            isinstance(array, jax.Array)
            and not isinstance(array, jax.core.Tracer)
            and (array.is_fully_addressable or array.is_fully_replicated)
        )
        if not readable or not jnp.issubdtype(array.dtype, np.integer):
            continue
        values = np.asarray(array) if mask is None else np.asarray(array)[np.asarray(mask, bool)]
        if values.size:
            bounds += [int(values.min()), int(values.max())]
    return (min(bounds), max(bounds)) if bounds else None
