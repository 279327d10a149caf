"""The `grad` that an inner step receives: it differentiates and records.

`Recorder` hands out `grad` and records inner losses and the finiteness of inner gradients. An
inner loop that diverges, or whose gradients are not finite, shows there first: the outer loss may
look healthy for a while. Each engine brings its own `value_and_grad`; recording is the same for
all.

`Tape` and `Playback` record the inner gradients of a step in the forward pass and replay them in
the backward pass. A step that is run again for its derivative needs the values of its inner
gradients, and their derivative, but no second evaluation of the loss.

`OneStep` is one inner step that is recorded: forward, played back, backward, and undone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from metalearn._utils.trees import precision, split
from metalearn.unroll import Unroll


class Inner(NamedTuple):
    """What the inner loop saw; stacked over steps by the engines.

    Inner gradients taken inside a transformation of the step's own (its own `vmap`,
    `scan` or `jit`) are differentiated as any other but not recorded.
    """

    losses: jax.Array  # [T, n]: the n inner losses of a step, in the order taken
    finite: jax.Array  # [T, n], bool: whether that loss's gradient has a finite squared norm
    # [T, 1]: the norm of the step's change of what `grad` differentiated; [T, 0] where that is
    # no part of the inner state as it stands.
    update_norm: jax.Array
    # [T, k]: the norm of each tangent after a step, of those that `Forward` pushes, in the
    # order in which they come into play; [T, 0] for engines that push none.
    tangent_norm: jax.Array


class Recorder:
    """Hands out `grad` for one inner step and keeps the losses that pass through it."""

    def __init__(self, value_and_grad: Callable[..., Callable[..., Any]]):
        self._value_and_grad = value_and_grad
        self._trace = get_opaque_trace_state(convention="metalearn")
        self._losses: list[jax.Array] = []
        self._finite: list[jax.Array] = []
        self._theta: set[int] = set()  # of the leaves that were differentiated: their id()

    def grad(
        self, fun: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
    ) -> Callable[..., Any]:
        """Stand in for `jax.grad`: same arguments, same results."""
        differentiate = self._value_and_grad(fun, argnums=argnums, has_aux=has_aux)

        def grad_fun(*args: Any, **kwargs: Any) -> Any:
            value, grads = differentiate(*args, **kwargs)
            chosen = (argnums,) if isinstance(argnums, int) else argnums
            self._theta |= {id(leaf) for i in chosen for leaf in jax.tree.leaves(args[i])}
            self._record(value[0] if has_aux else value, grads)
            return (grads, value[1]) if has_aux else grads

        return grad_fun

    def _record(self, loss: jax.Array, grads: Any) -> None:
        if get_opaque_trace_state(convention="metalearn") != self._trace:
            return  # these tracers must not leave the transformation they live in
        self._losses.append(loss)
        self._finite.append(jnp.isfinite(sum(map(_squared_norm, jax.tree.leaves(grads)))))

    def differentiated(self, state: Any) -> list[bool]:
        """Return of each leaf of a state whether `grad` took it as it stands, as part of theta."""
        return [id(leaf) in self._theta for leaf in jax.tree.leaves(state)]

    def inner(self, before: Any, after: Any) -> Inner:
        """Return what was recorded for one step from state to state: leaves [n]."""
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=False)
        theta = self.differentiated(before)
        moved = [pair for pair, is_theta in zip(pairs, theta, strict=False) if is_theta]
        squares = [_squared_norm(new - old) for old, new in moved]
        norms = [jnp.sqrt(sum(squares[1:], squares[0]))] if squares else []
        inner = Inner(
            _stacked(self._losses, float),
            _stacked(self._finite, bool),
            _stacked(norms, float),
            _stacked([], float),  # tangents are the engine's own
        )
        return jax.lax.stop_gradient(inner)


def joined(seen: Sequence[Inner]) -> Inner:
    """Return what the parts of one loop saw, one after the other."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)


def _stacked(values: list[jax.Array], dtype: Any) -> jax.Array:
    return jnp.stack(values) if values else jnp.zeros((0,), dtype)


