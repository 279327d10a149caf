"""How much memory an inner run in segments may take for its backward pass, and what it holds.

`Replay` is what a user sets: budgets of device memory, host memory and disk. `Capacity` is what
follows for a run: how many states, and inner gradients of how many segments, are kept where. States
are a stack, whose bottom is read last: it is on disk, what is above it in host memory, and the top
on the device (`metalearn.training.kept_states`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from metalearn._utils.checks import Count
from metalearn._utils.device_memory import host_memory, parse_bytes, show_bytes
from metalearn._utils.fields import check_fields
from metalearn.sharding.host_copies import bytes_on_devices, process_bytes

Amount = int | str
AMOUNTS = "device", "host", "disk", "gradients"  # fields of `Replay`


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

    def capacity(
        self,
        state_bytes: int,
        segments: int,
        gradient_bytes: int = 0,
        on_devices: tuple[int, int] | None = None,
    ) -> Capacity:
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
        return Capacity(*states, *_filled(room, most if gradient_bytes else 0))


def _filled(room: Sequence[int], count: int) -> list[int]:
    """Return how many of `count` items go to each place, the first ones filled first."""
    counts: list[int] = []
    for most in room:
        counts.append(min(most, count - sum(counts)))
    return counts


@dataclasses.dataclass(frozen=True)
class Capacity:
    """How many states are kept on the device, in host memory and on disk.

    `device_gradients` and `host_gradients`: of how many segments inner gradients are kept there.
    """

    device: int
    host: int
    disk: int
    device_gradients: int = 0
    host_gradients: int = 0

    @property
    def states(self) -> int:
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


def capacity(replay: Replay, state: Any, segments: int, gradients: Any = ()) -> Capacity:
    """Return what is kept where, of states and inner gradients of these shapes.

    Args:
      replay: the budgets.
      state: the shapes of a state, with the shardings of its leaves.
      segments: of the run.
      gradients: like `state`, of the inner gradients of one segment; (): none are read.
    """
    sizes = process_bytes(state), segments, process_bytes(gradients)
    return replay.capacity(*sizes, (bytes_on_devices(state), bytes_on_devices(gradients)))
