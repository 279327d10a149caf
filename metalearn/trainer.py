"""The outer loop: a batch of tasks, their mean meta-gradient, one outer update.

One outer step is one compiled program: it draws the tasks on the device, unrolls all of them
(vmapped, or in chunks to save memory) and applies the outer optimizer. An outer step of hours can
be cut into several programs (`segment`). The tasks of step n depend on (key, n) alone.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import Count, counts
from metalearn._utils.fields import check_fields
from metalearn._utils.intervals import Estimate
from metalearn._utils.labels import Seen, known
from metalearn._utils.readable import described, readable
from metalearn._utils.trees import select, strong
from metalearn.algorithm import Algorithm
from metalearn.checkpoints.manager import Checkpoints
from metalearn.diagnostics import health, memory
from metalearn.diagnostics.probe import Look, look_at
from metalearn.diagnostics.symmetry import Measure
from metalearn.engines import MetaGradient, MixedFlow
from metalearn.engines.base import Streaming, check_eta
from metalearn.loggers import Logger
from metalearn.optimizers.updates import evaluation_params, start_outer, update_outer
from metalearn.sharding.layout import Layout, abstract
from metalearn.tasks import Tasks, WithConstants, check_tasks, fetched, label_range, needs_fetch
from metalearn.train_state import TrainState
from metalearn.training.evaluation import estimate, task_metrics
from metalearn.training.faults import WATCHED, Faults
from metalearn.training.fit import run
from metalearn.training.full_unroll import FullUnroll, step_metrics
from metalearn.training.outer_loop import Fit, OuterStep, Part
from metalearn.training.program import Program
from metalearn.training.segmented_unroll import Segment, SegmentedUnroll, spread, steps_taken
from metalearn.training.task_batch import TaskBatch
from metalearn.training.truncated_unroll import TruncatedUnroll, Truncation

EVALUATION = 2**32 - 1  # folded into the run's key; outer steps count up from 0


@readable
@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains the eta of any algorithm, with any engine and any optax optimizer.

    Args:
      algorithm: the meta-learning method: meta-parameters and inner loop.
      engine: differentiates the unroll.
      optimizer: the outer optimizer, of optax.
      tasks_per_step: tasks whose meta-gradients an outer step averages.
      chunk: tasks unrolled at once on a device; None: all of its share.
      truncation: truncated unrolls carried across outer steps; None: full unrolls.
      isolate: leave non-finite tasks out of the mean, as truncated unrolls always do.
      skip_nonfinite: leave eta unchanged by an outer step that is not finite.
      layout: the devices of a mesh to use; None: one device.
      segment: inner steps of one compiled program, for engines that stream (`Forward`). The run
        can be saved and stopped between two programs. None: an outer step is one program.
    """

    algorithm: Algorithm
    engine: MetaGradient = MixedFlow()
    optimizer: optax.GradientTransformation = described(optax.adam, 1e-3)
    tasks_per_step: int = 16
    chunk: int | None = None
    truncation: Truncation | None = None
    isolate: bool = False
    skip_nonfinite: bool = False
    layout: Layout | None = None
    segment: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self, "engine", "truncation")
        if not isinstance(self.engine, MetaGradient):
            raise TypeError(
                f"`Trainer(engine=)` takes an engine, such as `MixedFlow()`, not {self.engine!r}. "
                "Names are for configs."
            )
        if self.truncation is not None and not isinstance(self.truncation, Truncation):
            raise TypeError(
                f"`Trainer(truncation=)` takes `Truncation(steps)`, not {self.truncation!r}."
            )
        self.batch.check()
        self._check_segment()

    def _check_segment(self) -> None:
        if self.segment is None:
            return
        if not isinstance(self.engine, Streaming):
            raise ValueError(
                f"`Trainer(segment={self.segment})` cuts an outer step into programs, which takes "
                "an engine that saves no residuals of earlier inner steps: `Forward()`, not "
                f"`{type(self.engine).__name__}`."
            )
        if self.truncation is not None:
            raise ValueError(
                "`Trainer(segment=..., truncation=...)`: unrolls are full and take several "
                "programs, or they are truncated. Choose one."
            )

    @functools.cached_property
    def batch(self) -> TaskBatch:
        """The tasks of an outer step, over devices and in chunks."""
        return TaskBatch(self.tasks_per_step, self.chunk, self.layout)

    @functools.cached_property
    def unrolls(self) -> FullUnroll:
        """The unrolls of an outer step: full, truncated or segmented."""
        fields = self.algorithm, self.engine, self.batch, self.isolate
        if self.truncation is not None:
            return TruncatedUnroll(*fields, self.truncation)
        if self.segment is not None:
            return SegmentedUnroll(*fields, self.segment)
        return FullUnroll(*fields)

    def init(self, key: jax.Array, tasks: Tasks | None = None) -> TrainState:
        """Return the state before the first outer step.

        It includes the inner states that truncated unrolls carry, so `truncation` needs `tasks`.
        """
        if tasks is not None:
            check_tasks("Trainer.init(tasks=)", tasks)
        self._check_learned()
        if self.layout is None:
            return self._init(key, tasks, self.constants)
        where = self._shardings(jax.eval_shape(self._init, key, tasks))
        init = jax.jit(self._init, out_shardings=where)
        return init(key, self.place(tasks), self.constants)

    def shapes(self, tasks: Tasks | None = None) -> TrainState:
        """Return the shapes and shardings of a state; nothing is allocated."""
        shapes = jax.eval_shape(self._init, jax.eval_shape(lambda: jax.random.key(0)), tasks)
        return shapes if self.layout is None else abstract(shapes, self._shardings(shapes))

    @functools.cached_property
    def constants(self) -> Any:
        """The constants of the algorithm, on the devices: see `Algorithm.constants`."""
        with jax.ensure_compile_time_eval():
            return self.place(jax.tree.map(jnp.asarray, self.algorithm.constants()))

    def _compiled(self, function: Callable[..., Any], **options: Any) -> Any:
        """Return the compiled function (state or eta, tasks, ...), the constants an argument."""
        constants = self.constants
        if not jax.tree.leaves(constants):
            return jax.jit(function, **options)
        return Program(jax.jit(function, **options), constants)

    def _init(
        self, key: jax.Array, tasks: Tasks | None = None, constants: Any = None
    ) -> TrainState:
        init_key, run_key = jax.random.split(key)
        if jax.tree.leaves(constants):
            algorithm = self.algorithm
            eta = jax.jit(lambda arrays, key: algorithm.bind(arrays).init(key))(constants, init_key)
            tasks = None if tasks is None else WithConstants(tasks, constants)
        else:
            eta = jax.jit(self.algorithm.init)(init_key)
        check_eta(eta)
        eta = strong(eta)
        optimizer = strong(start_outer(self.optimizer, eta))
        state = TrainState(jnp.zeros((), jnp.int32), eta, optimizer, run_key)
        inner = self.unrolls.begin(eta, tasks, self.task_keys(state))
        return dataclasses.replace(state, inner=strong(inner))

    @functools.cached_property
    def step(self) -> Callable[[TrainState, Tasks], tuple[TrainState, dict[str, jax.Array]]]:
        """Take one outer step: (state, tasks) -> (state, metrics). Compiled.

        Metrics are means over the tasks of the step: `loss` (the outer loss), those of
        the algorithm, `inner_loss_first`, `inner_loss_last`, `inner_finite` (the share of
        inner gradients that were finite), `inner_steps_finite` (steps before a gradient, or a
        tangent of `Forward`, was not), `inner_update_norm` (of one step's change of theta) and
        `inner_tangent_norm` (the largest, in the end); and `meta_grad_norm`, `meta_update_norm`.
        The number of masked non-finite tasks is `tasks_left_out`, or `tasks_reset` in truncated
        training. `step_skipped` is 1 if `skip_nonfinite` left eta unchanged.
        """
        return self._compiled(self._step) if self.segment is None else self._in_parts

    def parts(self, tasks: Tasks) -> list[Part]:
        """Return the programs of an outer step, in their order: one, or one for each segment."""
        if not isinstance(self.unrolls, SegmentedUnroll):
            return [Part(self.step)]
        leaves, treedef = jax.tree.flatten(tasks)
        shapes = treedef, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        if shapes not in self._known_parts:
            self._known_parts[shapes] = self._cut(self.unrolls, tasks)
        return self._known_parts[shapes]

    @functools.cached_property
    def _known_parts(self) -> dict[Any, list[Part]]:
        return {}

    def _cut(self, unrolls: SegmentedUnroll, tasks: Tasks) -> list[Part]:
        state = self.shapes(tasks)
        return [
            Part(functools.partial(self._segment, segment=segment), steps)
            for steps, segment in unrolls.segments(state.eta, tasks, state.key).items()
        ]

    def partway(self, tasks: Tasks) -> TrainState | None:
        """Return the shapes of a state between two segments; None if there is one program."""
        parts = self.parts(tasks)
        if len(parts) == 1:
            return None
        state, _ = jax.eval_shape(parts[0].take, self.shapes(tasks), tasks)
        return state if self.layout is None else abstract(state, self._shardings(state))

    def parts_taken(self, state: TrainState) -> int:
        """Return how many programs of its outer step a state has completed."""
        steps = steps_taken(state.inner)
        if self.segment is None or not steps:
            return 0
        if steps % self.segment:
            raise ValueError(
                f"This state stands at inner step {steps} of an outer step, which is no number "
                f"of segments of {self.segment}. Go on with the `segment` that it was made with."
            )
        return steps // self.segment

    def _in_parts(self, state: TrainState, tasks: Tasks) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take an outer step, or the rest of one, program by program."""
        metrics: Any = None
        for part in self.parts(tasks)[self.parts_taken(state) :]:
            state, metrics = part.take(state, tasks)
        return state, metrics

    def _step(self, state: TrainState, tasks: Tasks) -> tuple[TrainState, dict[str, jax.Array]]:
        keys = self.task_keys(state)
        outputs = self.unrolls.mean_gradient(state.eta, tasks, keys, state.inner, state.step == 0)
        return self._updated(state, *outputs)

    @functools.cached_property
    def _segment(self) -> Callable[..., tuple[TrainState, Any]]:
        unrolls = self.unrolls
        assert isinstance(unrolls, SegmentedUnroll)

        def take(state: TrainState, tasks: Tasks, segment: Segment) -> tuple[TrainState, Any]:
            keys = self.task_keys(state)
            outputs, inner = unrolls.take(segment, state.eta, tasks, keys, state.inner)
            if outputs is None:
                return self._constrained(dataclasses.replace(state, inner=inner)), None
            grads, metrics = outputs
            return self._updated(state, grads, metrics, inner)

        return self._compiled(take, static_argnames="segment")

    def _updated(
        self, state: TrainState, grads: Any, metrics: dict[str, Any], inner: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Apply the outer optimizer to the meta-gradient of an outer step."""
        updates, optimizer = update_outer(
            self.optimizer, grads, state.optimizer, state.eta, metrics["loss"]
        )
        updates = jax.tree.map(lambda u: u * state.pace.astype(u.dtype), updates)
        eta = optax.apply_updates(state.eta, updates)
        metrics["meta_grad_norm"] = optax.tree.norm(grads)
        metrics["meta_update_norm"] = optax.tree.norm(updates)
        if self.skip_nonfinite:
            fine = jnp.stack([jnp.isfinite(metrics[name]) for name in WATCHED]).all()
            eta, optimizer = select(fine, (eta, optimizer), (state.eta, state.optimizer))
            metrics["step_skipped"] = ~fine
        after = TrainState(state.step + 1, eta, optimizer, state.key, inner, state.pace)
        return self._constrained(after), metrics

    def _constrained(self, state: TrainState) -> TrainState:
        if self.layout is None:
            return state
        return jax.lax.with_sharding_constraint(state, self._shardings(state))

    def _shardings(self, state: TrainState) -> Any:
        """Return the sharding of each leaf of a state."""
        assert self.layout is not None
        return spread(self.layout.shardings(state), self.engine)

    def task_keys(self, state: TrainState) -> jax.Array:
        """Return the keys [tasks_per_step] of the tasks of the outer step after `state`."""
        return self._keys(state.key, state.step)

    def _keys(self, key: jax.Array, step: Any) -> jax.Array:
        return jax.random.split(jax.random.fold_in(key, step), self.tasks_per_step)

    def fetch(self, tasks: Tasks, state: TrainState) -> Tasks:
        """Return the tasks of the outer step after `state`, for `step`, read from the host.

        Tasks on the device are returned unchanged. `fit` does the same in a thread.
        """
        first = int(state.step) * self.tasks_per_step if needs_fetch(tasks) else 0
        return self.place(fetched(tasks, self.task_keys(state), first))

    def task_gradient(
        self, eta: Any, tasks: Tasks, key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Return (meta-gradient like eta, metrics) of the one task that `key` draws."""
        check_tasks("Trainer.task_gradient(tasks=)", tasks)
        with known(label_range(tasks), self.labels_seen):
            (loss, aux), grads = self.unrolls.solve(eta, tasks, key)
        return grads, step_metrics(loss, aux)

    @functools.cached_property
    def labels_seen(self) -> Seen:
        """Losses and their numbers of outputs when traced; see `metalearn._utils.labels`."""
        return set()

    @functools.cached_property
    def look(self) -> Callable[..., Look]:
        """Examine one task, for a health check: (eta, tasks, key, zeros, steps). Compiled."""
        most = None if self.truncation is None else self.truncation.steps

        def look(eta: Any, tasks: Tasks, key: jax.Array, zeros: Any = 0, steps: Any = None):
            count = min((n for n in (steps, most) if n is not None), default=None)
            return look_at(self.unrolls.solve, eta, tasks, key, zeros, count)

        where = None if self.layout is None else self.layout.replicated
        return self._compiled(look, static_argnames="steps", out_shardings=where)

    @functools.cached_property
    def _probes(self) -> health.Probes:
        symmetry = Measure(self.algorithm, self.engine)
        return health.Probes(self.look, symmetry, self.task_keys, self.labels_seen)

    def check_health(self, state: TrainState, tasks: Tasks) -> health.Report:
        """Examine the first task of the outer step after `state`; see `diagnostics.health`."""
        return health.check(self._probes, state, tasks)

    def fit(
        self,
        tasks: Tasks,
        steps: int,
        *,
        key: jax.Array | None = None,
        state: TrainState | None = None,
        held_out: Tasks | None = None,
        eval_every: int | None = None,
        eval_tasks: int = 200,
        log_every: int = 10,
        check_every: int | None = None,
        faults: Faults = Faults(),
        asked_to_stop: Callable[[int], str | None] | None = None,
        progress: bool = True,
        loggers: Sequence[Logger] = (),
        checkpoints: Checkpoints | None = None,
    ) -> TrainState:
        """Train for `steps` outer steps, or from the newest checkpoint up to there.

        Args:
          tasks: the tasks to train on.
          steps: outer steps, counted from the beginning of the run.
          key: of the run: it draws the initial eta and all tasks.
          state: the state to start from, such as `init(key, tasks)`; `key` is then not needed,
            and not read. None: `init(key, tasks)`. A checkpoint takes precedence over both.
          held_out: validation tasks, evaluated during training; not those of the final test.
          eval_every: outer steps between evaluations; None or 0: never.
          eval_tasks: tasks of an evaluation, the same every time.
          log_every: outer steps between two rows of metrics; 0: never.
          check_every: outer steps between health checks, which give a `HealthWarning` for each
            thing found; None or 0: never.
          faults: the policy on non-finite outer steps and diverging inner loops.
          asked_to_stop: called after every outer step with its number: None, or why the run is to
            stop; it is then saved, and `Interrupted` raised. With `segment`: called after every
            segment, with the number of segments so far. See `metalearn.training.signals`.
          progress: show a progress bar with the rate and the loss.
          loggers: they get the metrics; left open for a final table (`logger.finish(table)`).
          checkpoints: where the run is saved, and resumed from.

        Returns:
          The state after the last outer step.

        Raises:
          NonFiniteError: if the outer loss or the meta-gradient is not finite, and `faults` says
            stop, or has skipped or backed off too often. Metrics up to then are logged.
          DivergedError: if inner loops diverge and `faults` says stop.
          Interrupted: if `asked_to_stop` returned a reason; the state is saved.
          ChangedConfigError: if the checkpoints are of another config.
        """
        check_tasks("Trainer.fit(tasks=)", tasks)
        if held_out is not None:
            check_tasks("Trainer.fit(held_out=)", held_out)
        if key is None and state is None:
            raise TypeError(
                "`Trainer.fit` needs `key`, of the run, or a `state` to start from: "
                "`fit(tasks, steps, key=jax.random.key(0))`."
            )
        if state is not None and not isinstance(state, TrainState):
            raise TypeError(
                f"`Trainer.fit(state=)` starts from a TrainState, such as `init(key, tasks)`, not "
                f"from a {type(state).__name__}."
            )
        fit = Fit(
            steps,
            held_out,
            eval_every,
            eval_tasks,
            log_every,
            check_every,
            faults,
            asked_to_stop,
            progress,
        )
        if checkpoints is not None and isinstance(tasks, Tasks) and not tasks.resumable:
            raise ValueError(
                "`Trainer.fit(checkpoints=)` resumes a run from its last checkpoint, but its "
                f"tasks are a `{type(tasks).__name__}` that cannot go back to the tasks of a step. "
                "Give the stream a `seek`, pass the episodes to `GivenTasks.create`, or train "
                "without `checkpoints`."
            )
        self.check_memory(tasks, () if held_out is None else (held_out,))
        tasks, held_out = self.place((tasks, held_out))
        skips = faults.nonfinite == "skip"
        trainer = dataclasses.replace(self, skip_nonfinite=True) if skips else self
        with known(label_range(tasks), trainer.labels_seen):
            if state is None:
                assert key is not None
                state = self.init(key, tasks)
            outer = trainer._outer_step(tasks, held_out, eval_tasks)
            return run(fit, outer, state, tasks, loggers, checkpoints)

    def _outer_step(self, tasks: Tasks, held_out: Tasks | None, eval_tasks: int) -> OuterStep:
        """Return the functions that the loop over outer steps calls."""

        def evaluate(state: TrainState) -> dict[str, Estimate]:
            assert held_out is not None
            key = jax.random.fold_in(state.key, EVALUATION)  # the same tasks at every evaluation
            return self.evaluate(self.learned(state), held_out, key, eval_tasks)

        return OuterStep(
            self.tasks_per_step,
            self.parts(tasks),
            self.parts_taken,
            lambda: self.partway(tasks),
            evaluate,
            lambda state: self.check_health(state, tasks),
            lambda state: health.diagnose(self._probes, state, tasks),
            self._fetched_at(tasks),
            self.place,
        )

    def _fetched_at(self, tasks: Tasks) -> Callable[[jax.Array, int], Tasks] | None:
        """Return a function: (key of the run, outer step) -> its tasks; None: they need no fetch.

        Truncated unrolls go on with the tasks of earlier steps, and read them inside the program.
        """
        if self.truncation is not None or not needs_fetch(tasks):
            return None
        keys, each = jax.jit(self._keys), self.tasks_per_step
        return lambda key, step: fetched(tasks, keys(key, step - 1), (step - 1) * each)

    def check_memory(self, tasks: Tasks, evaluated: Sequence[Tasks] = ()) -> None:
        """Raise ValueError if an outer step on tasks, or an evaluation, cannot fit a device.

        The need is a lower bound (`metalearn.diagnostics.memory`); nothing is allocated for it.
        """
        self._check_learned()
        cut = None if self.truncation is None else self.truncation.steps
        steps, at_once = cut or self.segment, self.batch.at_once
        memory.check_tasks(self.algorithm, tasks, at_once, steps)
        for each in evaluated:
            runs = self.algorithm.evaluation()
            memory.check_tasks(runs, each, at_once, None, "An evaluation")

    def _check_learned(self) -> None:
        devices = 1 if self.layout is None else self.layout.mesh.size
        memory.check_learned(self.algorithm, self.optimizer, devices)

    def place(self, tasks: Any) -> Any:
        """Return tasks with their arrays replicated on all devices of the layout."""
        return tasks if self.layout is None else self.layout.replicate(tasks)

    def restore(
        self, directory: str | os.PathLike[str], tasks: Tasks | None = None, *, best: bool = False
    ) -> TrainState:
        """Return the newest state that `fit(checkpoints=Checkpoints(directory))` has saved.

        A run of the command line is read with its algorithm and data by `metalearn.load_run`.

        Args:
          directory: of the checkpoints, or the workdir of a run, which has them in `checkpoints`.
          tasks: that were trained on; truncated unrolls and segments need them.
          best: the best checkpoint, of `Checkpoints(best=...)`; not the newest.

        Raises:
          ValueError: if there is no checkpoint.
          OtherArraysError: if the checkpoint is of another algorithm, model or outer optimizer.
        """
        path = pathlib.Path(directory)
        path = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if not path.is_dir():
            raise ValueError(f"`Trainer.restore` found no checkpoints in {directory}.")
        opened = Checkpoints(path)
        try:
            return opened.read(self.shapes(tasks), best)[0]
        finally:
            opened.close()

    def learned(self, state: TrainState) -> Any:
        """Return the eta of a state to evaluate and to export.

        This is `state.eta`, except for an outer optimizer that evaluates at another point than it
        trains at, such as `optax.contrib.schedule_free`; see `metalearn.optimizers.updates`.
        """
        return evaluation_params(state.optimizer, state.eta)

    def evaluate(
        self, eta: Any, tasks: Tasks, key: jax.Array, count: int = 1000
    ) -> dict[str, Estimate]:
        """Adapt to `count` tasks and return the mean of each metric with its 95% interval.

        The same key draws the same tasks. No meta-gradient is taken.
        """
        counts("evaluate", 1, tasks=count)
        check_tasks("Trainer.evaluate(tasks=)", tasks)
        tasks, devices = self.place(tasks), self.batch.devices
        chunk = devices * min(-(-count // devices), self.batch.at_once)
        with known(label_range(tasks), self.labels_seen):
            return estimate(
                lambda keys, first: self._evaluate(
                    eta, self.place(fetched(tasks, keys, first)), keys
                ),
                *(key, count, chunk),
            )

    @functools.cached_property
    def _evaluate(self) -> Callable[..., dict[str, jax.Array]]:
        algorithm, transform = self.algorithm.evaluation(), self.batch.transform
        each = None if self.layout is None else self.layout.each

        def on_tasks(shared: Any, keys: jax.Array) -> dict[str, jax.Array]:
            eta, tasks = shared
            return jax.vmap(
                lambda key: task_metrics(algorithm, eta, tasks, key, transform=transform)
            )(keys)

        def on_keys(eta: Any, tasks: Tasks, keys: jax.Array) -> dict[str, jax.Array]:
            shared = eta, tasks
            return on_tasks(shared, keys) if each is None else each(on_tasks, shared, keys)

        return self._compiled(on_keys)
