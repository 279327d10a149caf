"""Where states and inner gradients of an inner run in segments are kept: device, host, disk.

Kept states are a stack: the state that was kept last is read first. So the states at the bottom,
which are read last, go to disk, those above to host memory, and those on top stay on the device, as
the budgets of `Replay` say. A copy from the device to the host, and from there to the disk, is made
while the device advances the next segment.

A state that is sharded over devices keeps its sharding. Each process copies the shards of its own
devices, one of those that are copies of each other, and puts them back on the same devices; on disk
each process has a folder of its own. No process has the whole of a state that is sharded over
several.

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
import math
import os
import pathlib
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import Count, first_line
from metalearn._utils.device_memory import host_memory, parse_bytes, show_bytes
from metalearn._utils.fields import check_fields
from metalearn.checkpoints import state_files
from metalearn.checkpoints.state_files import Folder, StateFile, UnwritableFolderError
from metalearn.checkpoints.store import DiskError
from metalearn.sharding.distributed import say

Amount = int | str
AMOUNTS = "device", "host", "disk", "gradients"  # fields of `Replay`


class ReleasedError(ValueError):
    """A train state inside an outer step was stepped from before."""

    def __init__(self) -> None:
        super().__init__(
            "This train state stands inside an outer step, and a step was taken from it before: "
            "its arrays were donated to that program, or the inner states that it keeps were "
            "released when they had been read. Step from the state that was returned, or begin "
            "the outer step anew, from `dataclasses.replace(state, inner=())`."
        )


@dataclasses.dataclass(frozen=True)
class Replay:
    """Where the states between segments are kept, of `Trainer(segment=)` with a backward pass.

    The backward pass reads the inner state before every segment. States that are not kept are
    computed again ("replayed"), and the fewest segments there can be are run for it
    (`metalearn.training.replay_schedule`). Amounts are bytes, or texts such as "4GiB", for the
    states of all tasks of an outer step in a process. Device memory is filled first, then host
    memory, then the disk.

    `MixedFlow` also reads the inner gradients of a segment, K of them. Those that are not kept are
    computed again, which takes one plain training in all, and K of them take more memory than a
    state: so by default none is kept.

    Args:
      states: keep at most so many states at a time; None: as many as the memory holds.
      device: device memory for kept states.
      host: host memory for kept states; None: a quarter of the machine's.
      disk: disk space for kept states, 0 by default.
      gradients: keep at most so many bytes of inner gradients, in what states leave of `device`
        and `host`.
      folder: for the states on disk; None: the folder of the run's checkpoints, or a temporary one.
    """

    states: Count | None = None
    device: Amount = 0
    host: Amount | None = None
    disk: Amount = 0
    gradients: Amount = 0
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self, *AMOUNTS, "folder")
        if not isinstance(self.folder, str | os.PathLike | None):
            raise TypeError(
                f"`Replay(folder={self.folder!r})`: it is the path of a folder, or None."
            )
        for name in AMOUNTS:
            self._bytes(name)

    @property
    def keeps_gradients(self) -> bool:
        """Whether inner gradients may be kept."""
        return self._bytes("gradients") > 0

    def _bytes(self, name: str) -> int:
        amount = getattr(self, name)
        if amount is None and name == "host":
            return host_memory() // 4
        if isinstance(amount, str):
            try:
                return parse_bytes(amount)
            except ValueError as error:
                raise ValueError(f"`Replay({name}={amount!r})`: {error}") from None
        if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
            raise ValueError(
                f'`Replay({name}={amount!r})`: it is an amount of memory, such as "4GiB", or a '
                "number of bytes, 0 or more."
            )
        return amount

    def places(
        self,
        state_bytes: int,
        segments: int,
        gradient_bytes: int = 0,
        on_devices: tuple[int, int] | None = None,
    ) -> Places:
        """Return how many states, and inner gradients of how many segments, are kept where.

        Args:
          state_bytes: of one state, of all tasks.
          segments: of the run. The backward pass reads again the states before all but two of them:
            theta_0 is computed, and the state before the last one is at hand.
          gradient_bytes: of the inner gradients of one segment, of all tasks; 0: none are read.
          on_devices: bytes of (a state, the inner gradients of a segment) on all devices, where
            shards have copies; None: as in host memory.

        Raises:
          ValueError: if not one state can be kept.
        """
        state_on_device, gradients_on_device = on_devices or (state_bytes, gradient_bytes)
        boundaries = max(segments - 2, 0)
        sizes = state_on_device, state_bytes, state_bytes
        budgets = [self._bytes(name) for name in ("device", "host", "disk")]
        room = [budget // max(size, 1) for budget, size in zip(budgets, sizes, strict=True)]
        if boundaries and not sum(room):
            allowed = {name: show_bytes(self._bytes(name)) for name in ("device", "host", "disk")}
            listed = ", ".join(f"{name}={amount}" for name, amount in allowed.items())
            raise ValueError(
                f"`Replay` keeps no state: one takes {show_bytes(state_bytes)}, and the budget is "
                f"{listed}. Raise one of them to that at least."
            )
        states = _filled(room, boundaries if self.states is None else min(boundaries, self.states))
        most = min(self._bytes("gradients") // max(gradient_bytes, 1), max(segments - 1, 0))
        left = [budgets[i] - states[i] * sizes[i] for i in range(2)]
        of_gradients = gradients_on_device, gradient_bytes
        room = [each // max(size, 1) for each, size in zip(left, of_gradients, strict=True)]
        return Places(*states, *_filled(room, most if gradient_bytes else 0))


def _filled(room: Sequence[int], count: int) -> list[int]:
    """Return how many of `count` items go to each place, the first ones filled first."""
    counts: list[int] = []
    for most in room:
        counts.append(min(most, count - sum(counts)))
    return counts


@dataclasses.dataclass(frozen=True)
class Places:
    """How many states are kept on the device, in host memory and on disk.

    `device_gradients` and `host_gradients`: of how many segments inner gradients are kept there.
    """

    device: int
    host: int
    disk: int
    device_gradients: int = 0
    host_gradients: int = 0

    @property
    def all(self) -> int:
        """Return the number of all states."""
        return self.device + self.host + self.disk

    @property
    def gradients(self) -> int:
        """Return of how many segments inner gradients are kept."""
        return self.device_gradients + self.host_gradients

    def of(self, depth: int) -> str:
        """Return where the state is kept that `depth` others are kept before."""
        if depth < self.disk:
            return "disk"
        return "host" if depth < self.disk + self.host else "device"


def state_bytes(shapes: Any) -> int:
    """Return the bytes that a state takes in this process, copies of shards not counted.

    `shapes`: of its leaves, with their shardings.
    """
    return sum(_Leaf.of(leaf).nbytes for leaf in jax.tree.leaves(shapes))


def device_bytes(shapes: Any) -> int:
    """Return the bytes that a state takes on each device."""
    leaves = map(_Leaf.of, jax.tree.leaves(shapes))
    return sum(leaf.shard_bytes for leaf in leaves)


def bytes_on_devices(shapes: Any) -> int:
    """Return the bytes that a state takes on all devices of this process, with all copies."""
    leaves = map(_Leaf.of, jax.tree.leaves(shapes))
    return sum(leaf.shard_bytes * sum(map(len, leaf.devices)) for leaf in leaves)


def places(replay: Replay, shapes: Any, segments: int, gradients: Any = ()) -> Places:
    """Return what is kept where, of states and inner gradients of these shapes.

    See `Replay.places`; `shapes` have the shardings of their leaves.
    """
    sizes = state_bytes(shapes), segments, state_bytes(gradients)
    return replay.places(*sizes, (bytes_on_devices(shapes), bytes_on_devices(gradients)))


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
      leaves: what they consist of.
      arrays: on the device, or the arrays of their shards on the host; None: they are dropped.
      on_host: whether `arrays` are those on the host.
    """

    segment: int
    place: str
    leaves: list[_Leaf]
    arrays: Any = None
    on_host: bool = False


