"""The interface of loggers, which get the metrics of a run; any number of them at once.

A logger gets `start` once (with its record in the checkpoint of an interrupted run), `log` with
plain floats, `show` with image files, and `finish` with the final table. A run is what its
checkpoint says: when it is resumed at step n, what was logged after step n is dropped where the
medium allows it.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping
from typing import Any

from metalearn._utils.intervals import Estimate

Record = dict[str, Any]


class Logger(abc.ABC):
    """Hears what a run reports. Every method but `log` may be left as it is."""

    def start(self, step: int, config: Mapping[str, Any], record: Record) -> None:  # noqa: B027
        """Begin, or go on at `step`. `record` is what `record()` returned before."""

    @abc.abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of an outer step, counted from 1."""

    def back_to(self, step: int) -> None:  # noqa: B027
        """Take back what was logged after `step`, where that can be: the run goes on from there."""

    def show(self, pictures: Mapping[str, str | os.PathLike[str]]) -> None:  # noqa: B027
        """Note image files, by name; before `finish`."""

    def record(self) -> Record:
        """Return what a resumed run must know (JSON): kept in the checkpoint."""
        return {}

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:  # noqa: B027
        """End, with the final evaluation if there was one."""

    def abandon(self) -> None:
        """End a run that failed. The same as `finish()`, if nothing else is said."""
        self.finish()
