"""What may be given as an array: arrays and lists of numbers, and no dictionaries of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def one_array(what: str, name: str, value: Any, shape: str) -> np.ndarray | jax.Array:
    """Return an array as it is, and a list of numbers as an array.

    Args:
      what: what takes it, as its user writes it: "TrainingRuns".
      name: of the argument.
      value: what was given.
      shape: as the message says it: "[n, ...]".

    Raises:
      TypeError: if it is neither, or holds anything but numbers.
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
        except (ValueError, TypeError) as error:  # rows of unequal length, say
            raise _no_array(what, name, f"a {type(value).__name__}", shape) from error
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
        found = "nothing" if value is None else f"{type(value).__name__} of {array.dtype}"
        raise _no_array(what, name, found, shape)
    return array


def _no_array(what: str, name: str, found: str, shape: str) -> TypeError:
    return TypeError(
        f"`{what}` got {found} for its {name}, but {name} are an array of numbers {shape}, or a "
        "list of them. Stack examples with `np.stack(examples)`, which takes those of one shape; "
        "number classes that have names with `np.unique(labels, return_inverse=True)[1]`."
    )


def least_and_largest(*labels: Any) -> tuple[int, int] | None:
    """Return the least and the largest of all integers in some arrays, on the host.

    None where there are none: other types, or arrays that cannot be read here.
    """
    found = []
    for array in labels:
        here = isinstance(array, np.ndarray) or (
            isinstance(array, jax.Array)
            and not isinstance(array, jax.core.Tracer)
            and (array.is_fully_addressable or array.is_fully_replicated)
        )
        if here and array.size and jnp.issubdtype(array.dtype, np.integer):
            values = np.asarray(array)
            found += [int(values.min()), int(values.max())]
    return (min(found), max(found)) if found else None
