"""The outer loop: a batch of tasks, their mean meta-gradient, one outer update.

One outer step is one compiled program: it draws the tasks on the device, unrolls all of
them (vmapped, or in chunks where memory asks for it) and applies the outer optimizer.
The tasks of step n depend on (key, n) alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from metalearn.algorithm import Algorithm
from metalearn.chunks import mean_and_each, mean_over
from metalearn.engines import Aux, MetaGradient, MixedFlow
from metalearn.engines.check import check_eta
from metalearn.evaluation import Estimate, estimate, merged, task_metrics
from metalearn.fit import Fit
from metalearn.leaves import strong
from metalearn.loggers import Logger
from metalearn.probe import Look, look_at
from metalearn.tasks import Tasks
from metalearn.train_state import TrainState
from metalearn.truncation import Carried, Truncation, advance, due, pose

if TYPE_CHECKING:
    from metalearn.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains the eta of any algorithm, with any engine and any optax optimizer."""

    algorithm: Algorithm
    engine: MetaGradient = MixedFlow()
    optimizer: optax.GradientTransformation = optax.adam(1e-3)  # the outer one
    tasks_per_step: int = 16
    chunk: int | None = None  # tasks unrolled at once; None: all of a step's
    truncation: Truncation | None = None  # inner runs go on from step to step; None: whole ones

    def __post_init__(self) -> None:
        if not isinstance(self.engine, MetaGradient):
            raise TypeError(
                f"`Trainer(engine=)` takes an engine, such as `MixedFlow()`, not {self.engine!r}. "
                "Names are for configs."
            )
        if self.truncation is not None and not isinstance(self.truncation, Truncation):
            raise TypeError(
                f"`Trainer(truncation=)` takes `Truncation(steps)`, not {self.truncation!r}."
            )
        if self.tasks_per_step < 1:
            raise ValueError(f"An outer step takes at least one task, not {self.tasks_per_step}.")
        if self.chunk is not None and (self.chunk < 1 or self.tasks_per_step % self.chunk):
            fitting = [n for n in range(1, self.tasks_per_step + 1) if self.tasks_per_step % n == 0]
            raise ValueError(
                f"tasks_per_step={self.tasks_per_step} does not divide into chunks of "
                f"{self.chunk}. Chunks that fit: {', '.join(map(str, fitting))}."
            )

    def init(self, key: jax.Array, tasks: Tasks | None = None) -> TrainState:
        """Return the state before the first outer step.

        Inner runs that go on from step to step are a part of it, so `truncation` needs `tasks`.
        """
        init_key, run_key = jax.random.split(key)
        eta = jax.jit(self.algorithm.init)(init_key)
        check_eta(eta)
        eta = strong(eta)
        optimizer = strong(self.optimizer.init(eta))
        state = TrainState(jnp.zeros((), jnp.int32), eta, optimizer, run_key)
        if self.truncation is None:
            return state
        if tasks is None:
            raise ValueError(
                "Truncated training carries inner states from step to step, and their shapes "
                "are those of the tasks: call `Trainer.init(key, tasks)`."
            )
        return dataclasses.replace(state, inner=strong(jax.jit(self._due)(state, tasks)))

    def _due(self, state: TrainState, tasks: Tasks) -> Carried:
        """Return inner runs [tasks_per_step] in whose place new tasks are due."""
        return jax.vmap(lambda key: due(self._pose(state.eta, tasks, key), state.eta, key))(
            self.task_keys(state)
        )

    @functools.cached_property
    def step(self) -> Callable[[TrainState, Tasks], tuple[TrainState, dict[str, jax.Array]]]:
        """Take one outer step: (state, tasks) -> (state, metrics). Compiled.

        Metrics are means over the tasks of the step: `loss` (the outer loss), those of
        the algorithm, `inner_loss_first`, `inner_loss_last`, `inner_finite` (the share of
        inner gradients that were finite), `inner_steps_finite` (steps before a gradient, or a
        tangent of `Forward`, was not), `inner_update_norm` (of one step's change of theta) and
        `inner_tangent_norm` (the largest, in the end); and `meta_grad_norm`, `meta_update_norm`.
        Truncated training leaves tasks out that are not finite, counted in `tasks_reset`.
        """
        return jax.jit(self._step)

    def _step(self, state: TrainState, tasks: Tasks) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics, inner = self._mean_gradient(state, tasks)
        outer = optax.with_extra_args_support(self.optimizer)  # `value` for those that look at it
        updates, optimizer = outer.update(grads, state.optimizer, state.eta, value=metrics["loss"])
        eta = optax.apply_updates(state.eta, updates)
        metrics["meta_grad_norm"] = optax.tree.norm(grads)
        metrics["meta_update_norm"] = optax.tree.norm(updates)
        return TrainState(state.step + 1, eta, optimizer, state.key, inner), metrics

    def _mean_gradient(self, state: TrainState, tasks: Tasks) -> tuple[Any, dict[str, Any], Any]:
        """Return (meta-gradient, metrics, the inner runs as they stand then)."""
        keys = self.task_keys(state)
        if self.truncation is None:

            def on_task(key: jax.Array) -> Any:
                return self.task_gradient(state.eta, tasks, key)

            return *mean_over(on_task, keys, self.chunk), ()
        if not isinstance(state.inner, Carried):
            raise ValueError(
                "This state has no inner runs to go on with: it is not of truncated training. "
                "Begin with `Trainer.init(key, tasks)` of this trainer."
            )
        shares = self.truncation.shares(self.tasks_per_step, state.step == 0)

        def on_run(inputs: Any) -> Any:
            return self._advance(state.eta, tasks, *inputs)

        inputs = state.inner, keys, shares
        (grads, metrics, finite), inner = mean_and_each(on_run, inputs, self.chunk)
        # Where no task is finite the metrics are NaN, for all to see, and the meta-gradient zero.
        some = jnp.maximum(finite, 1 / self.tasks_per_step)
        grads = jax.tree.map(lambda x: x / some.astype(x.dtype), grads)
        metrics = jax.tree.map(lambda x: x / finite.astype(x.dtype), metrics)
        metrics["tasks_reset"] = jnp.round((1 - finite) * self.tasks_per_step)
        return grads, metrics, inner

    def _advance(
        self, eta: Any, tasks: Tasks, carried: Carried, key: jax.Array, share: jax.Array
    ) -> tuple[Any, Carried]:
        """Take the next truncation of a run: ((meta-gradient, metrics, finite), the run then).

        What is not finite counts as zero, of a run that does not count.
        """
        assert self.truncation is not None

        def pose_of(key: jax.Array) -> Any:
            return self._pose(eta, tasks, key)

        solve = self.engine.value_and_grad
        result, finite, carried = advance(self.truncation, solve, pose_of, eta, carried, key, share)
        (loss, aux), grads = result
        found = grads, _metrics(loss, aux)
        kept = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), found)
        return (*kept, finite), carried

    def _pose(self, eta: Any, tasks: Tasks, key: jax.Array) -> Any:
        return pose(self.algorithm, self.engine, eta, tasks, key)

    def task_keys(self, state: TrainState) -> jax.Array:
        """Return the keys [tasks_per_step] of the tasks of the outer step after `state`."""
        return jax.random.split(jax.random.fold_in(state.key, state.step), self.tasks_per_step)

    def task_gradient(
        self, eta: Any, tasks: Tasks, key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Return (meta-gradient like eta, metrics) of the one task that `key` draws."""
        (loss, aux), grads = self._solve(self.algorithm, eta, tasks, key)
        return grads, _metrics(loss, aux)

    def _solve(
        self, algorithm: Algorithm, eta: Any, tasks: Tasks, key: jax.Array
    ) -> tuple[tuple[jax.Array, Aux], Any]:
        posed = pose(algorithm, self.engine, eta, tasks, key)
        return self.engine.value_and_grad(posed.unroll, eta, posed.batches(), posed.engine)

    @functools.cached_property
    def look(self) -> Callable[..., Look]:
        """Look at one task, for `metalearn.health`: (eta, tasks, key, zeros, steps). Compiled."""
        most = None if self.truncation is None else self.truncation.steps

        def look(eta: Any, tasks: Tasks, key: jax.Array, zeros: Any = False, steps: Any = None):
            taken = min((n for n in (steps, most) if n is not None), default=None)
            return look_at(self._solve, self.algorithm, eta, tasks, key, zeros, taken)

        return jax.jit(look, static_argnames="steps")

    def fit(
        self,
        tasks: Tasks,
        steps: int,
        *,
        key: jax.Array,
        loggers: Sequence[Logger] = (),
        checkpoints: Checkpoints | None = None,
        **options: Any,
    ) -> TrainState:
        """Train for `steps` outer steps, or from the newest checkpoint up to there.

        `options` are those of `metalearn.fit.Fit`: `held_out`, `eval_every`, `eval_tasks`,
        `log_every`, `check_every`, `stop_on_nonfinite`, `progress`.
        """
        fit = Fit(steps, **options)
        return fit.run(self, self.init(key, tasks), tasks, loggers, checkpoints)

    def evaluate(
        self, eta: Any, tasks: Tasks, key: jax.Array, count: int = 1000
    ) -> dict[str, Estimate]:
        """Adapt to `count` tasks and return the mean of each metric with its 95% interval.

        The same key draws the same tasks. No meta-gradient is taken.
        """
        chunk = min(count, self.chunk or self.tasks_per_step)
        return estimate(lambda keys: self._evaluate(eta, tasks, keys), key, count, chunk)

    @functools.cached_property
    def _evaluate(self) -> Callable[..., dict[str, jax.Array]]:
        algorithm = self.algorithm.evaluation()

        def on_tasks(eta: Any, tasks: Tasks, keys: jax.Array) -> dict[str, jax.Array]:
            return jax.vmap(lambda key: task_metrics(algorithm, eta, tasks, key))(keys)

        return jax.jit(on_tasks)


def _metrics(loss: jax.Array, aux: Aux) -> dict[str, jax.Array]:
    return merged({"loss": loss, **_inner_metrics(aux)}, aux.metrics)


def _inner_metrics(aux: Aux) -> dict[str, jax.Array]:
    losses, finite, update_norm, tangent_norm = aux.inner
    if not losses.size:
        return {}
    moved = {"inner_update_norm": update_norm.mean()} if update_norm.size else {}
    pushed = {"inner_tangent_norm": tangent_norm[-1].max()} if tangent_norm.size else {}
    fine = finite.all(1) & jnp.isfinite(tangent_norm).all(1)
    return {
        "inner_loss_first": losses[0].mean(),
        "inner_loss_last": losses[-1].mean(),
        "inner_finite": finite.mean(),
        "inner_steps_finite": jnp.cumprod(fine).sum(),
        **moved,
        **pushed,
    }
