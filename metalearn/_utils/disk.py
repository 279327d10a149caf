"""Full and lost disks: detecting their errors, and writing files atomically.

A run does not depend on the files that it writes: if one cannot be written, it prints a message and
continues.
"""

from __future__ import annotations

import contextlib
import errno
import pathlib
import re
from collections.abc import Iterator

from tqdm import tqdm

from metalearn._utils.checks import first_line

# Errors of a disk: numbers of Python's OSError, and texts of tensorstore, which writes the arrays.
ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES}
TEXT = re.compile(
    r"No space left|File too large|quota exceeded|Read-only file system|Input/output error",
    re.IGNORECASE,
)


def at_fault(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, is an error of a disk."""
    if error is None:
        return False
    if isinstance(error, BaseExceptionGroup) and any(map(at_fault, error.exceptions)):
        return True
    of_disk = isinstance(error, OSError) and error.errno in ERRORS
    return of_disk or bool(TEXT.search(str(error))) or at_fault(error.__cause__)


@contextlib.contextmanager
def forgiven(what: str) -> Iterator[None]:
    """Turn an error of a disk into a message that `what` could not be written."""
    try:
        yield
    except Exception as error:
        if not at_fault(error):
            raise
        tell(f"{what} could not be written ({first_line(error)}). The run goes on without.")


def tell(text: str) -> None:
    """Print a line above a progress bar; nothing if the output is a file on a full disk."""
    try:
        tqdm.write(text)
    except OSError as error:
        if not at_fault(error):
            raise


def write(path: pathlib.Path, data: str | bytes) -> None:
    """Write a file atomically: on OSError the old content is unchanged."""
    content = data.encode() if isinstance(data, str) else data
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_bytes(content)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the path of a file to write, which takes the place of `path` once it is complete.

    On OSError the old content is unchanged, and nothing is left of the new one.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
