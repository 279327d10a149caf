"""FDS: learn the hyperparameter schedule of a training run by its exact hypergradient.

The inner loop trains a fresh model for T steps with an optimizer whose hyperparameters are
constant over windows (`metalearn.algorithms.fds.schedule`); the outer loss is the validation loss
of where it ends,

    theta_{t+1} = Phi(theta_t, grad L_t(theta_t; eta_w(t)); eta_w(t))     t = 0 .. T-1
    F(eta)      = L_val(theta_T)

and eta, one value per window and hyperparameter, is the same for every fresh start: what is
learned is not tied to one run. Each outer step draws a new theta_0 and a new validation
split; at the end the schedule is stretched over a run on all the data.

Greedy methods look one step ahead and choose too small a learning rate (Wu et al. 2018,
arXiv:1803.02021). Sharing is what makes the exact hypergradient of a long run usable.

Micaelli & Storkey 2021, "Gradient-based Hyperparameter Optimization Over Long Horizons"
(arXiv:2007.07869), by forward mode (Franceschi et al. 2017, arXiv:1703.01785). With a dozen
windows, nested reverse mode or mixed flow is the cheaper engine; see `metalearn plan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn._utils.checks import Count, counts
from metalearn._utils.fields import check_fields
from metalearn._utils.trees import in_dtypes_of
from metalearn.algorithm import Algorithm
from metalearn.algorithms.epochs import check_reads, epochs, read
from metalearn.algorithms.fds.hyperparameter import Hyperparameter, check_required, place
from metalearn.algorithms.fds.schedule import Schedule, edges, spread, stretched, window_of
from metalearn.algorithms.objectives import cross_entropy
from metalearn.model import Model, no_model
from metalearn.optimizers.differentiable import differentiable_at_zero
from metalearn.optimizers.updates import evaluate, evaluation_params, start, update
from metalearn.unroll import Episode, ModelTraining, Unroll

SHOWN = 16  # windows of a hyperparameter up to which each is a metric of its own


@dataclasses.dataclass(frozen=True)
class FDS(Algorithm):
    """Learn schedules of hyperparameters, by name. eta: {name: coordinates [N, ...]}.

    A name is an argument of `optimizer`, of `objective` or of `augment` that a number can be
    passed for. Arguments that stay as they are: `functools.partial(optax.adamw, eps=1e-6)`.

    Support and query: (inputs [n, ...], targets [n], rows [m]), the data and those rows of it
    that belong to the split. Images of uint8 are read as 0..1; nothing else is rescaled.
    """

    model: Model
    hyperparameters: Mapping[str, Hyperparameter] = dataclasses.field(hash=False)
    inner_steps: Count  # T
    batch: Count
    # From hyperparameters to the inner optimizer, such as `optax.adamw`.
    optimizer: Callable[..., optax.GradientTransformation] = optax.sgd
    # outputs, targets, **hyperparameters -> loss (), metrics. The outer loss is its default.
    objective: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] = cross_entropy
    # inputs [batch, ...], key, **hyperparameters -> inputs. For inner batches alone.
    augment: Callable[..., jax.Array] | None = None
    eval_steps: Count | None = None  # the schedule is stretched over so many; None: `inner_steps`

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
            found = edges(chosen.windows, self.inner_steps)
            starts = np.size(chosen.start)
            if starts not in (1, len(found) - 1):
                raise ValueError(
                    f"{name!r} in the {places[name]} has {len(found) - 1} windows and {starts} "
                    "values to start from: give one for all, or one for each."
                )
        check_required(self.optimizer, self.hyperparameters)
        if self.eval_steps is not None and self.eval_steps < self.inner_steps:
            raise ValueError(
                f"A schedule is stretched over eval_steps={self.eval_steps} steps, which are "
                f"fewer than the {self.inner_steps} it is learned for. Take as many, or more."
            )

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Return the coordinates that the hyperparameters start from: {name: [N, ...]}."""
        del key
        return {name: self._start(name) for name in self.hyperparameters}

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training of a fresh model, drawn with `key`."""
        if self.model is None:  # as of an FDS that is there for its schedules alone
            raise TypeError(no_model("FDS(model=None)", None))
        model_key, augment_key, noise_key = jax.random.split(key, 3)

        def init(eta: Any) -> ModelTraining:
            params, statistics = self.model.init(model_key)
            optimizer = self._optimizer(self.values(eta, 0))
            return ModelTraining(params, start(optimizer, params), statistics)

        def step(eta: Any, state: ModelTraining, batch: Any, grad: Any) -> ModelTraining:
            now, rows = batch
            values = self.values(eta, now)
            inputs, targets = read(episode.support, rows)
            if self.augment is not None:
                augment_now = jax.random.fold_in(augment_key, now)
                inputs = self.augment(inputs, augment_now, **values["augment"])

            def loss(params: Any, values: Any) -> tuple[jax.Array, Any]:
                noise = jax.random.fold_in(noise_key, now)  # of dropout and the like
                outputs, statistics = self._apply(params, state, inputs, True, noise)
                return self.objective(outputs, targets, **values)[0], statistics

            found = evaluate(grad, loss, state.params, values["objective"])
            optimizer = differentiable_at_zero(self._optimizer(values))
            updates, slots = update(optimizer, found, state.optimizer, state.params)
            # A learned hyperparameter may be of another dtype than the slots it goes into.
            slots = in_dtypes_of(state.optimizer, slots)
            return ModelTraining(optax.apply_updates(state.params, updates), slots, found.aux)

        def loss(eta: Any, state: ModelTraining) -> tuple[jax.Array, dict[str, jax.Array]]:
            inputs, targets = read(episode.query, episode.query[2])
            params = evaluation_params(state.optimizer, state.params)
            outputs, _ = self._apply(params, state, inputs, False, None)
            value, metrics = self.objective(outputs, targets)
            return value, {**metrics, **self._shown(eta)}

        return Unroll(init, step, loss, begins=self._begins())

    def batches(self, episode: Episode, key: jax.Array) -> Any:
        """Return each step's number [T] and its rows of the data [T, batch], int32.

        Every row is read once before any is read again.
        """
        return self.batches_at(episode, key, jnp.arange(self.inner_steps, dtype=jnp.int32))

    def batches_at(self, episode: Episode, key: jax.Array, steps: jax.Array) -> Any:
        """Return the numbers and the rows of these steps."""
        return steps, epochs(episode.support[2], steps, self.batch, key)

    def evaluation(self) -> FDS:
        """Return the run that the schedule is for: stretched to `eval_steps`."""
        return self.stretched(self.eval_steps or self.inner_steps)

    def stretched(self, inner_steps: int) -> FDS:
        """Return the same over a run of another length, to which every eta of it applies.

        Raises:
          ValueError: for a run that is too short for each of the windows to hold a step.
        """
        counts("FDS.stretched", 1, inner_steps=inner_steps)
        moved = {}
        for name, chosen in self.hyperparameters.items():
            windows = stretched(self._windows(name), inner_steps)
            if len({*windows}) < len(windows):
                raise ValueError(
                    f"The {len(windows) - 1} windows of {name!r} do not fit a run of {inner_steps} "
                    "steps: one of them would hold no step, and an eta has a value for it. Take a "
                    "longer run; or, for plain training, `schedules(eta)[name].stretched(steps)`."
                )
            moved[name] = dataclasses.replace(chosen, windows=windows)
        return dataclasses.replace(self, hyperparameters=moved, inner_steps=inner_steps)

    def unshared(self) -> FDS:
        """Return the same with a window for every step; `spread` turns an eta into its eta."""
        single = {
            name: dataclasses.replace(
                h, windows=self.inner_steps, start=tuple(np.repeat(self._starts(name), np.diff(e)))
            )
            for name, h in self.hyperparameters.items()
            for e in [self.edges(name)]
        }
        return dataclasses.replace(self, hyperparameters=single)

    def spread(self, eta: Any) -> Any:
        """Return the coordinates of every step, {name: [T, ...]}."""
        return {name: spread(x, self.edges(name)) for name, x in eta.items()}

    def edges(self, name: str) -> np.ndarray:
        """Return where the windows of a hyperparameter begin, and the horizon: [N + 1]."""
        return edges(self.hyperparameters[name].windows, self.inner_steps)

    def values(self, eta: Any, step: Any) -> dict[str, dict[str, jax.Array]]:
        """Return the values at an inner step, by where they go: {"optimizer": {name: value}}."""
        found: dict[str, dict[str, jax.Array]] = {"optimizer": {}, "objective": {}, "augment": {}}
        for name, where in self._places().items():
            self._check_windows(name, eta)
            x = eta[name][window_of(jnp.asarray(step), self.edges(name))]
            found[where][name] = self.hyperparameters[name].value(x)
        return found

    def schedules(self, eta: Any) -> dict[str, Schedule]:
        """Return what was learned as plain schedules: {name: step -> value}."""
        found = {}
        for name, chosen in self.hyperparameters.items():
            self._check_windows(name, eta)
            values = np.asarray(chosen.value(eta[name]))
            found[name] = Schedule.of(self._windows(name), values)
        return found

    def _check_windows(self, name: str, eta: Any) -> None:
        windows = len(self.edges(name)) - 1
        if len(eta[name]) != windows:
            raise ValueError(
                f"{name!r} has {windows} windows here, but {len(eta[name])} in eta. An eta goes "
                "with the windows it was learned for; `spread` turns it into that of `unshared()`."
            )

    def _places(self) -> dict[str, str]:
        takers = {
            "optimizer": self.optimizer,
            "objective": self.objective,
            "augment": self.augment,
        }
        return place(self.hyperparameters, takers)

    def _windows(self, name: str) -> tuple[int, ...]:
        return tuple(self.edges(name).tolist())

    def _starts(self, name: str) -> np.ndarray:
        """Return the values [N] that the windows start from."""
        windows = len(self.edges(name)) - 1
        return np.broadcast_to(np.asarray(self.hyperparameters[name].start, float), windows)

    def _start(self, name: str) -> jax.Array:
        chosen, starts = self.hyperparameters[name], jnp.asarray(self._starts(name))
        full = starts.reshape(-1, *[1] * len(chosen.shape))
        x = chosen.coordinate(jnp.broadcast_to(full, (len(starts), *chosen.shape)))
        return x.astype(jnp.result_type(float))

    def _begins(self) -> dict[str, np.ndarray]:
        found = {}
        for name, chosen in self.hyperparameters.items():
            begins = self.edges(name)[:-1].reshape(-1, *[1] * len(chosen.shape))
            found[name] = np.broadcast_to(begins, (len(begins), *chosen.shape))
        return found

    def _optimizer(self, values: Any) -> optax.GradientTransformation:
        return self.optimizer(**values["optimizer"])

    def _apply(self, params: Any, state: ModelTraining, inputs: Any, train: bool, key: Any) -> Any:
        return self.model.apply(params, state.statistics, inputs, train=train, key=key)

    def _shown(self, eta: Any) -> dict[str, jax.Array]:
        """Return the values as metrics: "learning_rate/0" and so on, or their mean."""
        shown: dict[str, jax.Array] = {}
        for name, chosen in self.hyperparameters.items():
            value = chosen.value(eta[name])
            if value.ndim == 1 and len(value) <= SHOWN:
                shown |= {f"{name}/{i}": value[i] for i in range(len(value))}
            else:
                shown[f"{name}/mean"] = value.mean()
        return shown
