"""Problems that a learned optimizer trains: the initial theta, and the loss of an inner step.

A problem consists of functions only; the data come with the episode, so a problem needs a matching
distribution over tasks:

| problem        | tasks                                   | support of an episode              |
|----------------|-----------------------------------------|------------------------------------|
| `Supervised`   | `TrainingRuns`, `HeldOut`, on the host  | all inputs and targets, rows [n]   |
| `Streamed`     | `Text`, or any with a batch per step    | leaves [T, batch, ...]             |
| `Quadratic`    | `Quadratics`                            | curvatures [d], minimum [d]        |
| `Together`     | `SideBySide`                            | {name: support}                    |
| `MetaTraining` | `MetaTrainingRuns`                      | tasks of the level below           |

`Together` trains one learned optimizer on a mixture of problems.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import at_least
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn.algorithms.epochs import check_reads, epochs, read_rows, scaled
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.algorithms.support import check_pair, with_rows
from metalearn.model import Model, bound, constants_of
from metalearn.rows import StepRows
from metalearn.unroll import Batch, Metrics
from metalearn.unroll import horizon as length


class StepLoss(NamedTuple):
    """The losses of one inner step.

    loss: (), the inner loss, whose gradient the learned optimizer receives.
    measure: (), the term of this step in the outer loss; usually the same. [parts] of `Together`.
    statistics: the model's mutable state after the step; for a model without one, that of `init`.
    """

    loss: jax.Array
    measure: jax.Array
    statistics: Any


class Problem(abc.ABC):
    """A training problem. Subclasses are frozen dataclasses of pure functions."""

    @property
    def reads_tasks(self) -> bool:
        """Whether the support set is a distribution over tasks: see `Algorithm.reads_tasks`."""
        return False

    @abc.abstractmethod
    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (theta_0, the model's mutable state), which is `()` for a model without one."""

    @abc.abstractmethod
    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> Batch:
        """Return the batches of some steps: a pytree with leaves [len(steps), ...].

        `steps` are consecutive step numbers, int32: of a full or of a truncated unroll.
        """

    def rows_at(self, support: Any, steps: jax.Array, key: jax.Array) -> jax.Array:
        """Return the rows [t, batch] of a dataset that steps read: see `Algorithm.rows_at`."""
        raise TypeError(
            f"These tasks are training runs on data of the host, of which a step reads rows. "
            f"`{type(self).__name__}` reads none: the problem for them is `Supervised`."
        )

    def check(self, support: Any, inner_steps: int) -> None:  # noqa: B027
        """Raise ValueError if a support set does not suit this problem, or this number of steps."""

    def shard_query(self, query: Any, shard: Callable[[Any], Any]) -> Any:
        """Return a query whose examples are sharded: see `Algorithm.shard_examples`."""
        return shard(query)

    def combined(self, measure: jax.Array) -> jax.Array:
        """Return a measure combined over its parts: ()."""
        return measure

    @abc.abstractmethod
    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Batch, key: jax.Array
    ) -> StepLoss:
        """Return the loss of one step. `key` is for random layers such as dropout."""

    def predict(self, params: Any, statistics: Any, inputs: Any) -> Any:
        """Return the outputs of the trained model in evaluation mode, for inputs [n, ...]."""
        raise TypeError(
            f"`{type(self).__name__}` has no inputs to predict from: its result is theta, the "
            "`params` of the learner."
        )

    def support_set(self, support: Any) -> Any:
        """Return a support set as `batches` and `loss` read it, completed where it may be."""
        return support

    @abc.abstractmethod
    def validate(self, params: Any, statistics: Any, query: Any) -> tuple[jax.Array, Metrics]:
        """Return (validation loss (), metrics)."""

    def constants(self) -> Any:
        """Return the arrays that the problem's models hold: see `Algorithm.constants`."""
        return constants_of(self)

    def bind(self, constants: Any) -> Problem:
        """Return the same problem with these arrays for its `constants()`."""
        return bound(self, constants)


