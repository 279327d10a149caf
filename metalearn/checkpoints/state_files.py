"""States in files: raw bytes, written under another name until complete, with a digest.

An inner state that is kept on disk is read back by the run that wrote it, which knows the shapes of
its arrays. So a file holds their bytes alone, one after the other, and its digest is remembered by
the run (and by its checkpoints): a file that is not what was written is never read as a state.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from metalearn._utils import disk

ENDING = ".state"


class DamagedStateError(ValueError):
    """A file of a state is missing, or is not what was written."""


class UnwritableFolderError(ValueError):
    """A folder for states cannot be made, or not be written to."""


class StateFile(NamedTuple):
    """A state on disk."""

    path: pathlib.Path
    digest: str  # of its bytes


def write(path: pathlib.Path, arrays: Sequence[np.ndarray]) -> StateFile:
    """Write arrays to a file. OSError if the disk refuses: nothing is left of it then."""
    digest = hashlib.blake2b()
    with disk.replacing(path) as temporary, temporary.open("wb") as file:
        for array in arrays:
            data = _bytes(array)
            digest.update(data)
            file.write(data)
    return StateFile(path, digest.hexdigest())


def read(file: StateFile, shapes: Sequence[Any]) -> list[np.ndarray]:
    """Return the arrays of a file.

    Args:
      file: the path and the digest.
      shapes: of the arrays, each with `shape` and `dtype`.

    Raises:
      DamagedStateError: if the file is missing or is not what was written.
    """
    arrays, digest = [np.empty(each.shape, each.dtype) for each in shapes], hashlib.blake2b()
    try:
        with file.path.open("rb") as opened:
            for array in arrays:
                data = _bytes(array)
                if opened.readinto(data) != len(data):
                    raise DamagedStateError(f"{file.path.name} is too short")
                digest.update(data)
    except OSError as error:
        raise DamagedStateError(f"{file.path.name} cannot be read ({error})") from error
    if digest.hexdigest() != file.digest:
        raise DamagedStateError(f"{file.path.name} is not what was written")
    return arrays


def _bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of an array; of any type, as those of bfloat16 are no buffer of Python's."""
    numbers: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(numbers)


class Folder:
    """A folder with the states of one run, held by the process that runs it.

    Args:
      path: it is made if it does not exist.
      run: a text that tells the run from others.

    Raises:
      UnwritableFolderError: if the folder cannot be written to.
      ValueError: if it holds other files, or is another run's.
    """

    def __init__(self, path: pathlib.Path, run: str):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UnwritableFolderError(
                f"The states of an inner run are to be kept in {path}, which cannot be written to "
                f"({error.strerror}). Name another folder: `Replay(folder=...)`."
            ) from error
        self.close = weakref.finalize(self, os.close, self._lock)  # its files stay
        self._hold()
        others = [each.name for each in path.iterdir() if not _ours(each)]
        if others:
            raise ValueError(
                f"The states of an inner run are to be kept in {path}, which holds other files "
                f"({', '.join(sorted(others)[:3])}). Name an empty folder: `Replay(folder=...)`."
            )
        self._check_run(run)

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another process keeps the states of its inner run in {self.path}. Wait until it "
                "has ended, or name another folder: `Replay(folder=...)`."
            ) from error
        except OSError:  # a file system without locks
            pass

    def _check_run(self, run: str) -> None:
        before = os.pread(self._lock, 4096, 0).decode(errors="replace")
        if before and before != run and any(self.path.glob(f"*{ENDING}")):
            raise ValueError(
                f"{self.path} holds the states of another run. Delete them if that run is not to "
                "go on, or name another folder: `Replay(folder=...)`."
            )
        with contextlib.suppress(OSError):  # a full disk: states will be refused, with a message
            os.truncate(self._lock, 0)
            os.pwrite(self._lock, run.encode(), 0)

    def keep_only(self, names: set[str]) -> None:
        """Delete all states but those of these names, and what was not written to its end."""
        with contextlib.suppress(OSError):  # the folder may be gone
            for path in list(self.path.iterdir()):
                if path.name != "lock" and path.name not in names:
                    with contextlib.suppress(OSError):
                        path.unlink()


def _ours(path: pathlib.Path) -> bool:
    return path.name == "lock" or path.name.endswith((ENDING, f"{ENDING}.part"))
