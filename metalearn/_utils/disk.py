"""Disks that are full, or gone: how that is told from other errors, and what it leaves whole.

A run does not depend on what it writes: it says what could not be written, and goes on.
"""

from __future__ import annotations

import contextlib
import errno
import pathlib
import re
from collections.abc import Iterator

from tqdm import tqdm

from metalearn._utils.checks import first_line

# What says that a disk is at fault: as an error of Python's, or as text from tensorstore,
# which writes the arrays.
ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES}
TEXT = re.compile(
    r"No space left|File too large|quota exceeded|Read-only file system|Input/output error",
    re.IGNORECASE,
)


def at_fault(error: BaseException | None) -> bool:
    """Say whether an error, or what it was raised from, is a disk's."""
    if error is None:
        return False
    if isinstance(error, BaseExceptionGroup) and any(map(at_fault, error.exceptions)):
        return True
    of_disk = isinstance(error, OSError) and error.errno in ERRORS
    return of_disk or bool(TEXT.search(str(error))) or at_fault(error.__cause__)


@contextlib.contextmanager
def forgiven(what: str) -> Iterator[None]:
    """Where a disk is at fault, say that `what` could not be written, and go on."""
    try:
        yield
    except Exception as error:
        if not at_fault(error):
            raise
        tell(f"{what} could not be written ({first_line(error)}). The run goes on without.")


def tell(text: str) -> None:
    """Print a line above a progress bar; or not, where that goes to a file on a full disk."""
    try:
        tqdm.write(text)
    except OSError as error:
        if not at_fault(error):
            raise


def write(path: pathlib.Path, data: str | bytes) -> None:
    """Write a file whole, or leave what was there: OSError."""
    content = data.encode() if isinstance(data, str) else data
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_bytes(content)
        return
    aside = path.with_name(f"{path.name}.part")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
