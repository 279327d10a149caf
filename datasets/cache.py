"""The directory where prepared arrays are kept between runs.

Decoding 32,460 drawings takes seconds and reading the array they make takes
milliseconds, so the array is kept as one .npy file. It appears under its name only
when it is whole (written aside, then renamed), so processes may race for it; and its
name says all that its content depends on, so that a stale one is never read. One that
cannot be read, cut short by a full disk perhaps, is built again, with a warning, and so is
one that is an array of another type or shape than was asked for. Nothing in a file is ever
executed: arrays of Python objects (pickle) are refused.
"""

from __future__ import annotations

import math
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np


def cache_dir() -> pathlib.Path:
    """The cache directory, made if missing: $METALEARN_CACHE, or ~/.cache/metalearn.

    Raises:
      OSError: if it can be neither found nor made.
    """
    path = pathlib.Path(os.environ.get("METALEARN_CACHE") or "~/.cache/metalearn").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The cache directory {path} cannot be made ({error}), but prepared datasets are kept "
            f"there. Set the environment variable METALEARN_CACHE to a directory you may write to."
        ) from error
    return path


def cached(
    name: str,
    build: Callable[[], np.ndarray],
    dtype: Any = None,
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Read the array `name` from the cache; the first time, build it and keep it.

    Args:
      name: all that the content depends on, spelled as a file name.
      build: makes the array.
      dtype: of the array, byte order included; a file of another is built again. None: any.
      shape: of the array; a file of another is built again. None: any.

    Raises:
      ValueError: if what `build` makes is of another dtype or shape than asked for.
    """
    path = cache_dir() / f"{name}.npy"
    if path.exists():
        try:
            return _read(path, dtype, shape)
        except (ValueError, EOFError, OSError, MemoryError, OverflowError, RecursionError) as error:
            damaged(path, str(error))
    array = np.asarray(build(), order="C")
    if wrong := _unlike(array.dtype, array.shape, dtype, shape):
        raise ValueError(f"What was built for {path} is {wrong}.")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = pathlib.Path(scratch) / path.name
        np.save(whole, array, allow_pickle=False)
        whole.replace(path)
    return array


def _read(path: pathlib.Path, dtype: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return the array of a file that is just as `cached` writes it; ValueError if it is not."""
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in headers:
            raise ValueError(f"it is of version {version} of the format, of which none is written")
        found, fortran, kind = headers[version](file)
        if wrong := _unlike(kind, found, dtype, shape):
            raise ValueError(f"it is {wrong}")
        if fortran:
            raise ValueError("it is in Fortran order, in which none is written")
        size = file.tell() + kind.itemsize * math.prod(found)
        if not kind.hasobject and path.stat().st_size != size:
            raise ValueError(f"it has {path.stat().st_size} bytes, and such an array {size}")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def _unlike(
    dtype: np.dtype, shape: tuple[int, ...], expected: Any, other: tuple[int, ...] | None
) -> str:
    """Say what an array is, and what was asked for, where these differ; "" where they do not."""
    same = expected is None or dtype == np.dtype(expected)
    if same and other in (None, shape):
        return ""
    asked = "any type" if expected is None else str(np.dtype(expected))
    return f"{dtype}{list(shape)}, not {asked}{'' if other is None else list(other)}"


def damaged(path: pathlib.Path, why: str) -> None:
    """Warn that something in the cache cannot be read and is built again."""
    warnings.warn(f"{path} in the cache cannot be read ({why}): it is built again.", stacklevel=3)
