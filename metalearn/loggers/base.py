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
INSIDE = "run/"  # begins the names of what is logged from inside an outer step of many programs


class Logger(abc.ABC):
    """Receives the metrics of a run. Only `log` must be implemented."""

    def start(self, step: int, config: Mapping[str, Any], record: Record) -> None:  # noqa: B027
        """Start, or resume after outer step `step` with the `record()` of its checkpoint."""

    @abc.abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an outer step, counted from 1."""

    def back_to(self, step: int) -> None:  # noqa: B027
        """Drop what was logged after `step`, if possible: the run resumes from there."""

    def show(self, pictures: Mapping[str, str | os.PathLike[str]]) -> None:  # noqa: B027
        """Log image files, by name; called before `finish`."""

    def record(self) -> Record:
        """Return the state of the logger (JSON), which a checkpoint saves for `start`."""
        return {}

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:  # noqa: B027
        """Close the logger, with the final evaluation if there is one."""

    def abandon(self) -> None:
        """Close the logger of a failed run; by default `finish()`."""
        self.finish()
