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
import numpy as np
import optax

from metalearn._utils.checks import counts
from metalearn._utils.compiling import quick_compilation
from metalearn._utils.fields import check_fields
from metalearn._utils.intervals import Estimate
from metalearn._utils.labels import Seen, known
from metalearn._utils.readable import described, readable
from metalearn._utils.trees import precise, select, strong
from metalearn.algorithm import Algorithm
from metalearn.checkpoints import record as run_record
from metalearn.checkpoints.manager import Checkpoints
from metalearn.diagnostics import health, memory
from metalearn.diagnostics.perturbed_runs import InnerRuns, PerturbedRuns
from metalearn.diagnostics.probe import Look, look_at
from metalearn.diagnostics.symmetry import Measure
from metalearn.engines import MetaGradient, MixedFlow, Reverse
from metalearn.engines.base import Backward, Streaming, check_eta
from metalearn.learner import check_key
from metalearn.loggers import Logger
from metalearn.optimizers.updates import evaluation_params, start_outer, update_outer
from metalearn.sharding.inner_run import check_rules
from metalearn.sharding.layout import Layout, abstract
from metalearn.tasks import (
    ALL_STEPS,
    AtOuterStep,
    Reads,
    Tasks,
    WithConstants,
    check_tasks,
    draw_task,
    fetched,
    label_range,
    needs_fetch,
)
from metalearn.train_state import TrainState
from metalearn.training import segment_programs
from metalearn.training.evaluation import (
    LEFT_OUT,
    advanced,
    estimate,
    segments_of,
    task_metrics,
)
from metalearn.training.faults import WATCHED, Faults
from metalearn.training.fit import run
from metalearn.training.full_unroll import FullUnroll, step_metrics
from metalearn.training.outer_loop import Fetch, Fit, OuterStep
from metalearn.training.prefetch import prefetching
from metalearn.training.program import Program
from metalearn.training.query_sets import QueryGradients
from metalearn.training.replay import Replay
from metalearn.training.replay_schedule import Position
from metalearn.training.segment_run import SegmentRun
from metalearn.training.segmented_runs import SegmentedRuns
from metalearn.training.segmented_unroll import SegmentedUnroll, spread
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
      chunk: tasks unrolled at once on a device; None: all of its share, but on a CPU one after the
        other where all of them would outgrow its cache, which takes a half to a third of the time
        and the memory of one (`metalearn.sharding.batched_means`).
      truncation: truncated unrolls carried across outer steps; None: full unrolls.
      isolate: leave non-finite tasks out of the mean, as truncated unrolls always do; those of an
        evaluation too. They are counted (`tasks_left_out`).
      skip_nonfinite: leave eta unchanged by an outer step that is not finite.
      layout: the devices of a mesh to use; None: one device.
      segment: K, inner steps of one compiled program: an outer step is then many programs, which
        can be watched, saved and stopped between any two. Memory on the device does not grow with
        the number of segments, only that of the states kept for the backward pass (`replay`). For
        `Reverse`, `MixedFlow` and `Forward`. "auto": about sqrt(T). None: one program.
      replay: with a `segment`: where states between segments are kept for the backward pass.
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
    segment: int | str | None = None
    replay: Replay = Replay()

    def __post_init__(self) -> None:
        check_fields(self, "engine", "truncation", "segment")
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
            if self.replay != Replay():
                raise ValueError(
                    f"`Trainer(replay={self.replay!r})` says where states between segments are "
                    "kept, but an outer step is one program. Set `segment` too, or leave both."
                )
            return
        if self.segment != "auto":
            counts("Trainer", 1, segment=self.segment)
        if self.algorithm.anneals:
            raise ValueError(
                f"`Trainer(segment={self.segment})` cuts an outer step into programs, which do not "
                f"know its number, and `{type(self.algorithm).__name__}` anneals its outer loss "
                "over the outer steps. Leave `segment`."
            )
        if not isinstance(self.engine, Streaming | Backward):
            raise ValueError(
                f"`Trainer(segment={self.segment})` cuts an outer step into programs that run and "
                f"differentiate a few inner steps each. `{type(self.engine).__name__}` does not "
                "differentiate them: it estimates from the losses of inner runs that are taken "
                "whole, or truncated, or differentiates the end of one. Leave `segment`, use "
                "`Trainer(truncation=Truncation(steps))`, or an engine that is cut: "
                "`MixedFlow()`, `Reverse()` or `Forward()`."
            )
        if isinstance(self.engine, Streaming) and self.replay != Replay():
            raise ValueError(
                f"`Trainer(replay={self.replay!r})` says where states between segments are kept "
                f"for a backward pass, and `{type(self.engine).__name__}` has none. Leave `replay`."
            )
        if self.truncation is not None:
            raise ValueError(
                "`Trainer(segment=..., truncation=...)`: unrolls are full and take several "
                "programs, or they are truncated. Choose one."
            )

    @functools.cached_property
    def batch(self) -> TaskBatch:
        """The tasks of an outer step, over devices and in chunks."""
        chunk = self.chunk
        if chunk is None and self.segment is not None:
            chunk = self.tasks_per_step  # what segments keep depends on it
        return TaskBatch(self.tasks_per_step, chunk, self.layout)

    @functools.cached_property
    def unrolls(self) -> FullUnroll:
        """The unrolls of an outer step: full, truncated or segmented."""
        fields = self.algorithm, self.engine, self.batch, self.isolate
        if self.truncation is not None:
            return TruncatedUnroll(*fields, self.truncation)
        if self.segment is not None:
            all_at_once = self.batch.at_once == self.batch.share
            gradients = all_at_once or self.replay.keeps_gradients
            return SegmentedUnroll(*fields, self.segment, gradients)
        return FullUnroll(*fields)

    def init(self, key: jax.Array, tasks: Tasks | None = None) -> TrainState:
        """Return the state before the first outer step.

        It includes the inner states that truncated unrolls carry, so `truncation` needs `tasks`.
        """
        check_key("Trainer.init(key=)", key)
        if tasks is not None:
            check_tasks("Trainer.init(tasks=)", tasks)
        self._check_learned()
        if self.layout is None:
            return self._init(key, tasks, self.constants)
        self._check_rules(tasks)
        where = self._shardings(jax.eval_shape(self._init, key, tasks))
        init = jax.jit(self._init, out_shardings=where)
        return init(key, self.place(tasks), self.constants)

    def shapes(
        self, tasks: Tasks | None = None, *, carried: bool = True, key: Any = None
    ) -> TrainState:
        """Return the shapes and shardings of a state; nothing is allocated.

        Args:
          tasks: that are trained on; truncated unrolls need them.
          carried: with the inner states that truncated unrolls carry. False: `inner` is `()`, and
            no tasks are needed.
          key: (), of the run, or its shape; None: like `jax.random.key(0)`.
        """
        self._check_rules(tasks)
        init = self._init if carried else self._without_carried
        key = jax.eval_shape(lambda: jax.random.key(0)) if key is None else key
        shapes = jax.eval_shape(init, key, tasks)
        return shapes if self.layout is None else abstract(shapes, self._shardings(shapes))

    def _check_rules(self, tasks: Tasks | None) -> None:
        """Raise ValueError for a rule of the layout that shards nothing, where tasks are known."""
        if self.layout is None or not self.layout.rules or tasks is None:
            return

        def states(key: jax.Array, tasks: Tasks) -> tuple[Any, Any]:
            eta = self.algorithm.init(key)
            return eta, draw_task(self.algorithm, tasks, key).unroll.init(eta)

        eta, inner = jax.eval_shape(states, jax.eval_shape(lambda: jax.random.key(0)), tasks)
        outer = jax.eval_shape(functools.partial(start_outer, self.optimizer), eta)
        names = "eta", "the outer optimizer's state", "the inner state"
        check_rules(self.layout, dict(zip(names, (eta, outer, inner), strict=True)))

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
        state = self._without_carried(key, tasks, constants)
        if tasks is not None and jax.tree.leaves(constants):
            tasks = WithConstants(tasks, constants)
        inner = self.unrolls.begin(state.eta, tasks, self.task_keys(state))
        return dataclasses.replace(state, inner=strong(inner))

    def _without_carried(
        self, key: jax.Array, tasks: Tasks | None = None, constants: Any = None
    ) -> TrainState:
        """Return an initial state without the inner states that truncated unrolls carry."""
        del tasks
        init_key, run_key = jax.random.split(key)
        if jax.tree.leaves(constants):
            algorithm = self.algorithm
            eta = jax.jit(lambda arrays, key: algorithm.bind(arrays).init(key))(constants, init_key)
        else:
            eta = jax.jit(self.algorithm.init)(init_key)
        check_eta(eta)
        eta = strong(eta)
        optimizer = strong(start_outer(self.optimizer, eta))
        return TrainState(jnp.zeros((), jnp.int32), eta, optimizer, run_key)

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
        return self._compiled(self._step) if self.segment is None else self._step_in_segments

    def segments(
        self,
        tasks: Tasks,
        folder: str | os.PathLike[str] | None = None,
        key: jax.Array | None = None,
    ) -> SegmentRun | None:
        """Return the programs of an outer step that is cut into segments; None: it is one program.

        Args:
          tasks: as for `step`, or their shapes.
          folder: for states that are kept on disk; None: that of `replay`, or a temporary one.
          key: (), of the run, or its shape; None: like `jax.random.key(0)`.
        """
        if not isinstance(self.unrolls, SegmentedUnroll):
            return None
        leaves, treedef = jax.tree.flatten(tasks)
        shapes = treedef, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        of_key = None if key is None else (key.shape, key.dtype)
        known = shapes, folder, of_key, bool(jax.config.read("jax_enable_x64"))
        if known not in self._known_segments:
            self._known_segments[known] = self._segmented(self.unrolls, tasks, folder, key)
        return self._known_segments[known]

    @functools.cached_property
    def _known_segments(self) -> dict[Any, SegmentRun]:
        return {}

    def _segmented(
        self,
        unrolls: SegmentedUnroll,
        tasks: Tasks,
        folder: str | os.PathLike[str] | None,
        key: jax.Array | None,
    ) -> SegmentRun:
        shapes = self.shapes(tasks, key=key)
        segments = unrolls.segments(shapes.eta, tasks, shapes.key)

        def partway(position: Position, gradients: bool = False) -> TrainState:
            shared = shapes.eta, tasks, shapes.key, shapes.step
            state = segment_programs.shapes(
                self._programs, shapes, shared, segments, position, gradients
            )
            return state if self.layout is None else abstract(state, self._shardings(state))

        path = None if folder is None else pathlib.Path(folder)
        return SegmentRun(segments, self._programs, self.replay, partway, path)

    @functools.cached_property
    def _programs(self) -> segment_programs.Programs:
        unrolls = self.unrolls
        assert isinstance(unrolls, SegmentedUnroll)

        def updated(state: TrainState, grads: Any, metrics: Any) -> Any:
            return self._updated(state, grads, metrics, ())

        hooks = segment_programs.Hooks(self._compiled, self._keys, self._constrained, updated)
        return segment_programs.compiled(unrolls, hooks)

    def _step_in_segments(
        self, state: TrainState, tasks: Tasks
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take an outer step, or the rest of one, program by program."""
        if isinstance(state.key, jax.core.Tracer):
            raise TypeError(
                "An outer step in segments is several programs, which the host runs one after "
                "another: it can be no part of a program of yours (`jit`, `vmap`, `eval_shape`). "
                "Call `trainer.step` outside, or make the trainer without `segment`."
            )
        segments, metrics = self.segments(tasks, key=state.key), None
        assert segments is not None
        if needs_fetch(tasks) and not tasks.reads_steps:
            tasks = self.fetch(tasks, state)  # once, for all programs
        while metrics is None:
            now = functools.partial(self._fetched, tasks, state)
            state, metrics = segments.take_reading(state, now)
        return state, metrics

    @functools.cached_property
    def gradient(self) -> Callable[[TrainState, Tasks], tuple[Any, dict[str, jax.Array]]]:
        """Return the meta-gradient of the next outer step: (state, tasks) -> (grads, metrics).

        Compiled. It is what `step` passes to the outer optimizer, with the metrics of its tasks.
        """

        def gradient(state: TrainState, tasks: Tasks) -> tuple[Any, dict[str, jax.Array]]:
            grads, metrics, _ = self._mean_gradient(state, tasks)
            return grads, metrics

        return self._compiled(gradient)

    def _mean_gradient(
        self, state: TrainState, tasks: Tasks
    ) -> tuple[Any, dict[str, jax.Array], Any]:
        """Return (meta-gradient, metrics, inner states) of the outer step after `state`."""
        keys = self.task_keys(state)
        if self.algorithm.anneals:
            tasks = AtOuterStep(tasks, state.step)
        return self.unrolls.mean_gradient(state.eta, tasks, keys, state.inner, state.step == 0)

    def _step(self, state: TrainState, tasks: Tasks) -> tuple[TrainState, dict[str, jax.Array]]:
        return self._updated(state, *self._mean_gradient(state, tasks))

    def _updated(
        self, state: TrainState, grads: Any, metrics: dict[str, Any], inner: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Apply the outer optimizer to the meta-gradient of an outer step."""
        updates, optimizer = update_outer(
            self.optimizer, grads, state.optimizer, state.eta, metrics["loss"]
        )
        updates = jax.tree.map(lambda u: u * state.pace.astype(u.dtype), updates)
        eta = optax.apply_updates(state.eta, updates)
        metrics["meta_grad_norm"] = optax.tree.norm(jax.tree.map(precise, grads))
        metrics["meta_update_norm"] = optax.tree.norm(jax.tree.map(precise, updates))
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
        return spread(self.layout.shardings(state), self.engine, state.inner)

    def task_keys(self, state: TrainState) -> jax.Array:
        """Return the keys [tasks_per_step] of the tasks of the outer step after `state`."""
        return self._keys(state.key, state.step)

    def _keys(self, key: jax.Array, step: Any) -> jax.Array:
        return jax.random.split(jax.random.fold_in(key, step), self.tasks_per_step)

    def fetch(self, tasks: Tasks, state: TrainState) -> Tasks:
        """Return the tasks of the outer step after `state`, for `step`, read from the host.

        Tasks on the device are returned unchanged. `fit` does the same in a thread. Of training
        runs all inner steps are read that the outer step takes. In truncated training other tasks
        are returned unchanged too: unrolls that go on draw theirs within the program.
        """
        return self._fetched(tasks, state, ALL_STEPS)

    def _fetched(self, tasks: Tasks, state: TrainState, reads: Reads) -> Tasks:
        if not self._fetches(tasks):
            return tasks
        keys, first = self.task_keys(state), int(state.step) * self.tasks_per_step
        if self.truncation is not None:
            _, keys, start = self._next_steps(state.inner, keys)
            reads = Reads(np.asarray(start), self.truncation.steps)
        return self.place(fetched(tasks, keys, first, self.algorithm, reads))

    def _fetches(self, tasks: Tasks) -> bool:
        """Return whether the host reads what an outer step takes of tasks, before its program.

        Truncated unrolls go on with the tasks of earlier steps. Of training runs the next K steps
        are read, once it is known which runs go on; other tasks are read inside the program.
        """
        return needs_fetch(tasks) and (self.truncation is None or tasks.reads_steps)

    @functools.cached_property
    def _next_steps(self) -> Callable[..., Any]:
        """Return (whether it is over, key, first step) of each truncated unroll: see its class."""
        unrolls = self.unrolls
        assert isinstance(unrolls, TruncatedUnroll)
        where = None if self.layout is None else self.layout.replicated
        return jax.jit(jax.vmap(unrolls.next_steps), out_shardings=where)

    def _fetched_first(self, tasks: Tasks, state: TrainState, steps: int | None) -> Tasks:
        """Return the tasks of the outer step after `state`, with their first inner steps."""
        if not self._fetches(tasks):
            return tasks
        keys, first = self.task_keys(state), int(state.step) * self.tasks_per_step
        reads = Reads(0, self._most_steps(steps, state.eta, tasks, keys[0]))
        return self.place(fetched(tasks, keys, first, self.algorithm, reads))

    def _most_steps(self, steps: int | None, eta: Any, tasks: Tasks, key: jax.Array) -> int | None:
        """Return `steps`, or those that one program differentiates if they are fewer; None: all."""
        most = None if self.truncation is None else self.truncation.steps
        if not self._is_whole:
            assert isinstance(self.unrolls, SegmentedUnroll)
            # One program could not hold the residuals of all steps.
            most = self.unrolls.segments(eta, tasks, key).length
        return min((n for n in (steps, most) if n is not None), default=None)

    def task_gradient(
        self, eta: Any, tasks: Tasks, key: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Return (meta-gradient like eta, metrics) of the one task that `key` draws."""
        check_tasks("Trainer.task_gradient(tasks=)", tasks)
        with known(label_range(tasks), self.labels_seen):
            (loss, aux), grads = self.unrolls.solve(eta, tasks, key)
        return grads, step_metrics(loss, aux)

    @functools.cached_property
    def query_gradients(self) -> QueryGradients:
        """Return the meta-gradients of one task's outer losses on several query sets. Compiled.

        (eta, tasks, key, queries) -> (grads, leaves [Q, ...], metrics [Q]); the queries are stacked
        in place of `Episode.query`, leaves [Q, ...]. The inner loop runs once, in segments where
        the trainer cuts it. See `metalearn.training.query_sets`.

        Raises:
          ValueError: for truncated unrolls, and for devices of a mesh.
        """
        for name, value in (("truncation", self.truncation), ("layout", self.layout)):
            if value is not None:
                raise ValueError(
                    f"`Trainer.query_gradients` differentiates one full inner run on one device, "
                    f"and this trainer has {name}={value!r:.80}. Make one without `{name}`; a run "
                    "of any length fits with `segment`."
                )
        fields = self.algorithm, self.engine, self.segment, self.replay
        return QueryGradients(*fields, self._compiled)

    def perturbed_runs(
        self, state: TrainState, tasks: Tasks, key: jax.Array | None = None
    ) -> InnerRuns:
        """Return the inner run of one task as a function of eta, in segments where they are cut.

        `metalearn.diagnostics.smoothness` measures it.

        Args:
          state: where eta is, before an outer step.
          tasks: that are trained on.
          key: (), draws the task; None: the first task of that outer step.
        """
        if self.segment is None:
            return PerturbedRuns.create(self, state, tasks, key)
        return SegmentedRuns.create(self, state, tasks, key)

    @functools.cached_property
    def labels_seen(self) -> Seen:
        """Losses and their numbers of outputs when traced; see `metalearn._utils.labels`."""
        return set()

    @functools.cached_property
    def look(self) -> Callable[..., Look]:
        """Examine one task, for a health check: (eta, tasks, key, zeros, steps). Compiled."""
        return self._look()

    def _look(self, **options: Any) -> Callable[..., Look]:
        def look(eta: Any, tasks: Tasks, key: jax.Array, zeros: Any = 0, steps: Any = None):
            count = self._most_steps(steps, eta, tasks, key)
            return look_at(self.unrolls.solve, eta, tasks, key, zeros, count)

        where = None if self.layout is None else self.layout.replicated
        return self._compiled(look, static_argnames="steps", out_shardings=where, **options)

    @functools.cached_property
    def _probes(self) -> health.Probes:
        symmetry = Measure(self.algorithm, self.engine)
        return health.Probes(
            self.look,
            self._look(compiler_options=quick_compilation()),
            symmetry,
            self.task_keys,
            self._fetched_first,
            self._difference if isinstance(self.engine, MixedFlow) else None,
            self.labels_seen,
            self.truncation is None and self._is_whole,
        )

    def _difference(self, eta: Any, tasks: Tasks, key: jax.Array) -> float:
        """Return the relative difference of a task's meta-gradient from that of `Reverse`.

        Over the first steps, as in a health check. Compiles two programs.
        """
        others = dataclasses.replace(self, engine=Reverse())
        count = self._most_steps(health.STEPS, eta, tasks, key)

        def gradients(trainer: Trainer) -> Any:
            def solve(eta: Any, tasks: Tasks, key: jax.Array) -> Any:
                return trainer.unrolls.solve(eta, tasks, key, lambda unroll: unroll, count)[1]

            options = quick_compilation()
            return trainer._compiled(solve, compiler_options=options)(eta, tasks, key)

        ours, exact = gradients(self), gradients(others)
        norm = optax.tree.norm(exact)
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, ours, exact))
        return float(jnp.where(norm > 0, difference / norm, difference))

    @property
    def _is_whole(self) -> bool:
        """Whether one program differentiates all inner steps."""
        return not (isinstance(self.unrolls, SegmentedUnroll) and self.unrolls.has_backward_pass)

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
            program, with the number of programs so far, of those that were planned: while more are
            run because states were lost, it stands still. See `metalearn.training.signals`.
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
        if key is not None:
            check_key("Trainer.fit(key=)", key)
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
            folder = None if checkpoints is None else checkpoints.directory / "states"
            if checkpoints is not None and checkpoints.best and held_out is not None and eval_every:
                checkpoints.check_best(trainer._evaluated(state, held_out))
            outer = trainer._outer_step(tasks, held_out, eval_tasks, folder, state.key)
            return run(fit, outer, state, tasks, loggers, checkpoints)

    def _outer_step(
        self,
        tasks: Tasks,
        held_out: Tasks | None,
        eval_tasks: int,
        folder: pathlib.Path | None,
        key: jax.Array,
    ) -> OuterStep:
        """Return the functions that the loop over outer steps calls."""

        def evaluate(state: TrainState) -> dict[str, Estimate]:
            assert held_out is not None
            key = jax.random.fold_in(state.key, EVALUATION)  # the same tasks at every evaluation
            return self.evaluate(self.learned(state), held_out, key, eval_tasks)

        return OuterStep(
            self.tasks_per_step,
            self.step,
            self.segments(tasks, folder, key),
            evaluate,
            lambda state: self.check_health(state, tasks),
            lambda state: health.diagnose(self._probes, state, tasks),
            self.engine.doubts,
            self._fetch(tasks),
        )

    def _fetch(self, tasks: Tasks) -> Fetch | None:
        """Return how the tasks of outer steps are read on the host; None: they are not."""
        if not self._fetches(tasks):
            return None
        keys, each = jax.jit(self._keys), self.tasks_per_step

        def ahead(key: jax.Array, step: int, reads: Reads) -> Tasks:
            drawn = keys(key, step - 1)
            return fetched(tasks, drawn, (step - 1) * each, self.algorithm, reads)

        def now(state: TrainState, reads: Reads) -> Tasks:
            return self._fetched(tasks, state, reads)

        known = self.truncation is None
        return Fetch(ahead if known else None, now, self.place, tasks.reads_steps)

    def check_memory(self, tasks: Tasks, evaluated: Sequence[Tasks] = ()) -> None:
        """Raise ValueError if an outer step on tasks, or an evaluation, cannot fit a device.

        The need is a lower bound (`metalearn.diagnostics.memory`); nothing is allocated for it.
        """
        self._check_learned()
        cut = None if self.truncation is None else self.truncation.steps
        least = 1 if self.segment == "auto" else self.segment  # steps whose batches are in memory
        steps = cut or (None if least is None else int(least))
        at_once, share = self.batch.at_once, 1 if self.layout is None else self.layout.inner
        memory.check_tasks(self.algorithm, tasks, at_once, steps, devices=share)
        for each in evaluated:
            runs = self.algorithm.evaluation()
            memory.check_tasks(runs, each, at_once, None, "An evaluation", share)

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
          tasks: that were trained on. Truncated unrolls are resumed with them alone: without, the
            inner states that they carry are not read, and `inner` of the state is `()`.
          best: the best checkpoint, of `Checkpoints(best=...)`; not the newest.

        Raises:
          ValueError: if there is no checkpoint.
          OtherArraysError: if the checkpoint is of another algorithm, model or outer optimizer.
        """
        path = pathlib.Path(directory)
        path = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if not path.is_dir():
            raise ValueError(f"`Trainer.restore` found no checkpoints in {directory}.")
        opened = Checkpoints.of_run(path)
        try:
            carried, record = tasks is not None, opened.record()
            key = None if record is None else run_record.key_of(record)
            return opened.read(self.shapes(tasks, carried=carried, key=key), best, carried)[0]
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

        A task whose inner loop diverges is not finite. One such task makes the means NaN; a line
        names the first, and `tasks_not_finite` counts them. With `isolate` they are left out of the
        means, and counted in `tasks_left_out`.
        """
        counts("evaluate", 1, tasks=count)
        check_tasks("Trainer.evaluate(tasks=)", tasks)
        check_key("Trainer.evaluate(key=)", key)
        tasks, devices = self.place(tasks), self.batch.devices
        chunk = devices * min(-(-count // devices), self.batch.at_once)
        algorithm = self._evaluation
        segments = segments_of(algorithm, tasks, chunk)

        def metrics_of(keys: jax.Array, first: int) -> dict[str, jax.Array]:
            if len(segments) == 1:
                read = fetched(tasks, keys[:count], first, algorithm)  # others are the same again
                return self._evaluate(eta, self.place(read), keys)
            return self._in_segments(eta, tasks, keys, segments)

        with known(label_range(tasks), self.labels_seen):
            return estimate(metrics_of, key, count, chunk, self.isolate)

    def _evaluated(self, state: TrainState, tasks: Tasks) -> set[str]:
        """Return the names of the metrics that an evaluation logs; nothing is computed."""
        algorithm = self._evaluation  # made outside of the trace, for it may compute

        def metrics(state: TrainState, tasks: Tasks) -> dict[str, jax.Array]:
            return task_metrics(algorithm, self.learned(state), tasks, state.key)

        names = jax.eval_shape(metrics, state, tasks).keys()
        return {f"eval/{name}" for name in (*names, *([LEFT_OUT] if self.isolate else []))}

    @functools.cached_property
    def _evaluation(self) -> Algorithm:
        return self.algorithm.evaluation()

    @functools.cached_property
    def _evaluate(self) -> Callable[..., dict[str, jax.Array]]:
        algorithm, layout = self._evaluation, self.batch.inner_layout

        def on_tasks(shared: Any, keys: jax.Array) -> dict[str, jax.Array]:
            eta, tasks = shared
            return jax.vmap(lambda key: task_metrics(algorithm, eta, tasks, key, layout=layout))(
                keys
            )

        def on_keys(eta: Any, tasks: Tasks, keys: jax.Array) -> dict[str, jax.Array]:
            return self._over_devices(on_tasks, (eta, tasks), keys)

        return self._compiled(on_keys)

    def _in_segments(
        self, eta: Any, tasks: Tasks, keys: jax.Array, segments: Sequence[Reads]
    ) -> dict[str, jax.Array]:
        """Return the metrics of training runs on the host, whose steps are read by segments."""

        def read(number: int) -> Tasks:
            return fetched(tasks, keys, 0, self._evaluation, segments[number])

        outputs: Any = ()  # inner states; of the last segment metrics
        with prefetching(read, len(segments) - 1) as tasks_of:
            for number, segment in enumerate(segments):
                read_tasks = self.place(tasks_of(number))
                jax.block_until_ready(outputs)  # or the rows of all segments would wait in memory
                outputs = self._evaluate_segment(
                    *(eta, read_tasks, (keys, outputs), np.int32(segment.start)),
                    segment=segment._replace(start=min(number, 1)),
                )
        return outputs

    @functools.cached_property
    def _evaluate_segment(self) -> Callable[..., Any]:
        algorithm, layout = self._evaluation, self.batch.inner_layout

        def take(eta: Any, tasks: Tasks, runs: Any, start: jax.Array, segment: Reads) -> Any:
            def on_runs(shared: Any, runs: Any) -> Any:
                return jax.vmap(lambda run: advanced(algorithm, segment, layout, shared, run))(runs)

            return self._over_devices(on_runs, (eta, tasks, start), runs)

        return self._compiled(take, static_argnames="segment")

    def _over_devices(self, function: Callable[[Any, Any], Any], shared: Any, inputs: Any) -> Any:
        """Return function(shared, inputs [n, ...]), computed by all devices of the layout."""
        if self.layout is None:
            return function(shared, inputs)
        return self.layout.each(function, shared, inputs)
