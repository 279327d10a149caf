"""Checks of arguments that are arrays: arrays and lists of numbers, but no dictionaries of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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


def least_and_largest(*labels: Any) -> tuple[int, int] | None:
    """Return the least and the largest integer in some arrays, read on the host.

    None if no array has integers, or none can be read in this process.
    """
    bounds = []
    for array in labels:
        readable = isinstance(array, np.ndarray) or (
            isinstance(array, jax.Array)
            and not isinstance(array, jax.core.Tracer)
            and (array.is_fully_addressable or array.is_fully_replicated)
        )
        if readable and array.size and jnp.issubdtype(array.dtype, np.integer):
            values = np.asarray(array)
            bounds += [int(values.min()), int(values.max())]
    return (min(bounds), max(bounds)) if bounds else None