def _squared_norm(leaf: jax.Array) -> jax.Array:
    """Return |leaf|^2 (): a dot product, far faster on a CPU than `isfinite(leaf).all()`.

    Real, of complex leaves too.
    """
    return jnp.vdot(leaf, leaf, preferred_element_type=precision(leaf)).real


ValueAndGrad = Callable[..., Callable[..., Any]]


class Tape:
    """Records what a stand-in for `jax.value_and_grad` returns, call by call, in one step.

    Calls inside a transformation of the step's own leave None: they are computed again.
    """

    def __init__(self) -> None:
        self._trace = get_opaque_trace_state(convention="metalearn")
        self.results: list[Any] = []

    def recording(self, value_and_grad: ValueAndGrad) -> ValueAndGrad:
        """Return the stand-in, recorded."""

        def stand_in(fun: Any, argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
            differentiate = value_and_grad(fun, argnums=argnums, has_aux=has_aux)

            def call(*args: Any, **kwargs: Any) -> Any:
                result = differentiate(*args, **kwargs)
                here = get_opaque_trace_state(convention="metalearn") == self._trace
                self.results.append(result if here else None)
                return result

            return call

        return stand_in


class Playback:
    """Returns recorded results, call by call, differentiated as `value_and_grad` does.

    `value_and_grad` takes the result as a further argument, `result`.
    """

    def __init__(self, results: list[Any], value_and_grad: ValueAndGrad):
        self._left = list(results)
        self._value_and_grad = value_and_grad

    def stand_in(self, fun: Any, argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
        """Stand in for `jax.value_and_grad`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._check(bool(self._left))
            known = self._value_and_grad(fun, argnums, has_aux, result=self._left.pop(0))
            return known(*args, **kwargs)

        return call

    def finish(self) -> None:
        """Raise ValueError where results are left over."""
        self._check(not self._left)

    def _check(self, same: bool) -> None:
        if not same:
            raise ValueError(
                "An `Unroll.undo` must take the inner gradients of the step it undoes, all of "
                "them, at the same points and in the same order, with the `grad` it is given; this "
                "one takes more or fewer than `step` does."
            )


@dataclasses.dataclass(frozen=True)
class OneStep:
    """The step of an unroll, and its inner gradients recorded or played back."""

    unroll: Unroll
    eta: Any
    value_and_grad: ValueAndGrad  # takes `result`: see `Playback`

    def forward(self, state: Any, batch: Any) -> tuple[Any, tuple[Inner, list[Any]]]:
        """Return (next state, (what the step saw, the tape of its inner gradients))."""
        tape = Tape()
        recorder = Recorder(tape.recording(self.value_and_grad))
        after = self.unroll.step(self.eta, state, batch, recorder.grad)
        return after, (recorder.inner(state, after), tape.results)

    def played_back(
        self, state: Any, batch: Any, tape: list[Any], eta: Any = None
    ) -> tuple[Any, Inner]:
        """Return (next state, what the step saw), its inner gradients read from a tape.

        Differentiable in the state and in `eta`, which by default is that of the step.
        """
        playback = Playback(tape, self.value_and_grad)
        recorder = Recorder(playback.stand_in)
        after = self.unroll.step(self.eta if eta is None else eta, state, batch, recorder.grad)
        playback.finish()
        return after, recorder.inner(state, after)

    def undone(self, state: Any, batch: Any) -> tuple[Any, list[Any]]:
        """Return (the state that the step led from, the tape of its inner gradients)."""
        if self.unroll.undo is None:
            raise ValueError(
                "remat='inexact_reconstruct' computes each inner state from the next, but this "
                "algorithm's `Unroll` has no `undo`. Use an inner optimizer that can be undone "
                "(`metalearn.optimizers.reversible`), give the unroll an `undo`, or use "
                "remat='nested'."
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
            return split(self.played_back(join(floats, others), batch, tape, eta)[0])[0]

        if not wanted:
            _, pull = jax.vjp(lambda eta: step(eta, floats), self.eta)
            return list(map(jnp.zeros_like, floats)), *pull(bars)
        _, pull = jax.vjp(step, self.eta, floats)
        eta_bar, state_bar = pull(bars)
        return state_bar, eta_bar
