"""One inner step forward, back through its derivative, and undone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.trees import split
from metalearn.engines.recorder import Inner, Recorder
from metalearn.engines.tape import Playback, Tape, ValueAndGrad
from metalearn.unroll import Unroll


@dataclasses.dataclass(frozen=True)
class OneStep:
    """The step of an unroll, and its inner gradients recorded or played back."""

    unroll: Unroll
    eta: Any
    value_and_grad: ValueAndGrad  # takes `given`: see `tape.Playback`

    def forward(self, state: Any, batch: Any) -> tuple[Any, tuple[Inner, list[Any]]]:
        """Return (next state, (what the step saw, the tape of its inner gradients))."""
        tape = Tape()
        recorder = Recorder(tape.recording(self.value_and_grad))
        after = self.unroll.step(self.eta, state, batch, recorder.grad)
        return after, (recorder.inner(state, after), tape.results)

    def undone(self, state: Any, batch: Any) -> tuple[Any, list[Any]]:
        """Return (the state that the step led from, the tape of its inner gradients)."""
        if self.unroll.undo is None:
            raise ValueError(
                "remat='inexact_reconstruct' computes each inner state from the next, but this "
                "algorithm's `Unroll` has no `undo`. Use an inner optimizer that can be undone "
                "(`metalearn.optimizers.reversible`), give the unroll an `undo`, or use remat='nested'."
            )
        tape = Tape()
        recorder = Recorder(tape.recording(self.value_and_grad))
        return self.unroll.undo(self.eta, state, batch, recorder.grad), tape.results

    def back(
        self, state: Any, batch: Any, tape: list[Any], bars: list[jax.Array], wanted: bool = True
    ) -> tuple[list[jax.Array], Any]:
        """Pull the cotangents of the next state's float leaves back: (this state's, eta's).

        Those of this state are zero where they are not `wanted`.
        """
        floats, others, join = split(state)

        def step(eta: Any, floats: list[Any]) -> list[Any]:
            playback = Playback(tape, self.value_and_grad)
            grad = Recorder(playback.stand_in).grad
            after = self.unroll.step(eta, join(floats, others), batch, grad)
            playback.finish()
            return split(after)[0]

        if not wanted:
            _, pull = jax.vjp(lambda eta: step(eta, floats), self.eta)
            return list(map(jnp.zeros_like, floats)), *pull(bars)
        _, pull = jax.vjp(step, self.eta, floats)
        eta_bar, state_bar = pull(bars)
        return state_bar, eta_bar