class KeptStates:
    """The kept states and inner gradients of the inner runs of one trainer.

    Attributes:
      places: how many states are kept where.
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
        leaves, self._treedef = jax.tree.flatten(shapes)
        self._leaves = [_Leaf.of(leaf) for leaf in leaves]
        self.places = places(replay, shapes, segments, gradients)
        self.most = self.places.all
        self.disk_refused = False
        self._run, self._where = run, replay.folder or folder
        self._opened: Folder | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="states")
        self._copying: list[KeptState | KeptGradients] = []  # to the host
        self._writing: list[KeptState] = []  # to disk
        self._saved: deque[set[str]] = deque(maxlen=2)  # names that the last checkpoints refer to
        self._outdated: set[pathlib.Path] = set()  # not needed but by those checkpoints
        self._is_swept = False  # whether files that an earlier run has left are deleted
        if self.places.disk:
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
        kept = KeptState(boundary, self.places.of(depth), name, copied(state))
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
        place = "device" if on_device < self.places.device_gradients else "host"
        leaves = [_Leaf.of(each) for each in gradients]
        new = KeptGradients(segment, place, leaves, list(gradients))
        self._begin_copy(new)
        return new

    def read_gradients(self, kept: KeptGradients) -> tuple[jax.Array, ...]:
        """Return kept inner gradients on the device, and keep them no longer; () if none are."""
        self.settle()
        arrays, kept.arrays = kept.arrays or (), None
        return tuple(_on_device(kept.leaves, arrays) if arrays and kept.on_host else arrays)

    def _begin_copy(self, kept: KeptState | KeptGradients) -> None:
        """Begin to copy arrays to the host, unless they stay on the device."""
        if kept.place != "device":
            for leaf in jax.tree.leaves(kept.arrays):
                _data(leaf).copy_to_host_async()
            self._copying.append(kept)

    def settle(self) -> None:
        """Let the copies that were begun go on from the device to the host, and to the disk."""
        copying, self._copying = self._copying, []
        for kept in copying:
            leaves = self._leaves if isinstance(kept, KeptState) else kept.leaves
            kept.arrays, kept.on_host = _on_host(leaves, kept.arrays), True
            if isinstance(kept, KeptState) and kept.place == "disk":
                self._await_files(most=1)
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
        self.disk_refused, self.places = True, dataclasses.replace(self.places, disk=0)
        self.most = self.places.all
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
            self.places = dataclasses.replace(self.places, host=kept - self.places.device)
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
            arrays = state_files.read(kept.file, [s for leaf in self._leaves for s in leaf.shards])
        return copied(jax.tree.unflatten(self._treedef, _on_device(self._leaves, arrays)))

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
                arrays = kept.arrays if kept.on_host else _on_host(self._leaves, kept.arrays)
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


def _on_host(leaves: Sequence[_Leaf], state: Any) -> list[np.ndarray]:
    pairs = zip(leaves, jax.tree.leaves(state), strict=True)
    return [array for leaf, value in pairs for array in leaf.on_host(value)]


def _on_device(leaves: Sequence[_Leaf], arrays: Sequence[np.ndarray]) -> list[jax.Array]:
    rest = iter(arrays)
    return [leaf.on_device([next(rest) for _ in leaf.shards]) for leaf in leaves]


@jax.jit
def copied(state: Any) -> Any:
    """Return a copy of a state on the device: programs may use the buffers of the other."""

    def copy(leaf: jax.Array) -> jax.Array:
        if not _is_key(leaf):
            return jnp.copy(leaf)
        data = jnp.copy(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))

    return jax.tree.map(copy, state)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of a state: of which shards it consists in this process."""

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding | None  # None: on the default device, committed to none
    shards: list[Any]  # the shape and dtype of each different one
    devices: list[list[Any]]  # those that have each of them
    key_impl: Any  # of a leaf of PRNG keys, which are saved as their data; else None

    @classmethod
    def of(cls, leaf: Any) -> _Leaf:
        where = getattr(leaf, "sharding", None)
        if isinstance(leaf, jax.Array) and not _data(leaf).committed:
            where = None
        data, impl = leaf, None
        if _is_key(leaf):
            impls: list[Any] = []
            jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), leaf)
            data, impl = jax.eval_shape(jax.random.key_data, leaf), impls[0]
        shape, copies = data.shape, {"": [None]}
        if where is not None:
            shape, copies = where.shard_shape(data.shape), {}
            for device, index in where.addressable_devices_indices_map(data.shape).items():
                copies.setdefault(str(index), []).append(device)
        shards = [jax.ShapeDtypeStruct(shape, data.dtype)] * len(copies)
        return cls(data.shape, where, shards, [*copies.values()], impl)

    @property
    def nbytes(self) -> int:
        return self.shard_bytes * len(self.shards)

    @property
    def shard_bytes(self) -> int:
        return math.prod(self.shards[0].shape) * self.shards[0].dtype.itemsize

    def on_host(self, value: jax.Array) -> list[np.ndarray]:
        shards = {shard.device: shard.data for shard in _data(value).addressable_shards}
        if self.sharding is None:
            return [np.asarray(shard) for shard in shards.values()]
        return [np.asarray(shards[same[0]]) for same in self.devices]

    def on_device(self, arrays: Sequence[np.ndarray]) -> jax.Array:
        if self.sharding is None:
            data = jax.device_put(arrays[0])
        else:
            pairs = zip(arrays, self.devices, strict=True)
            single = [jax.device_put(array, device) for array, same in pairs for device in same]
            data = jax.make_array_from_single_device_arrays(self.shape, self.sharding, single)
        return data if self.key_impl is None else jax.random.wrap_key_data(data, impl=self.key_impl)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf
