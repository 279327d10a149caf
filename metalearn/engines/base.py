"""The interface of all engines: how the derivative of an unroll travels.

| engine            | memory                      | time, in forward passes of the loop |
|-------------------|-----------------------------|-------------------------------------|
| `Reverse`         | O(T), or O(sqrt(T))         | a few, whatever the size of eta     |
| `Forward`         | O(N) states, flat in T      | 1 + about N, for N meta-parameters  |
| `MixedFlow`       | one inner Hessian product   | as `Reverse`, or fewer              |
| `ES`              | 2n states, flat in T        | 2n, for n pairs of particles        |
| `PES`             | 2n states, carried on       | 2n, for n pairs of particles        |
| `InverseVariance` | 2n times an exact engine's  | 2n times an exact engine's          |
| `Implicit`        | a few states, flat in T     | 1, and a solver's Hessian products  |
| `Truncated`       | k steps, flat in T          | 1, and a few for the last k steps   |
| `SAMA`            | one gradient, flat in T     | 1, and three gradients              |

The first three agree to rounding: each is the derivative of the loop as JAX differentiates it,
inner gradients as they stand. Where a function in an inner loss has a derivative rule of its own
that is no derivative (a straight-through estimator, a clipped gradient), the inner gradient is
not the gradient of anything, and they agree all the same; `MixedFlow` then saves no memory on it
(`metalearn.engines.custom_rules`, docs/custom_rules.md). They may disagree on a rule that the user
declares a derivative though it is none, or one that is a derivative wherever it was probed and none
where a run uses it: `metalearn.diagnostics.health` measures that on a task.

`metalearn.engines.approximate` differentiates less than the loop: `Implicit` its fixed point,
`Truncated` its last steps, `SAMA` one step at its end. Each is exact in a limit, and
`metalearn.diagnostics.compare` measures how far from it a problem is.

The others estimate: from losses alone, for loops whose derivative is of no use, or (`PES`) from
truncated unrolls without their bias. An engine that cannot serve a problem refuses at trace time.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from metalearn.engines.custom_rules import Plan
from metalearn.engines.grad_recorder import Inner
from metalearn.unroll import Unroll


class Aux(NamedTuple):
    """What comes out of an unroll beside its loss."""

    metrics: dict[str, jax.Array]  # whatever `unroll.loss` returned
    state: Any  # the inner state after T steps, so that a truncated run can carry on
    inner: Inner  # inner losses and finiteness, [T, n]
    engine: Any = ()  # the engine's own state, for its next call


class ApproximationWarning(UserWarning):
    """An approximate meta-gradient is not what it approximates; the message says by how much."""


class MetaGradient(abc.ABC):
    """A way of differentiating through an inner loop. Subclasses are frozen dataclasses."""

    @property
    def commutes(self) -> bool:
        """Whether it takes Jacobians of inner gradients for symmetric, where `plan` says so."""
        return False

    def plan(self, call: Any) -> Plan:
        """Say what of an inner gradient's Jacobian is taken for symmetric, and why not all.

        `call`: a `mixed_flow.forward_over_reverse.Call`. For engines that commute.
        """
        raise NotImplementedError(f"`{type(self).__name__}` differentiates inner gradients as is.")

    def init(self, key: jax.Array, unroll: Unroll, eta: Any) -> Any:
        """Return the engine's own state for its first call on a task.

        Exact engines have none. Estimators keep what they carry from call to call here, their
        randomness and inner states of their own; each call returns the next in `aux.engine`,
        a pytree of the same structure and shapes.
        """
        del key, unroll, eta
        return ()

    def rollout(self, unroll: Unroll, eta: Any, batches: Any) -> tuple[jax.Array, Aux]:
        """Return (loss (), aux) as a function of eta that a level above may differentiate twice.

        Its gradient is the meta-gradient of this engine, and the gradient of that is exact too: for
        `metalearn.algorithms.MetaTraining`, where an outer step is the inner step of another loop.
        By default refused.

        Args:
          unroll: the inner loop and its loss.
          eta: pytree of floating-point arrays.
          batches: pytree with leaves [T, ...]; step t reads slice t.
        """
        del unroll, eta, batches
        raise ValueError(
            f"`{self}` returns a meta-gradient that a level above cannot differentiate once more, "
            "so it cannot be the engine of a lower level. Use `Reverse()`, with any `remat`, or "
            "`MixedFlow()` as `MetaTraining(engine=)`; the engine of the level above, the "
            "Trainer's, may be any."
        )

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Say why the meta-gradient may be wrong: {name of a metric: a paragraph}.

        For engines that rest on an assumption and measure it. `Trainer.fit` prints each once.

        Args:
          metrics: of a call, or of an outer step, with its `loss`.
        """
        del metrics
        return {}

    @abc.abstractmethod
    def value_and_grad(
        self, unroll: Unroll, eta: Any, batches: Any, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Any]:
        """Return ((loss (), aux), meta-gradient like eta).

        Args:
          unroll: the inner loop and its loss.
          eta: pytree of floating-point arrays.
          batches: pytree with leaves [T, ...]; step t reads slice t.
          state: from `init`, or from `aux.engine` of the call before.
        """


