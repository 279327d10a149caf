"""Metrics in a file, one JSON object a line: `JsonlLogger` writes it, `read_lines` reads it."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from metalearn._utils import disk, strict_json
from metalearn._utils.checks import first_line
from metalearn._utils.intervals import Estimate
from metalearn.loggers.base import INSIDE, Logger, Record


class Line(NamedTuple):
    """A line of `metrics.jsonl`.

    Args:
      number: from 1.
      text: with its newline, if there is one.
      row: {"step": 10, "loss": 1.5}, NaN and infinities as floats; None: unreadable.
      wrong: why it is unreadable.
    """

    number: int
    text: bytes
    row: Record | None
    wrong: str = ""


def read_lines(path: str | os.PathLike[str]) -> list[Line]:
    """Return the lines of a file of `JsonlLogger`, readable or not; [] if there is no file."""
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [_read_line(number, text) for number, text in enumerate(file, 1)]


def _read_line(number: int, text: bytes) -> Line:
    try:
        row = strict_json.loads(text)
    except ValueError as error:
        return Line(number, text, None, first_line(error))
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return Line(number, text, None, "it is no object with an integer for its step")
    return Line(number, text, row)


def unreadable(path: str | os.PathLike[str], lines: Sequence[Line]) -> str:
    """Return a message: which lines of a file cannot be read, and why the first cannot."""
    numbers = [str(line.number) for line in lines]
    shown = ", ".join(numbers[:5]) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    more = "lines" if len(numbers) > 1 else "line"
    return f"{path}: {more} {shown} cannot be read ({lines[0].wrong})"


class JsonlLogger(Logger):
    """Appends one JSON object per line: {"step": 10, "loss": 1.5, ...}.

    The JSON is strict: NaN and infinities are "NaN", "Infinity" and "-Infinity". While the disk is
    full, lines wait in memory. Lines that cannot be read when a run is resumed are moved to
    `metrics.jsonl.bad`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._waiting: list[str] = []
        self._told = False

    def start(self, step: int, config: Mapping[str, Any], record: Record) -> None:
        """Resume after `step`: later lines are dropped, and will be logged again.

        Those from inside the next outer step stay, as far as it was saved.
        """
        del config
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = record.get("size", 0)
        self._take_back(step, size if type(size) is int else 0)
        waiting = record.get("waiting", [])
        texts = filter(lambda x: isinstance(x, str), waiting if isinstance(waiting, list) else ())
        lines = [_read_line(0, text.encode()) for text in texts]
        self._waiting = [_strict(line).decode() for line in lines if line.row]
        self._write()

    def record(self) -> Record:
        """Return the bytes of the file, and the lines that wait for a full disk."""
        self._write()
        size = {"size": self.path.stat().st_size} if self.path.is_file() else {}
        return {**size, "waiting": self._waiting} if self._waiting else size

    def back_to(self, step: int) -> None:
        """Drop the lines after `step`."""
        self._waiting = [text for text in self._waiting if strict_json.loads(text)["step"] <= step]
        self._take_back(step)

    def _take_back(self, step: int, size: int = 0) -> None:
        """Drop the lines after `step` and incomplete ones; report and move unreadable ones.

        Lines from inside the next outer step stay that end within the first `size` bytes.
        """
        if self.path.exists() and not self.path.is_file():  # such as a pipe
            return
        lines = read_lines(self.path)
        whole = [line for line in lines if line.text.endswith(b"\n")]
        bad = [line for line in whole if line.row is None]
        if bad:
            self._move_bad_lines(bad)
        ends = itertools.accumulate(len(line.text) for line in whole)
        kept = b"".join(
            _strict(line)
            for line, end in zip(whole, ends, strict=True)
            if line.row
            and (line.row["step"] <= step or (end <= size and _is_inside(line.row, step + 1)))
        )
        before = b"".join(line.text for line in lines)
        try:
            if not self.path.exists() or not before.startswith(kept):
                disk.write(self.path, kept)
            elif kept != before:  # needs no disk space
                os.truncate(self.path, len(kept))
        except OSError as error:
            disk.tell(f"{self.path} cannot be written ({error}): lines after {step} stay in it.")

    def _move_bad_lines(self, bad: Sequence[Line]) -> None:
        """Move unreadable lines to another file, and report them."""
        aside = self.path.with_name(f"{self.path.name}.bad")
        try:
            with aside.open("ab") as file:
                file.write(b"".join(line.text for line in bad))
            where = f"moved to {aside.name}"
        except OSError as error:
            where = f"dropped, for {aside.name} cannot be written ({error})"
        disk.tell(f"{unreadable(self.path, bad)}: {where}. The run goes on.")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._waiting.append(strict_json.dumps({"step": step, **metrics}) + "\n")
        self._write()

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:
        del table
        self._write()
        if self._waiting:
            disk.tell(f"{self.path} lacks its last {len(self._waiting)} lines: the disk is full.")

    def _write(self) -> None:
        """Append the waiting lines, all or none."""
        if not self._waiting:
            return
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(self._waiting))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, whole)
            if not self._told:  # once, not at every line
                disk.tell(f"{self.path} cannot be written ({error}): its lines wait in memory.")
            self._told = True
            return
        self._waiting.clear()
        self._told = False


def _is_inside(row: Record, step: int) -> bool:
    """Return whether a row is from inside an outer step, not of its end."""
    return row["step"] == step and all(name.startswith(INSIDE) for name in row if name != "step")


def _strict(line: Line) -> bytes:
    """Return the text of a line, with bare NaN and infinities replaced by text."""
    if b"NaN" not in line.text and b"Infinity" not in line.text:
        return line.text
    return (strict_json.dumps(line.row) + "\n").encode()
