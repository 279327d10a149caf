"""The directory where prepared arrays are kept between runs.

Decoding 32,460 drawings takes seconds and reading the array they make takes
milliseconds, so the array is kept as one .npy file. It appears under its name only
when it is whole (written aside, then renamed), so processes may race for it; and its
name says all that its content depends on, so that a stale one is never read. One that
cannot be read, cut short by a full disk perhaps, is built again, with a warning. Nothing
in a file is ever executed: arrays of Python objects (pickle) are refused.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable

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


def cached(name: str, build: Callable[[], np.ndarray]) -> np.ndarray:
    """Read the array `name` from the cache; the first time, build it and keep it.

    Args:
      name: all that the content depends on, spelled as a file name.
      build: makes the array.
    """
    path = cache_dir() / f"{name}.npy"
    if path.exists():
        try:
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as error:
            damaged(path, str(error))
    array = build()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = pathlib.Path(scratch) / path.name
        np.save(whole, array, allow_pickle=False)
        whole.replace(path)
    return array


def damaged(path: pathlib.Path, why: str) -> None:
    """Warn that something in the cache cannot be read and is built again."""
    warnings.warn(f"{path} in the cache cannot be read ({why}): it is built again.", stacklevel=3)
