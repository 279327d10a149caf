"""FDS: learn the hyperparameter schedule of a training run by its exact hypergradient.

The inner loop trains a fresh model for T steps with an optimizer whose hyperparameters are
constant over windows (`metalearn.algorithms.fds.schedule`); the outer loss is the validation loss
of the last parameters,

    theta_{t+1} = Phi(theta_t, grad L_t(theta_t; eta_w(t)); eta_w(t))     t = 0 .. T-1
    F(eta)      = L_val(theta_T)

and eta, one value per window and hyperparameter, is learned over many theta_0, so the schedule is
not fitted to one initialisation. Each outer step draws a new theta_0 and a new validation split; at
the end the schedule is stretched over a run on all the data.

Greedy methods take the hypergradient of a single step and choose too small a learning rate (Wu et
al. 2018, arXiv:1803.02021). The exact hypergradient of a long run becomes usable once it is summed
over the steps that share a value.

Micaelli & Storkey 2021, "Gradient-based Hyperparameter Optimization Over Long Horizons"
(arXiv:2007.07869), by forward mode (Franceschi et al. 2017, arXiv:1703.01785). With a dozen
windows, nested reverse mode or mixed flow is the cheaper engine; see `metalearn plan`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn._utils.checks import Count, counts
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn._utils.trees import in_dtypes_of
from metalearn.algorithms.epochs import InEpochs, check_reads, read_rows
from metalearn.algorithms.fds.hyperparameter import Hyperparameter, check_required, place
from metalearn.algorithms.fds.outer_rules import fds_rule, in_ranges
from metalearn.algorithms.fds.pictures import draw_schedules, draw_tangents
from metalearn.algorithms.fds.schedule import (
    Schedule,
    edges,
    save_schedules,
    spread,
    stretched,
    window_of,
)
from metalearn.algorithms.objectives import cross_entropy
from metalearn.engines.inner_loop import depends
from metalearn.model import Model, no_model
from metalearn.optimizers.differentiable import differentiable_at_zero
from metalearn.optimizers.updates import (
    evaluate,
    evaluation_params,
    interpolations,
    start,
    update,
)
from metalearn.unroll import Batch, Episode, Eta, GradFn, Metrics, ModelTraining, Unroll

MOST_SHOWN = 16  # windows; the values of more are one metric, their mean


@readable
@dataclasses.dataclass(frozen=True)
class FDS(InEpochs):
    """Learn schedules of hyperparameters, by name. eta: {name: coordinates [N, ...]}.

    Support and query: (inputs [n, ...], targets [n], rows [m]), the whole dataset and the numbers
    of those rows that belong to the split. uint8 images are scaled to 0..1.

    Args:
      model: the network that is trained.
      hyperparameters: by name; a name is a numeric argument of `optimizer`, `objective` or
        `augment`. Arguments with a fixed value: `functools.partial(optax.adamw, eps=1e-6)`.
      inner_steps: T.
      batch: examples of an inner step.
      optimizer: **hyperparameters -> the inner optimizer, such as `optax.adamw`.
      objective: outputs, targets, **hyperparameters -> loss (), metrics. The outer loss has the
        default values of the hyperparameters.
      augment: inputs [batch, ...], key, **hyperparameters -> inputs; applied to inner batches only.
      eval_steps: inner steps of evaluation, over which schedules are stretched; None:
        `inner_steps`.
    """

    model: Model
    hyperparameters: Mapping[str, Hyperparameter] = dataclasses.field(hash=False)
    inner_steps: Count
    batch: Count
    optimizer: Callable[..., optax.GradientTransformation] = optax.sgd
    objective: Callable[..., tuple[jax.Array, Metrics]] = cross_entropy
    augment: Callable[..., jax.Array] | None = None
    eval_steps: Count | None = None
    export_name: ClassVar[str] = "schedules.json"

    def __post_init__(self) -> None:
        check_fields(self, "optimizer", absent=("model",))
        if not self.hyperparameters:
            raise ValueError("FDS learns hyperparameters, so it needs at least one of them.")
        if not callable(self.optimizer):
            raise TypeError(
                "`FDS(optimizer=)` takes what makes an optimizer from its hyperparameters, such as "
                "`optax.adamw`, not an optimizer. What stays fixed: "
                "`functools.partial(optax.adamw, learning_rate=1e-3)`."
            )
        check_reads("FDS", self.inner_steps, self.batch)
        places = self._places()
        for name, chosen in self.hyperparameters.items():
            windows = len(edges(chosen.windows, self.inner_steps)) - 1
            starts = np.size(chosen.start)
            if starts not in (1, windows):
                raise ValueError(
                    f"{name!r} in the {places[name]} has {windows} windows and {starts} "
                    "values to start from: give one for all, or one for each."
                )
        check_required(self.optimizer, self.hyperparameters)
        if self.eval_steps is not None and self.eval_steps < self.inner_steps:
            raise ValueError(
                f"A schedule is stretched over eval_steps={self.eval_steps} steps, which are "
                f"fewer than the {self.inner_steps} it is learned for. Take as many, or more."
            )

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Return the initial coordinates of the hyperparameters: {name: [N, ...]}."""
        del key
        return {name: self._start(name) for name in self.hyperparameters}

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training of a fresh model, drawn with `key`."""
        if self.model is None:  # an FDS without a model still turns an eta into schedules
            raise TypeError(no_model("FDS(model=None)", None))
        model_key, augment_key, noise_key = jax.random.split(key, 3)

        def init(eta: Eta) -> ModelTraining:
            params, statistics = self.model.init(model_key)
            values = self.values(eta, 0)
            slots = start(self._optimizer(values), params)
            if interpolations(slots):
                self._check_interpolations(values["optimizer"], params)
            return ModelTraining(params, slots, statistics)

        def step(eta: Eta, state: ModelTraining, batch: Batch, grad: GradFn) -> ModelTraining:
            number, rows = batch
            values = self.values(eta, number)
            inputs, targets = read_rows(episode.support, rows)
            if self.augment is not None:
                step_key = jax.random.fold_in(augment_key, number)
                inputs = self.augment(inputs, step_key, **values["augment"])

            def loss(params: Any, values: Any) -> tuple[jax.Array, Any]:
                dropout_key = jax.random.fold_in(noise_key, number)
                outputs, statistics = self.model.apply(
                    params, state.statistics, inputs, train=True, key=dropout_key
                )
                return self.objective(outputs, targets, **values)[0], statistics

            evaluated = evaluate(grad, loss, state.params, values["objective"])
            optimizer = differentiable_at_zero(self._optimizer(values))
            updates, slots = update(optimizer, evaluated, state.optimizer, state.params)
            # A learned hyperparameter may have another dtype than the slots it is added to.
            slots = in_dtypes_of(state.optimizer, slots)
            params = optax.apply_updates(state.params, updates)
            return ModelTraining(params, slots, evaluated.aux)

        def loss(eta: Eta, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            inputs, targets = read_rows(episode.query, episode.query[2])
            outputs = self.predict(*self.trained(eta, state), inputs, None)
            value, metrics = self.objective(outputs, targets)
            return value, {**metrics, **self._value_metrics(eta)}

        return Unroll(init, step, loss, begins=self._begins())

    def evaluation(self) -> FDS:
        """Return the same algorithm with every schedule stretched to `eval_steps` steps."""
        return self.stretched(self.eval_steps or self.inner_steps)

    def with_steps(self, steps: int) -> FDS:
        """Return the same algorithm with every schedule stretched to another number of steps."""
        return self.stretched(steps)

    def trained(self, eta: Eta, state: ModelTraining) -> tuple[Any, Any]:
        """Return (the parameters of the trained model, its running statistics)."""
        del eta
        return evaluation_params(state.optimizer, state.params), state.statistics

    def outer_optimizer(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Return the optimizer, kept within the ranges of the hyperparameters."""
        return in_ranges(optimizer, self.hyperparameters)

    def outer_rules(self) -> Mapping[str, Callable[..., optax.GradientTransformation]]:
        """Return the sign rule: {"fds_rule": see `metalearn.algorithms.fds_rule`}."""
        return {"fds_rule": self._sign_rule}

    def _sign_rule(
        self,
        share: float = 0.1,
        grow: float = 1.0,
        tolerance: float | None = 0.1,
        guarded: bool = True,
        clip: float | None = None,
        schedule: optax.Schedule | None = None,
        steps: int | None = None,
    ) -> optax.GradientTransformation:
        """Return `fds_rule`; that of arXiv:2007.07869 where it is not `guarded`.

        Args:
          share: see `fds_rule`, here and below where nothing else is said.
          grow: the factor of a step size when the sign stays the same.
          tolerance: how much the outer loss may rise before an update is reverted.
          guarded: whether updates may be reverted, and the last one is.
          clip: unset: signs have no norm to clip.
          schedule: number of the update -> factor of its steps.
          steps: the number of outer steps.
        """
        if clip is not None:
            raise ValueError("`fds_rule` takes signs, which no clip changes: leave `clip` unset.")
        if not guarded:
            tolerance = steps = None
        return fds_rule(self.hyperparameters, share, grow, tolerance, schedule, steps)

    def export(self, eta: Any, path: pathlib.Path) -> str:
        """Write the schedules, as `load_schedules` reads them."""
        save_schedules(path, self.schedules(eta))
        return f"the schedules of {', '.join(sorted(eta))}"

    def pictures(self) -> Mapping[str, Callable[..., Mapping[str, Any]]]:
        """Return "schedules" and "tangents": see `metalearn.algorithms.fds.pictures`."""

        def schedules(trainer: Any, state: Any, tasks: Any, workdir: pathlib.Path) -> Any:
            learned = self.schedules(trainer.learned(state))
            spaces = {name: chosen.space for name, chosen in self.hyperparameters.items()}
            return draw_schedules(workdir, spaces, learned)

        def tangents(trainer: Any, state: Any, tasks: Any, workdir: pathlib.Path) -> Any:
            begins = {name: self.edges(name)[:-1] for name in self.hyperparameters}
            return draw_tangents(trainer, state, tasks, workdir, begins)

        return {"schedules": schedules, "tangents": tangents}

    def stretched(self, inner_steps: int) -> FDS:
        """Return the same algorithm over `inner_steps` steps; an eta of this one fits it.

        Raises:
          ValueError: if a window would hold no step of the shorter run.
        """
        counts("FDS.stretched", 1, inner_steps=inner_steps)
        resized = {}
        for name, chosen in self.hyperparameters.items():
            windows = stretched(self._windows(name), inner_steps)
            if len({*windows}) < len(windows):
                raise ValueError(
                    f"The {len(windows) - 1} windows of {name!r} do not fit a run of {inner_steps} "
                    "steps: one of them would hold no step, and an eta has a value for it. Take a "
                    "longer run; or, for plain training, `schedules(eta)[name].stretched(steps)`."
                )
            resized[name] = dataclasses.replace(chosen, windows=windows)
        return dataclasses.replace(self, hyperparameters=resized, inner_steps=inner_steps)

    def unshared(self) -> FDS:
        """Return the same algorithm with a window for every step; `spread` converts its eta."""
        single = {
            name: dataclasses.replace(
                h, windows=self.inner_steps, start=tuple(np.repeat(self._starts(name), np.diff(e)))
            )
            for name, h in self.hyperparameters.items()
            for e in [self.edges(name)]
        }
        return dataclasses.replace(self, hyperparameters=single)

    def spread(self, eta: Eta) -> Eta:
        """Return the coordinates at every inner step, {name: [T, ...]}."""
        return {name: spread(x, self.edges(name)) for name, x in eta.items()}

    def edges(self, name: str) -> np.ndarray:
        """Return the edges of the windows of a hyperparameter, from 0 to T: [N + 1]."""
        return edges(self.hyperparameters[name].windows, self.inner_steps)

    def values(self, eta: Eta, step: jax.typing.ArrayLike) -> dict[str, dict[str, jax.Array]]:
        """Return the values at an inner step, by function: {"optimizer": {name: value}, ...}."""
        values: dict[str, dict[str, jax.Array]] = {"optimizer": {}, "objective": {}, "augment": {}}
        for name, function in self._places().items():
            self._check_windows(name, eta)
            x = eta[name][window_of(jnp.asarray(step), self.edges(name))]
            values[function][name] = self.hyperparameters[name].value(x)
        return values

    def schedules(self, eta: Eta) -> dict[str, Schedule]:
        """Return the learned schedules as functions of the step: {name: step -> value}."""
        schedules = {}
        for name, chosen in self.hyperparameters.items():
            self._check_windows(name, eta)
            values = np.asarray(chosen.value(eta[name]))
            schedules[name] = Schedule.of(self._windows(name), values)
        return schedules

    def _check_windows(self, name: str, eta: Eta) -> None:
        windows = len(self.edges(name)) - 1
        if len(eta[name]) != windows:
            raise ValueError(
                f"{name!r} has {windows} windows here, but {len(eta[name])} in eta. An eta goes "
                "with the windows it was learned for; `spread` turns it into that of `unshared()`."
            )

    def _check_interpolations(self, values: dict[str, jax.Array], params: Any) -> None:
        """Refuse a schedule for the b1 of schedule-free optimizers, which is one for a run.

        Their average, which is evaluated, is recovered with the b1 of the first step.
        """
        for name in values:
            if len(self.edges(name)) == 2:
                continue

            def b1(value: jax.Array, name: str = name) -> list[jax.Array]:
                optimizer = self.optimizer(**{**values, name: value})
                return interpolations(optimizer.init(params))

            if depends(b1, values[name]):
                raise ValueError(
                    f"{name!r} has several windows and sets the b1 of a schedule-free optimizer, "
                    "whose average is recovered with one b1 for the whole run. Learn one value: "
                    "`Hyperparameter(..., windows=1)`."
                )

    def _places(self) -> dict[str, str]:
        """Return which function has each hyperparameter as an argument, {name: "optimizer"}."""
        functions = {
            "optimizer": self.optimizer,
            "objective": self.objective,
            "augment": self.augment,
        }
        return place(self.hyperparameters, functions)

    def _windows(self, name: str) -> tuple[int, ...]:
        return tuple(self.edges(name).tolist())

    def _starts(self, name: str) -> np.ndarray:
        """Return the initial value of each window, [N]."""
        windows = len(self.edges(name)) - 1
        return np.broadcast_to(np.asarray(self.hyperparameters[name].start, float), windows)

    def _start(self, name: str) -> jax.Array:
        """Return the initial coordinates of a hyperparameter, [N, ...]."""
        chosen, starts = self.hyperparameters[name], jnp.asarray(self._starts(name))
        full = starts.reshape(-1, *[1] * len(chosen.shape))
        x = chosen.coordinate(jnp.broadcast_to(full, (len(starts), *chosen.shape)))
        return x.astype(jnp.result_type(float))

    def _begins(self) -> dict[str, np.ndarray]:
        """Return the first inner step that reads each entry of eta, {name: [N, ...]}."""
        begins = {}
        for name, chosen in self.hyperparameters.items():
            first = self.edges(name)[:-1].reshape(-1, *[1] * len(chosen.shape))
            begins[name] = np.broadcast_to(first, (len(first), *chosen.shape))
        return begins

    def _optimizer(self, values: Any) -> optax.GradientTransformation:
        return self.optimizer(**values["optimizer"])

    def _value_metrics(self, eta: Eta) -> Metrics:
        """Return the value in each window as metrics, "learning_rate/0"; of many, their mean."""
        metrics: Metrics = {}
        for name, chosen in self.hyperparameters.items():
            value = chosen.value(eta[name])
            if value.ndim == 1 and len(value) <= MOST_SHOWN:
                metrics |= {f"{name}/{i}": value[i] for i in range(len(value))}
            else:
                metrics[f"{name}/mean"] = value.mean()
        return metrics
