"""Problems that a learned optimizer trains: a fresh theta, and the loss of a step.

A problem holds functions alone; the data come with the episode, so a problem goes with a
distribution over tasks:

| problem        | tasks                                   | support of an episode              |
|----------------|-----------------------------------------|------------------------------------|
| `Supervised`   | `TrainingRuns`, `HeldOut`               | all inputs and targets, rows [n]   |
| `Streamed`     | `Text`, or any that draw a batch a step | leaves [T, batch, ...]             |
| `Quadratic`    | `Quadratics`                            | curvatures [d], minimum [d]        |
| `Together`     | `SideBySide`                            | {name: support}                    |

`Together` trains one learned optimizer on a mixture of problems.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import at_least
from metalearn._utils.fields import check_fields
from metalearn.algorithms.epochs import check_reads, epochs, read
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.model import Model
from metalearn.unroll import horizon as length


class StepLoss(NamedTuple):
    """What a problem says of theta at one step.

    loss: (), what the inner gradient is of.
    measure: (), what the outer loss is the mean of; usually the same. [parts] of `Together`.
    statistics: the model's mutable state after the step; what `init` returned where it has none.
    """

    loss: jax.Array
    measure: jax.Array
    statistics: Any


class Problem(abc.ABC):
    """One kind of training run. Subclasses are frozen dataclasses of pure functions."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (theta, the model's mutable state): `()` for that where there is none."""

    @abc.abstractmethod
    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> Any:
        """Return what these steps read: a pytree with leaves [len(steps), ...].

        `steps` are numbers, int32, one after the other: all of a run, or those of a truncation.
        """

    def check(self, support: Any, inner_steps: int) -> None:  # noqa: B027
        """Raise ValueError where a support set does not do for `inner_steps` steps."""

    def combined(self, measure: jax.Array) -> jax.Array:
        """Return what the parts of a measure come to: ()."""
        return measure

    @abc.abstractmethod
    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Any, key: jax.Array
    ) -> StepLoss:
        """Return the loss of one step. `key` is for dropout and the like."""

    @abc.abstractmethod
    def validate(
        self, params: Any, statistics: Any, query: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return (validation loss (), metrics)."""


@dataclasses.dataclass(frozen=True)
class Supervised(Problem):
    """A network on batches of a whole dataset, every example once before any comes again."""

    model: Model
    objective: Objective = cross_entropy
    batch: int = 64

    def __post_init__(self) -> None:
        check_fields(self, "batch")
        if self.batch is None:
            raise ValueError(
                "`Supervised(batch=None)`: the tasks hold a whole dataset, of which a step reads "
                "so many examples. Say how many; tasks that bring a batch a step are `Streamed`."
            )
        at_least("Supervised", 1, batch=self.batch)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return the model's parameters and state."""
        return self.model.init(key)

    def check(self, support: Any, inner_steps: int) -> None:
        """Raise ValueError unless the support is a dataset and the rows of it to read."""
        check_reads("Supervised", inner_steps, self.batch)
        if len(support) != 3 or jnp.ndim(support[2]) != 1:
            raise ValueError(
                "`Supervised` reads rows of a whole dataset, (inputs, targets, rows [n]), as "
                "`TrainingRuns` draws them, but these tasks bring something else. Tasks that bring "
                "a batch a step, such as `Text`, are for `Streamed`."
            )

    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> jax.Array:
        """Return the rows of each step [len(steps), batch], int32."""
        return epochs(support[2], steps, self.batch, key)

    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Any, key: jax.Array
    ) -> StepLoss:
        """Return the objective on the rows of a step."""
        inputs, targets = read(support, batch)
        return _step_loss(self.model, self.objective, params, statistics, inputs, targets, key)

    def validate(
        self, params: Any, statistics: Any, query: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the objective on all rows of the query."""
        inputs, targets = read(query, query[2])
        outputs, _ = self.model.apply(params, statistics, inputs, train=False)
        return self.objective(outputs, targets)


@dataclasses.dataclass(frozen=True)
class Streamed(Problem):
    """A network on batches that come with the episode, one a step: (inputs, targets, ...)."""

    model: Model
    objective: Objective = cross_entropy

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return the model's parameters and state."""
        return self.model.init(key)

    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> Any:
        """Return the batches themselves."""
        del key
        return jax.tree.map(lambda x: x[steps], support[:2])

    def check(self, support: Any, inner_steps: int) -> None:
        """Raise ValueError unless there is a batch for each step."""
        given = length(support)
        if given != inner_steps:
            raise ValueError(
                f"The tasks bring {given} batches, one a step, and the learned optimizer takes "
                f"{inner_steps} steps. Make the two the same."
            )

    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Any, key: jax.Array
    ) -> StepLoss:
        """Return the objective on a step's batch."""
        del support
        inputs, targets = batch
        return _step_loss(self.model, self.objective, params, statistics, inputs, targets, key)

    def validate(
        self, params: Any, statistics: Any, query: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the objective on the query."""
        outputs, _ = self.model.apply(params, statistics, query[0], train=False)
        return self.objective(outputs, query[1])


@dataclasses.dataclass(frozen=True)
class Quadratic(Problem):
    """A bowl: half the mean over d of curvature (theta - minimum - noise)^2, theta_0 normal."""

    dimension: int
    noise: float = 0.0  # standard deviation of the minimum that a step sees

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return theta_0 [d]."""
        return jax.random.normal(key, (self.dimension,)), ()

    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> Any:
        """Return the shift of the minimum at each step [len(steps), d]."""

        def shift(step: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, step), (self.dimension,))

        return self.noise * jax.vmap(shift)(steps)

    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Any, key: jax.Array
    ) -> StepLoss:
        """Return the loss about the shifted minimum, judged by that about the true one."""
        del key
        curvatures, minimum = support
        seen = _bowl(params, curvatures, minimum + batch)
        return StepLoss(seen, _bowl(params, curvatures, minimum), statistics)

    def validate(
        self, params: Any, statistics: Any, query: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss about the true minimum."""
        return _bowl(params, *query), {}


def _step_loss(
    model: Model,
    objective: Objective,
    params: Any,
    statistics: Any,
    inputs: Any,
    targets: Any,
    key: jax.Array,
) -> StepLoss:
    outputs, statistics = model.apply(params, statistics, inputs, train=True, key=key)
    loss, _ = objective(outputs, targets)
    return StepLoss(loss, loss, statistics)


def _bowl(params: jax.Array, curvatures: jax.Array, minimum: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean(curvatures * (params - minimum) ** 2)


@dataclasses.dataclass(frozen=True)
class Together(Problem):
    """Several problems side by side, one of each in every task. theta: {name: theta}.

    A learned optimizer that treats each parameter by itself trains them as if each were alone,
    and its eta is judged by all: the way to train one optimizer on a mixture of tasks. A task is
    one of each, so where one part becomes NaN in truncated training, all of that task begin anew.
    """

    parts: Mapping[str, Problem] = dataclasses.field(hash=False)
    # What a part counts in the outer loss; None: all the same. They sum to one.
    weights: Mapping[str, float] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.parts:
            raise ValueError("`Together` takes at least one problem: {name: problem}.")
        if self.weights is not None and self.weights.keys() != self.parts.keys():
            raise ValueError(
                f"`Together` got weights for {sorted(self.weights)} and problems "
                f"{sorted(self.parts)}. Give each problem a weight, or none."
            )

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return {name: theta} and {name: state}."""
        made = {name: part.init(self._key(key, name)) for name, part in self.parts.items()}
        return {n: m[0] for n, m in made.items()}, {n: m[1] for n, m in made.items()}

    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> Any:
        """Return {name: batches}."""
        return {
            name: part.batches(support[name], steps, self._key(key, name))
            for name, part in self.parts.items()
        }

    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Any, key: jax.Array
    ) -> StepLoss:
        """Return the sum of the losses, whose gradients do not mix, and the measure of each."""
        found = {
            n: part.loss(params[n], statistics[n], support[n], batch[n], self._key(key, n))
            for n, part in self.parts.items()
        }
        total = jnp.stack([one.loss for one in found.values()]).sum()
        measures = jnp.stack([self.parts[n].combined(one.measure) for n, one in found.items()])
        return StepLoss(total, measures, {n: one.statistics for n, one in found.items()})

    def combined(self, measure: jax.Array) -> jax.Array:
        """Return the weighted mean of the measures [parts]."""
        return self._weighted(dict(zip(self.parts, measure, strict=True)))

    def validate(
        self, params: Any, statistics: Any, query: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the weighted validation loss, and each part's as "name/validation_loss"."""
        found = {n: p.validate(params[n], statistics[n], query[n]) for n, p in self.parts.items()}
        shown = {f"{n}/validation_loss": loss for n, (loss, _) in found.items()}
        for name, (_, metrics) in found.items():
            shown |= {f"{name}/{key}": value for key, value in metrics.items()}
        return self._weighted({n: loss for n, (loss, _) in found.items()}), shown

    def _weighted(self, measures: Mapping[str, jax.Array]) -> jax.Array:
        weights = self.weights or dict.fromkeys(self.parts, 1.0)
        total = sum(weights.values())
        return jnp.stack([weights[n] / total * value for n, value in measures.items()]).sum()

    def _key(self, key: jax.Array, name: str) -> jax.Array:
        return jax.random.fold_in(key, sorted(self.parts).index(name))

    def check(self, support: Any, inner_steps: int) -> None:
        """Raise ValueError unless the support has these parts, and each does."""
        found = sorted(support) if isinstance(support, dict) else "no dictionary"
        if found != sorted(self.parts):
            raise ValueError(
                f"The problems are {sorted(self.parts)}, and the tasks bring {found}. Use "
                "`metalearn.datasets.SideBySide` with the same names."
            )
        for name, part in self.parts.items():
            part.check(support[name], inner_steps)
