"""Digests of the files of a checkpoint, so that damage is noticed and not trained on.

A write that was cut short is never taken for a checkpoint: it has another name until it is
whole. What a disk, a copy or a hand does to it afterwards shows in the digests, which are
written beside the files once these are whole. A checkpoint without them (the run was killed
in between) is taken as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib

from metalearn._utils import disk, strict_json

NAME = "digests.json"


def write(directory: pathlib.Path) -> None:
    """Write down the digest of every file below a directory, where the disk lets it.

    Without them a checkpoint is as good.
    """
    with contextlib.suppress(OSError):
        found = {str(path.relative_to(directory)): _digest(path) for path in _files(directory)}
        disk.write(directory / NAME, strict_json.dumps(found, indent=1, sort_keys=True) + "\n")


def trouble(directory: pathlib.Path) -> str | None:
    """Return what is wrong with the files below a directory: the first that is not as it was."""
    listed = directory / NAME
    if not listed.exists():
        return None
    try:
        expected = strict_json.loads(listed.read_bytes())
        for name, digest in expected.items():
            if not (directory / name).is_file():
                return f"{name} is missing"
            if _digest(directory / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"its digests cannot be read: {error}"
    return None


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and not p.name.startswith(NAME))


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
