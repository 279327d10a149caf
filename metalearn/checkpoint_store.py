"""Where checkpoints are: Orbax, and what it needs around it for disks that fail.

A save begins now and ends beside the training. When its files are whole, their digests are
written (`metalearn.digests`). A step whose files are not what was written counts as damaged:
it is not offered any more, and moved out of the way when a new save may need its place.
"""

from __future__ import annotations

import contextlib
import errno
import math
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from metalearn import digests
from metalearn.messages import first_line

# What says that a disk is at fault: as an error of Python's, or as text from tensorstore,
# which writes the arrays.
DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES}
DISK_TEXT = re.compile(
    r"No space left|File too large|quota exceeded|Read-only file system|Input/output error",
    re.IGNORECASE,
)


class DiskError(OSError):
    """A checkpoint could not be written: the disk is full, or gone."""


class UnreadableError(ValueError):
    """A checkpoint is there and cannot be read."""


class Store:
    """The checkpoints in one directory, by outer step."""

    def __init__(self, directory: pathlib.Path, keep: int, best: tuple[str, str] | None):
        """Open or make a directory; `best`: ("max" or "min", the metric's name)."""
        self.directory = directory
        self.damaged: dict[int, str] = {}  # step -> what is wrong
        self._best = best
        self._options = _options(keep, best)
        self._manager = self._open()
        self._whole: set[int] = set()  # steps that were looked at
        self._writing: threading.Thread | None = None
        self._failed = False  # a save of ours

    def _open(self) -> ocp.CheckpointManager:
        names = ("state", "record")
        return ocp.CheckpointManager(self.directory, options=self._options, item_names=names)

    def newest(self) -> int | None:
        """Return the newest step whose files are whole; None where there is none."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        return next((step for step in steps if self._is_whole(step)), None)

    def last(self) -> int | None:
        """Return the newest step, whole or not; None where there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Return the step with the best metric; None where none has one."""
        step = self._manager.best_step()
        return step if step is not None and self._is_whole(step) else None

    def save(self, step: int, state: Any, record: Any, metrics: Mapping[str, float]) -> None:
        """Begin to save, once the save before has ended (`wait`). DiskError: the disk refused."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        self._set_damaged_aside()
        self._sweep()
        with _Disk(self):
            begun = self._manager.save(step, args=items, metrics=self._judged(metrics))
        if not begun:
            raise ValueError(
                f"A checkpoint of outer step {step} cannot be written to {self.directory}, which "
                f"has one of step {self._manager.latest_step()}: another run's, by the number."
            )
        self._whole.add(step)
        if jax.process_index() == 0:
            self._writing = threading.Thread(target=self._write_digests, args=(step,), daemon=True)
            self._writing.start()

    def _judged(self, metrics: Mapping[str, float]) -> dict[str, float] | None:
        """Return what a step is judged by; None where it was not evaluated, or is not finite."""
        name = self._best[1] if self._best else ""
        return {name: metrics[name]} if math.isfinite(metrics.get(name, math.nan)) else None

    def read_record(self, step: int) -> Any:
        """Return the JSON record of a step."""
        items = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._read(step, items).record

    def read_state(self, step: int, shapes: Any) -> Any:
        """Return the arrays of a step, as a tree like `shapes`."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        return self._read(step, items).state

    def _read(self, step: int, items: Any) -> Any:
        try:
            return self._manager.restore(step, args=items)
        except MemoryError:
            raise
        except Exception as error:  # whatever Orbax and tensorstore make of damaged files
            raise UnreadableError(first_line(error)) from error

    def clear(self) -> None:
        """Delete every checkpoint."""
        for step in self._manager.all_steps():
            self._manager.delete(step)
        self._whole.clear()

    def wait(self) -> None:
        """Wait for the last save to be whole; DiskError where the disk refused it."""
        with _Disk(self):
            self._finish()

    def close(self) -> None:
        """Close, whatever became of the last save."""
        self._manager.close()
        self._sweep()

    def reopen(self) -> None:
        """Begin anew after a save that failed."""
        with contextlib.suppress(Exception):  # it failed, and closing it may say so again
            self._manager.close()
        self._manager = self._open()
        self._failed = True

    def _sweep(self) -> None:
        """Remove what a failed save of ours has left: nobody else is saving here."""
        if self._failed and jax.process_index() == 0:
            for left in self.directory.glob("*orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)

    def _finish(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _write_digests(self, step: int) -> None:
        """Wait until a step's files are whole, and note their digests; none where it failed."""
        while self._manager.is_saving_in_progress():
            time.sleep(0.02)
        if (self.directory / str(step)).is_dir():
            digests.write(self.directory / str(step))

    def _is_whole(self, step: int) -> bool:
        if step in self.damaged:
            return False
        if step not in self._whole:
            wrong = digests.trouble(self.directory / str(step))
            if wrong is not None:
                self.damaged[step] = wrong
                return False
            self._whole.add(step)
        return True

    def _set_damaged_aside(self) -> None:
        """Move damaged checkpoints where no save will meet them."""
        if not self.damaged:
            return
        for step in self.damaged:
            place = self.directory / str(step)
            if jax.process_index() == 0 and place.exists():
                place.rename(self.directory / f"damaged-{step}-{time.time_ns()}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()
        self.damaged.clear()


class _Disk:
    """Makes a DiskError of what a failing disk raises, and has the store begin anew."""

    def __init__(self, store: Store):
        self.store = store

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if jax.process_count() > 1:  # the others may have seen nothing: let it end the run
            return
        of_disk = isinstance(error, OSError) and error.errno in DISK
        if error is not None and (of_disk or DISK_TEXT.search(str(error))):
            self.store.reopen()
            raise DiskError(first_line(error)) from error


def _options(keep: int, best: tuple[str, str] | None) -> ocp.CheckpointManagerOptions:
    latest = policies.LatestN(keep)
    if best is None:
        return ocp.CheckpointManagerOptions(preservation_policy=latest)
    mode, name = best

    def metric(metrics: Any) -> float:
        return metrics.get(name, math.inf if mode == "min" else -math.inf)  # of another config

    kept = policies.BestN(
        get_metric_fn=metric, reverse=mode == "min", n=1, keep_checkpoints_without_metrics=False
    )
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([latest, kept]),
        best_fn=metric,
        best_mode=mode,
    )
