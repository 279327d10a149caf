"""Where states and inner gradients of an inner run in segments are kept: device, host, disk.

Kept states are a stack: the state that was kept last is read first. So the states at the bottom,
which are read last, go to disk, those above to host memory, and those on top stay on the device, as
the budgets of `Replay` say. A copy from the device to the host, and from there to the disk, is made
while the device advances the next segment.

A state that is sharded over devices keeps its sharding (`metalearn.sharding.host_copies`); on disk
each process has a folder of its own.

Inner gradients of a segment are kept in what the states leave of the device's and the host's
memory, and sharded like the states. They are never on disk, where reading them takes about as long
as computing them again: a run that is resumed does so.

A disk that refuses a state (it is full, or gone) does not end the run: that state stays in host
memory, no further ones are kept, and the schedule goes on with those there are.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax

from metalearn._utils.checks import first_line
from metalearn.checkpoints import state_files
from metalearn.checkpoints.state_files import Folder, StateFile, UnwritableFolderError
from metalearn.checkpoints.store import DiskError
from metalearn.sharding.distributed import say
from metalearn.sharding.host_copies import (
    Shards,
    begin_copies,
    copied,
    shards_of,
    to_devices,
    to_host,
)
from metalearn.training.replay import Replay, capacity


class ReleasedError(ValueError):
    """A train state inside an outer step was stepped from before."""

    def __init__(self) -> None:
        super().__init__(
            "This train state stands inside an outer step, and a step was taken from it before: "
            "its arrays were donated to that program, or the inner states that it keeps were "
            "released when they had been read. Step from the state that was returned, or begin "
            "the outer step anew, from `dataclasses.replace(state, inner=())`."
        )


@dataclasses.dataclass(eq=False)
class KeptState:
    """A state that is kept.

    Args:
      boundary: the number of segments before it.
      place: "device", "host" or "disk".
      name: of its file.
      arrays: the state on the device, or the arrays of its shards on the host; None: on disk alone.
      file: on disk; None: it is not there.
      writing: the file that is being written.
      on_host: whether `arrays` are those on the host.
    """

    boundary: int
    place: str
    name: str
    arrays: Any = None
    file: StateFile | None = None
    writing: concurrent.futures.Future[StateFile] | None = None
    on_host: bool = False


@dataclasses.dataclass(eq=False)
class KeptGradients:
    """The inner gradients of a segment that are kept.

    Args:
      segment: its number.
      place: "device" or "host".
      shards: of which they consist.
      arrays: on the device, or the arrays of their shards on the host; None: they are dropped.
      on_host: whether `arrays` are those on the host.
    """

    segment: int
    place: str
    shards: list[Shards]
    arrays: Any = None
    on_host: bool = False


class KeptStates:
    """The kept states and inner gradients of the inner runs of one trainer.

    Attributes:
      capacity: how many states are kept where.
      most: how many states can be kept at a time.
      disk_refused: whether the disk has refused a state; none is written to it any more.
    """

    def __init__(
        self,
        replay: Replay,
        shapes: Any,
        segments: int,
        run: str,
        folder: Any = None,
        gradients: Any = (),
    ):
        """Make an empty store.

        Args:
          replay: the budgets.
          shapes: of a state, with the shardings of its leaves.
          segments: of the run.
          run: a text that tells the run from others.
          folder: for the states on disk; None: that of `replay`, or a temporary one.
          gradients: like `shapes`, of the inner gradients of one segment; (): none are read.
        """
        self._shards, self._treedef = shards_of(shapes), jax.tree.structure(shapes)
        self.capacity = capacity(replay, shapes, segments, gradients)
        self.most = self.capacity.states
        self.disk_refused = False
        self._run, self._where = run, replay.folder or folder
        self._opened: Folder | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="states")
        self._copying: list[KeptState | KeptGradients] = []  # to the host
        self._writing: list[KeptState] = []  # to disk
        self._saved: deque[set[str]] = deque(maxlen=2)  # names that the last checkpoints refer to
        self._outdated: set[pathlib.Path] = set()  # not needed but by those checkpoints
        self._is_swept = False  # whether files that an earlier run has left are deleted
        if self.capacity.disk:
            self._open()  # refused before the run, not in the middle of it

    def keep(self, boundary: int, state: Any, depth: int, name: str) -> KeptState:
        """Keep a copy of a state.

        Args:
          boundary: the number of segments before it.
          state: on the device; its buffers may be donated afterwards.
          depth: how many states are kept before it.
          name: of its file.
        """
        self.limit(depth + 1)
        kept = KeptState(boundary, self.capacity.of(depth), name, copied(state))
        self._begin_copy(kept)
        return kept

    def keep_gradients(
        self, segment: int, gradients: Sequence[jax.Array], kept: Sequence[KeptGradients]
    ) -> KeptGradients:
        """Keep the inner gradients of a segment.

        Args:
          segment: its number.
          gradients: on the device; their buffers may not be donated.
          kept: those of other segments.
        """
        on_device = sum(each.place == "device" for each in kept)
        place = "device" if on_device < self.capacity.device_gradients else "host"
        new = KeptGradients(segment, place, shards_of(gradients), list(gradients))
        self._begin_copy(new)
        return new

    def read_gradients(self, kept: KeptGradients) -> tuple[jax.Array, ...]:
        """Return kept inner gradients on the device, and keep them no longer; () if none are."""
        self.settle()
        arrays, kept.arrays = kept.arrays or (), None
        return tuple(to_devices(kept.shards, arrays) if arrays and kept.on_host else arrays)

    def _begin_copy(self, kept: KeptState | KeptGradients) -> None:
        """Begin to copy arrays to the host, unless they stay on the device."""
        if kept.place != "device":
            begin_copies(kept.arrays)
            self._copying.append(kept)

    def settle(self) -> None:
        """Let the copies that were begun go on from the device to the host, and to the disk."""
        copying, self._copying = self._copying, []
        for kept in copying:
            shards = self._shards if isinstance(kept, KeptState) else kept.shards
            kept.arrays, kept.on_host = to_host(shards, kept.arrays), True
            if isinstance(kept, KeptState) and kept.place == "disk":
                self._await_files()
                path = self._folder().path / kept.name
                kept.writing = self._writer.submit(state_files.write, path, kept.arrays)
                self._writing.append(kept)
        self._await_files(most=1, wait=False)

    def _await_files(self, most: int = 0, wait: bool = True) -> None:
        """Wait until no more than `most` files are being written."""
        for kept in list(self._writing):
            assert kept.writing is not None
            if not kept.writing.done() and (not wait or len(self._writing) <= most):
                break
            self._writing.remove(kept)
            try:
                kept.file, kept.arrays = kept.writing.result(), None
            except OSError as error:
                self._refused(kept, error)
            kept.writing = None

    def _refused(self, kept: KeptState, error: OSError) -> None:
        """Go on without the disk: the state stays in host memory."""
        if jax.process_count() > 1:  # others may have no error: let this one end the run
            raise error
        kept.place = "host"
        if self.disk_refused:  # another one that was being written
            return
        self.disk_refused, self.capacity = True, dataclasses.replace(self.capacity, disk=0)
        self.most = self.capacity.states
        say(
            f"The state before segment {kept.boundary} could not be written to "
            f"{self._folder().path} ({first_line(error)}): no further states are kept there, and "
            "more segments are run again instead."
        )

    def limit(self, kept: int) -> int:
        """Return how many states may be kept, `kept` of which are."""
        self._await_files(wait=False, most=10**9)
        if self.disk_refused and kept > self.most:  # those that are kept already, and no more
            self.most = kept
            self.capacity = dataclasses.replace(self.capacity, host=kept - self.capacity.device)
        return self.most

    def read(self, kept: KeptState) -> Any:
        """Return a copy of a kept state on the device, which may be donated.

        Raises:
          DamagedStateError: if its file is missing or is not what was written.
          ReleasedError: if it is kept no longer.
        """
        self.settle()
        self._await_files()
        arrays = kept.arrays
        if arrays is not None and not kept.on_host:
            return copied(arrays)
        if arrays is None:
            if kept.file is None:
                raise ReleasedError
            arrays = state_files.read(kept.file, [s for each in self._shards for s in each.shards])
        state = jax.tree.unflatten(self._treedef, to_devices(self._shards, arrays))
        return state if kept.arrays is None else copied(state)  # what was read is no one else's

    def drop(self, kept: KeptState) -> None:
        """Keep a state no longer."""
        self._await_files()
        kept.arrays = None
        if kept in self._copying:
            self._copying.remove(kept)
        if kept.file is not None:
            self._outdated.add(kept.file.path)
            kept.file = None
        self._delete_outdated()

    def _delete_outdated(self) -> None:
        names = set().union(*self._saved)
        for path in [path for path in self._outdated if path.name not in names]:
            with contextlib.suppress(OSError):
                path.unlink()
            self._outdated.discard(path)

    def written(self, states: Sequence[KeptState]) -> list[dict[str, Any]]:
        """Write the states that are not on disk, for a checkpoint; return a record of all (JSON).

        DiskError if the disk refuses, or has lost the folder.
        """
        self.settle()
        self._await_files()
        for kept in states:
            if kept.file is None:
                if kept.arrays is None:
                    raise ReleasedError
                arrays = kept.arrays if kept.on_host else to_host(self._shards, kept.arrays)
                try:
                    kept.file = state_files.write(self._folder().path / kept.name, arrays)
                except (OSError, UnwritableFolderError) as error:
                    raise DiskError(first_line(error)) from error
        return [
            {"boundary": each.boundary, "file": each.file.path.name, "digest": each.file.digest}
            for each in states
            if each.file is not None
        ]

    def checkpointed(self, record: Sequence[dict[str, Any]]) -> None:
        """Delete the files that neither the newest checkpoint nor the one before it refers to."""
        self._saved.append({each["file"] for each in record})
        self._delete_outdated()

    def restored(self, record: Sequence[dict[str, Any]]) -> list[KeptState]:
        """Return the states of the record of a checkpoint, and delete all other files."""
        self._saved.append({each["file"] for each in record})
        if not record and self._opened is None:
            return []
        folder = self._folder()
        return [
            KeptState(
                each["boundary"],
                "disk",
                each["file"],
                file=StateFile(folder.path / each["file"], each["digest"]),
            )
            for each in record
            if (folder.path / each["file"]).is_file()
        ]

    def clear(self) -> None:
        """Delete all states on disk."""
        if self._opened is not None:
            self._await_files()
            self._opened.keep_only(set())

    def close(self) -> None:
        """Let go of the folder. States that checkpoints refer to stay in it, no others."""
        self._writer.shutdown()
        if self._opened is not None:
            if self._is_swept:  # otherwise it is not known which they are
                self._opened.keep_only(set().union(*self._saved))
            self._opened.close()

    def _folder(self) -> Folder:
        """Return the folder, in which no states are but those that checkpoints refer to."""
        folder = self._open()
        if not self._is_swept:
            folder.keep_only(set().union(*self._saved))
            self._is_swept = True
        return folder

    def _open(self) -> Folder:
        """Lock the folder, and check whose it is. Deletes nothing: `restored` may follow."""
        if self._opened is None:
            if self._where is None:
                self._where = tempfile.mkdtemp(prefix="metalearn-states-")
                weakref.finalize(self, shutil.rmtree, self._where, ignore_errors=True)
            path = pathlib.Path(self._where).absolute()
            if jax.process_count() > 1:
                path = path / str(jax.process_index())
            self._opened = Folder(path, self._run)
        return self._opened
