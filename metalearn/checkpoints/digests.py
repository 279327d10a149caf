"""Digests of the files of a checkpoint, which detect later damage.

An incomplete write is never read as a checkpoint: it has another name until it is complete. Damage
after that (by a disk, a copy or a user) is detected by digests, which are written beside the files
once they are complete. A checkpoint without digests (the run was killed in between) is read
unchecked.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib

from metalearn._utils import disk, strict_json

NAME = "digests.json"


def write(directory: pathlib.Path) -> None:
    """Write the digest of every file below a directory; nothing if the disk refuses."""
    with contextlib.suppress(OSError):
        digests = {str(path.relative_to(directory)): _digest(path) for path in _files(directory)}
        disk.write(directory / NAME, strict_json.dumps(digests, indent=1, sort_keys=True) + "\n")


def problem(directory: pathlib.Path) -> str | None:
    """Return what is wrong with the first damaged file below a directory; None: none is."""
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