@readable
@dataclasses.dataclass(frozen=True)
class Supervised(Problem):
    """A network trained on a whole dataset, in shuffled epochs.

    Args:
      model: the network.
      objective: outputs, targets -> loss (), metrics.
      batch: examples of an inner step.
    """

    model: Model
    objective: Objective = cross_entropy
    batch: int = 64

    def __post_init__(self) -> None:
        check_fields(self, "batch")
        if self.batch is None:
            raise ValueError(
                "`Supervised(batch=None)`: the tasks hold a whole dataset, of which a step reads "
                "a batch. Pass its size; tasks with a batch per step are for `Streamed`."
            )
        at_least("Supervised", 1, batch=self.batch)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (the model's initial parameters, its mutable state)."""
        return self.model.init(key)

    def check(self, support: Any, inner_steps: int) -> None:
        """Raise ValueError unless the support is a dataset with the row numbers of a split."""
        check_reads("Supervised", inner_steps, self.batch)
        read_ahead = len(support) == 3 and isinstance(support[2], StepRows)
        if not read_ahead and (len(support) != 3 or jnp.ndim(support[2]) != 1):
            raise ValueError(
                "`Supervised` reads rows of a whole dataset, (inputs, targets, rows [n]), as "
                "`TrainingRuns` draws them, but these tasks bring something else. Tasks that bring "
                "a batch a step, such as `Text`, are for `Streamed`."
            )

    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> jax.Array:
        """Return the row numbers of each step, [len(steps), batch], int32."""
        return self.rows_at(support, steps, key)

    def rows_at(self, support: Any, steps: jax.Array, key: jax.Array) -> jax.Array:
        """Return the same: a step reads these rows, of data on the host as well."""
        return epochs(support[2], steps, self.batch, key)

    def shard_query(self, query: Any, shard: Callable[[Any], Any]) -> Any:
        """Return the query with its rows sharded; the dataset is not."""
        inputs, targets, rows = query
        return inputs, targets, shard(rows)

    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Batch, key: jax.Array
    ) -> StepLoss:
        """Return the objective on the rows of a step."""
        inputs, targets = read_rows(support, batch)
        return _step_loss(self.model, self.objective, params, statistics, inputs, targets, key)

    def validate(self, params: Any, statistics: Any, query: Any) -> tuple[jax.Array, Metrics]:
        """Return the objective on all rows of the query."""
        inputs, targets = read_rows(query, query[2])
        return self.objective(self.predict(params, statistics, inputs), targets)

    def predict(self, params: Any, statistics: Any, inputs: Any) -> Any:
        """Return the outputs of the trained model; uint8 images are scaled to 0..1."""
        return self.model.apply(params, statistics, scaled(inputs), train=False)[0]

    def support_set(self, support: Any) -> Any:
        """Return (inputs, targets, rows to train on); of (inputs, targets), all rows."""
        return with_rows("LearnedOptimizer", support)


@readable
@dataclasses.dataclass(frozen=True)
class Streamed(Problem):
    """A network trained on the batches of the episode, one per step: (inputs, targets, ...).

    Args:
      model: the network.
      objective: outputs, targets -> loss (), metrics.
    """

    model: Model
    objective: Objective = cross_entropy

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (the model's initial parameters, its mutable state)."""
        return self.model.init(key)

    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> Any:
        """Return the batches of these steps."""
        del key
        return jax.tree.map(lambda x: x[steps], support[:2])

    def check(self, support: Any, inner_steps: int) -> None:
        """Raise ValueError unless there is a batch for each step."""
        batches = length(support)
        if batches != inner_steps:
            raise ValueError(
                f"The tasks bring {batches} batches, one a step, and the learned optimizer takes "
                f"{inner_steps} steps. Make the two the same."
            )

    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Batch, key: jax.Array
    ) -> StepLoss:
        """Return the objective on a step's batch."""
        del support
        inputs, targets = batch
        return _step_loss(self.model, self.objective, params, statistics, inputs, targets, key)

    def validate(self, params: Any, statistics: Any, query: Any) -> tuple[jax.Array, Metrics]:
        """Return the objective on the query."""
        return self.objective(self.predict(params, statistics, query[0]), query[1])

    def predict(self, params: Any, statistics: Any, inputs: Any) -> Any:
        """Return the outputs of the trained model, for inputs [n, ...]."""
        return self.model.apply(params, statistics, inputs, train=False)[0]

    def support_set(self, support: Any) -> Any:
        """Return a support set; ValueError unless its leaves are [T, batch, ...]."""
        check_pair("LearnedOptimizer", support, "[T, batch, ...]")
        return support