@runtime_checkable
class Streaming(Protocol):
    """An engine whose loop need not run in one call: `start`, `advance`, ..., `finish`."""

    def start(self, unroll: Unroll, eta: Any, state: Any = ()) -> Any:
        """Return the stream before the first step: all it takes to go on."""

    def advance(
        self, unroll: Unroll, eta: Any, stream: Any, batches: Any, until: int | None = None
    ) -> tuple[Any, Inner]:
        """Take the next steps: (stream, what the loop saw)."""

    def finish(
        self, unroll: Unroll, eta: Any, stream: Any, inner: Inner
    ) -> tuple[tuple[jax.Array, Aux], Any]:
        """Return ((loss (), aux), meta-gradient like eta) of a loop that has run."""

    def ends(self, unroll: Unroll, eta: Any, steps: int) -> list[int]:
        """Return what to pass `advance` as `until`, of T steps: the first that is far enough."""


@runtime_checkable
class Backward(Protocol):
    """An engine whose backward pass can be taken segment by segment; see `engines.segments`."""

    def advance(
        self, unroll: Unroll, eta: Any, state: Any, batches: Any
    ) -> tuple[Any, Inner, list[jax.Array]]:
        """Take the next steps: (inner state, what the loop saw, `InnerGradients` or [])."""

    def pull_back(
        self,
        unroll: Unroll,
        eta: Any,
        state: Any,
        batches: Any,
        gradients: list[jax.Array],
        cotangents: Any,
    ) -> Any:
        """Pull `Cotangents` of the state after these steps back to the state before them.

        `gradients`: what `advance` returned of these steps.
        """


def check_eta(eta: Any) -> None:
    """Raise ValueError where eta has no leaves, TypeError for one without a derivative."""
    leaves = jax.tree_util.tree_leaves_with_path(eta)
    if not leaves:
        raise ValueError("`eta` has no leaves, so there is nothing to learn. Did `init` return it?")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`eta{jax.tree_util.keystr(path)}` has dtype {dtype}, and a meta-gradient "
                "exists for floating-point leaves only. Keep counters, keys and masks in the "
                "inner state or on the algorithm, and leave in `eta` what is learned."
            )


def outer_loss(unroll: Unroll, eta: Any, state: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return what `unroll.loss` returns; TypeError unless that is (loss (), metrics)."""
    result = unroll.loss(eta, state)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise TypeError(
            "`Unroll.loss` returns the outer loss and a dictionary of metrics, (loss, metrics), "
            f"but this one returned {_kinds(result)}. Without metrics: `return loss, {{}}`."
        )
    if jnp.shape(result[0]):
        raise TypeError(
            "`Unroll.loss` returns a number as the outer loss, but this one has shape "
            f"{list(jnp.shape(result[0]))}. Take its mean or its sum."
        )
    return result


def _kinds(result: Any) -> str:
    """Say what a function returned: arrays, or a tuple of what."""
    if isinstance(result, tuple):
        return f"({', '.join(map(_kinds, result))})"
    return "one array" if isinstance(result, jax.Array) else type(result).__name__


@contextlib.contextmanager
def explained(kind: type[Exception], part: str, message: str) -> Iterator[None]:
    """Raise an error of the same kind with `message` in place of one whose text has `part`."""
    try:
        yield
    except kind as error:
        if part not in str(error):
            raise
        raise kind(message) from error


def going_backwards() -> contextlib.AbstractContextManager[None]:
    """Raise ValueError with the way out where JAX finds a loop that it cannot go back through."""
    return explained(
        ValueError,
        "Reverse-mode differentiation does not work for lax.while_loop",
        "An inner loop holds a `jax.lax.while_loop`, and JAX has no backward pass through one. "
        "The usual cause is a line search of the inner optimizer, such as that of `optax.lbfgs`. "
        "Use `Forward()`, which goes through it, an estimator such as `ES()`, or an optimizer "
        "without it: `optax.lbfgs(0.1, linesearch=None)`.",
    )
