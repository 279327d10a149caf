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
from metalearn.chunks import mean_and_each
from metalearn.engines import Aux, MetaGradient, MixedFlow
from metalearn.engines.check import check_eta
from metalearn.evaluation import Estimate, estimate, task_metrics
from metalearn.faults import WATCHED
from metalearn.fit import Fit
from metalearn.fitting import run
from metalearn.inner_metrics import step_metrics
from metalearn.isolation import all_finite, mean_of_finite, or_zero
from metalearn.leaves import select, strong
from metalearn.loggers import Logger
from metalearn.probe import Look, look_at
from metalearn.sharding import Layout
from metalearn.shares import at_once
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
    isolate: bool = False  # leave out tasks that are not finite, as truncated training always does
    skip_nonfinite: bool = False  # an outer step that is not finite leaves eta as it was
    layout: Layout | None = None  # over which devices; None: on one

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
        if self.layout is not None:
            self.layout.check(self.tasks_per_step, self.chunk)

    def init(self, key: jax.Array, tasks: Tasks | None = None) -> TrainState:
        """Return the state before the first outer step.

        Inner runs that go on from step to step are a part of it, so `truncation` needs `tasks`.
        """
        if self.layout is None:
            return self._init(key, tasks)
        where = self.layout.shardings(jax.eval_shape(self._init, key, tasks))
        return jax.jit(self._init, out_shardings=where)(key, self.place(tasks))

    def shapes(self, tasks: Tasks | None = None) -> TrainState:
        """Return the shapes of a state, and where its leaves lie; nothing is allocated."""
        shapes = jax.eval_shape(self._init, jax.eval_shape(lambda: jax.random.key(0)), tasks)
        return shapes if self.layout is None else self.layout.abstract(shapes)

    def _init(self, key: jax.Array, tasks: Tasks | None = None) -> TrainState:
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
        Tasks that were not finite and left out are counted: in `tasks_left_out`, or of truncated
        training in `tasks_reset`. `step_skipped` is 1 where `skip_nonfinite` left eta alone.
        """
        return jax.jit(self._step)

    def _step(self, state: TrainState, tasks: Tasks) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics, inner = self._mean_gradient(state, tasks)
        outer = optax.with_extra_args_support(self.optimizer)  # `value` for those that look at it
        updates, optimizer = outer.update(grads, state.optimizer, state.eta, value=metrics["loss"])
        updates = jax.tree.map(lambda u: u * state.pace.astype(u.dtype), updates)
        eta = optax.apply_updates(state.eta, updates)
        metrics["meta_grad_norm"] = optax.tree.norm(grads)
        metrics["meta_update_norm"] = optax.tree.norm(updates)
        if self.skip_nonfinite:
            fine = jnp.stack([jnp.isfinite(metrics[name]) for name in WATCHED]).all()
            eta, optimizer = select(fine, (eta, optimizer), (state.eta, state.optimizer))
            metrics["step_skipped"] = ~fine
        after = TrainState(state.step + 1, eta, optimizer, state.key, inner, state.pace)
        return after if self.layout is None else self.layout.constrain(after), metrics

    def _mean_gradient(self, state: TrainState, tasks: Tasks) -> tuple[Any, dict[str, Any], Any]:
        """Return (meta-gradient, metrics, the inner runs as they stand then)."""
        keys = self.task_keys(state)
        if self.truncation is None:
            return *self._mean_over_tasks((state.eta, tasks), keys), ()
        if not isinstance(state.inner, Carried):
            raise ValueError(
                "This state has no inner runs to go on with: it is not of truncated training. "
                "Begin with `Trainer.init(key, tasks)` of this trainer."
            )
        shares = self.truncation.shares(self.tasks_per_step, state.step == 0)

        def on_run(eta: Any, tasks: Tasks, inputs: Any) -> Any:
            return self._advance(eta, tasks, *inputs)

        shared, inputs = (state.eta, tasks), (state.inner, keys, shares)
        means, inner = self._mean_and_each(on_run, shared, inputs)
        grads, metrics, left_out = mean_of_finite(means, self.tasks_per_step)
        return grads, {**metrics, "tasks_reset": left_out}, inner

    def _mean_over_tasks(self, shared: Any, keys: jax.Array) -> tuple[Any, dict[str, Any]]:
        """Return (meta-gradient, metrics) of whole inner runs, one a key; shared: (eta, tasks)."""
        if not self.isolate:
            return self.mean_over(self.task_gradient, shared, keys)

        def on_task(eta: Any, tasks: Tasks, key: jax.Array) -> Any:
            (loss, aux), grads = self._solve(self._laid_out(self.algorithm), eta, tasks, key)
            return or_zero(all_finite(loss, aux, grads), (grads, step_metrics(loss, aux)))

        means = self.mean_over(on_task, shared, keys)
        grads, metrics, left_out = mean_of_finite(means, self.tasks_per_step)
        return grads, {**metrics, "tasks_left_out": left_out}

    def mean_over(self, on_task: Callable[..., Any], shared: Any, keys: jax.Array) -> Any:
        """Return the mean of `on_task(*shared, key)` over the keys [tasks_per_step] of tasks."""
        return self._mean_and_each(lambda *given: (on_task(*given), ()), shared, keys)[0]

    def _mean_and_each(
        self, function: Callable[..., Any], shared: Any, inputs: Any
    ) -> tuple[Any, Any]:
        if self.layout is None:
            return mean_and_each(functools.partial(function, *shared), inputs, self.chunk)
        return self.layout.mean_and_each(function, shared, inputs, self.chunk)

    @property
    def share(self) -> int:
        """Return how many tasks of a step a device takes."""
        return self.tasks_per_step // (1 if self.layout is None else self.layout.devices)

    @property
    def at_once(self) -> int:
        """Return how many tasks a device unrolls at once."""
        return at_once(self.share, self.chunk)

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
        return or_zero(finite, (grads, step_metrics(loss, aux))), carried

    def _pose(self, eta: Any, tasks: Tasks, key: jax.Array) -> Any:
        return pose(self._laid_out(self.algorithm), self.engine, eta, tasks, key)

    def _laid_out(self, algorithm: Algorithm) -> Algorithm:
        return algorithm if self.layout is None else self.layout.cut_inside(algorithm)

    def task_keys(self, state: TrainState) -> jax.Array:
        """Return the keys [tasks_per_step] of the tasks of the outer step after `state`."""
        return jax.random.split(jax.random.fold_in(state.key, state.step), self.tasks_per_step)

    def task_gradient(
        self, eta: Any, tasks: Tasks, key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Return (meta-gradient like eta, metrics) of the one task that `key` draws."""
        (loss, aux), grads = self._solve(self._laid_out(self.algorithm), eta, tasks, key)
        return grads, step_metrics(loss, aux)

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

        where = None if self.layout is None else self.layout.replicated
        return jax.jit(look, static_argnames="steps", out_shardings=where)

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
        `log_every`, `check_every`, `faults`, `asked_to_stop`, `progress`.
        """
        tasks, held_out = self.place((tasks, options.pop("held_out", None)))
        fit = Fit(steps, held_out=held_out, **options)
        skips = fit.faults.nonfinite == "skip"
        trainer = dataclasses.replace(self, skip_nonfinite=True) if skips else self
        return run(fit, trainer, self.init(key, tasks), tasks, loggers, checkpoints)

    def place(self, tasks: Any) -> Any:
        """Return tasks with their arrays on every device of the layout, if they were not there."""
        return tasks if self.layout is None else self.layout.replicate(tasks)

    def evaluate(
        self, eta: Any, tasks: Tasks, key: jax.Array, count: int = 1000
    ) -> dict[str, Estimate]:
        """Adapt to `count` tasks and return the mean of each metric with its 95% interval.

        The same key draws the same tasks. No meta-gradient is taken.
        """
        tasks, devices = self.place(tasks), 1 if self.layout is None else self.layout.devices
        chunk = devices * min(-(-count // devices), self.at_once)
        return estimate(lambda keys: self._evaluate(eta, tasks, keys), key, count, chunk)

    @functools.cached_property
    def _evaluate(self) -> Callable[..., dict[str, jax.Array]]:
        algorithm = self._laid_out(self.algorithm.evaluation())
        each = None if self.layout is None else self.layout.each

        def on_tasks(shared: Any, keys: jax.Array) -> dict[str, jax.Array]:
            eta, tasks = shared
            return jax.vmap(lambda key: task_metrics(algorithm, eta, tasks, key))(keys)

        def on_keys(eta: Any, tasks: Tasks, keys: jax.Array) -> dict[str, jax.Array]:
            shared = eta, tasks
            return on_tasks(shared, keys) if each is None else each(on_tasks, shared, keys)

        return jax.jit(on_keys)