@dataclasses.dataclass(frozen=True)
class Quadratic(Problem):
    """A quadratic: half the mean over d of curvature (theta - minimum - noise)^2, theta_0 normal.

    Args:
      dimension: d.
      noise: standard deviation of the random shift of the minimum at each step.
    """

    dimension: int
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return theta_0 [d]."""
        return jax.random.normal(key, (self.dimension,)), ()

    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> Any:
        """Return the shift of the minimum at each step, [len(steps), d]."""

        def shift(step: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, step), (self.dimension,))

        return self.noise * jax.vmap(shift)(steps)

    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Batch, key: jax.Array
    ) -> StepLoss:
        """Return the loss about the shifted minimum; the measure is about the true minimum."""
        del key
        curvatures, minimum = support
        noisy = _quadratic(params, curvatures, minimum + batch)
        return StepLoss(noisy, _quadratic(params, curvatures, minimum), statistics)

    def validate(self, params: Any, statistics: Any, query: Any) -> tuple[jax.Array, Metrics]:
        """Return the loss about the true minimum."""
        return _quadratic(params, *query), {}


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


def _quadratic(params: jax.Array, curvatures: jax.Array, minimum: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean(curvatures * (params - minimum) ** 2)


@dataclasses.dataclass(frozen=True)
class Together(Problem):
    """Several problems side by side, one of each in every task. theta: {name: theta}.

    The way to train one optimizer on a mixture of tasks: a learned optimizer that acts on each
    parameter independently trains every part as if it were alone, and the outer loss is over all
    parts. If one part of a task becomes NaN in truncated unrolls, all its parts are resampled.

    Args:
      parts: the problems, by name.
      weights: of the parts in the outer loss, by name, scaled to a sum of one; None: equal.
    """

    parts: Mapping[str, Problem] = dataclasses.field(hash=False)
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

    @property
    def reads_tasks(self) -> bool:
        """Whether the support set of a part is a distribution over tasks."""
        return any(part.reads_tasks for part in self.parts.values())

    def constants(self) -> Any:
        """Return {name: constants} of the problems."""
        return {name: part.constants() for name, part in self.parts.items()}

    def bind(self, constants: Any) -> Problem:
        """Return the problems with these arrays."""
        parts = {name: part.bind(constants[name]) for name, part in self.parts.items()}
        return dataclasses.replace(self, parts=parts)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return {name: theta} and {name: state}."""
        pairs = {name: part.init(self._key(key, name)) for name, part in self.parts.items()}
        return {n: pair[0] for n, pair in pairs.items()}, {n: pair[1] for n, pair in pairs.items()}

    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> Any:
        """Return {name: batches}."""
        return {
            name: part.batches(support[name], steps, self._key(key, name))
            for name, part in self.parts.items()
        }

    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Batch, key: jax.Array
    ) -> StepLoss:
        """Return the sum of the losses, which share no parameters, and the measure of each part."""
        losses = {
            n: part.loss(params[n], statistics[n], support[n], batch[n], self._key(key, n))
            for n, part in self.parts.items()
        }
        total = jnp.stack([part.loss for part in losses.values()]).sum()
        measures = jnp.stack([self.parts[n].combined(part.measure) for n, part in losses.items()])
        return StepLoss(total, measures, {n: part.statistics for n, part in losses.items()})

    def shard_query(self, query: Any, shard: Callable[[Any], Any]) -> Any:
        """Return {name: query}, sharded."""
        return {name: part.shard_query(query[name], shard) for name, part in self.parts.items()}

    def combined(self, measure: jax.Array) -> jax.Array:
        """Return the weighted mean of the measures [parts]."""
        return self._weighted(dict(zip(self.parts, measure, strict=True)))

    def predict(self, params: Any, statistics: Any, inputs: Any) -> Any:
        """Return {name: outputs} of the parts that `inputs`, {name: inputs}, names."""
        return {n: self.parts[n].predict(params[n], statistics[n], x) for n, x in inputs.items()}

    def support_set(self, support: Any) -> Any:
        """Return {name: support set of the part}."""
        self._check_names(support)
        return {name: part.support_set(support[name]) for name, part in self.parts.items()}

    def validate(self, params: Any, statistics: Any, query: Any) -> tuple[jax.Array, Metrics]:
        """Return the weighted validation loss, and each part's as "name/validation_loss"."""
        results = {n: p.validate(params[n], statistics[n], query[n]) for n, p in self.parts.items()}
        losses = {n: loss for n, (loss, _) in results.items()}
        metrics: Metrics = {f"{n}/validation_loss": loss for n, loss in losses.items()}
        for name, (_, part_metrics) in results.items():
            metrics |= {f"{name}/{key}": value for key, value in part_metrics.items()}
        return self._weighted(losses), metrics

    def _weighted(self, measures: Mapping[str, jax.Array]) -> jax.Array:
        weights = self.weights or dict.fromkeys(self.parts, 1.0)
        total = sum(weights.values())
        return jnp.stack([weights[n] / total * value for n, value in measures.items()]).sum()

    def _key(self, key: jax.Array, name: str) -> jax.Array:
        return jax.random.fold_in(key, sorted(self.parts).index(name))

    def check(self, support: Any, inner_steps: int) -> None:
        """Raise ValueError unless the support has these parts, and each suits its problem."""
        self._check_names(support)
        for name, part in self.parts.items():
            part.check(support[name], inner_steps)

    def _check_names(self, support: Any) -> None:
        names = sorted(support) if isinstance(support, dict) else "no dictionary"
        if names != sorted(self.parts):
            raise ValueError(
                f"The problems are {sorted(self.parts)}, and the tasks bring {names}. Use "
                "`metalearn.datasets.SideBySide` with the same names."
            )
