"""Data weights: one number per training example, and its derivative through the training run.

The inner loop is an ordinary training run on n examples. eta is a weight w_i for each of them (or
for each group of them), one at the start, and the outer loss is any function of the trained model,
by default its mean loss on queries:

    theta_{t+1} = theta_t - Phi(grad  1/B sum_{i in batch t} w_i l_i(theta_t))    t = 0 .. T-1
    F(w)        = 1/m sum_j l_j(theta_T)                                  j in the queries

The score of an example is -dF/dw_i: by how much, to first order, the query loss falls if the
example counts more, and rises if it is left out (w_i = 0). All scores together take one backward
pass through the run (Engstrom et al. 2025, arXiv:2503.13751; MAGIC, Ilyas & Engstrom 2025,
arXiv:2504.16430): `metalearn.algorithms.attribute`.

The sum is divided by the size of the batch B, not by the sum of its weights. Then the weight zero
is the run without that example and with all others unchanged, which is what leaving examples out is
compared with; the derivative with respect to w_i is of that example alone; and a batch whose
weights are all zero has the gradient zero, not 0 / 0. What it costs: the weights of a batch scale
its step. Scaling all weights is another learning rate, and is part of the derivative.

Which examples a step reads, theta_0 and dropout are functions of the task's key, so that a run with
other weights differs in nothing else. Weights are read by the number of the row in the dataset,
also where the rows are on the host.

Learned by an outer optimizer, weights stay within `bounds` (projected metagradient descent,
arXiv:2503.13751): a negative one would raise the loss of its example without bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn._utils.checks import Count, is_integer
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import described, readable
from metalearn.algorithms import pictures
from metalearn.algorithms.epochs import InEpochs, check_reads, read_rows
from metalearn.algorithms.fds.outer_rules import within
from metalearn.algorithms.loss_weights.weighted_training import weighted_mean_gradient
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.engines.inner_loop import depends
from metalearn.learner import Learner
from metalearn.model import Model
from metalearn.optimizers.differentiable import differentiable_at_zero
from metalearn.optimizers.updates import Evaluated, evaluation_params, start, update
from metalearn.rows import ABSENT, row_count, row_numbers
from metalearn.unroll import Batch, Episode, GradFn, Metrics, ModelTraining, Unroll


@readable
@dataclasses.dataclass(frozen=True)
class DataWeights(InEpochs):
    """A weight for each training example. eta: [examples], ones; [groups], or [examples, tokens].

    Support and query: (inputs [n, ...], targets [n, ...], rows [m]), the whole dataset and the
    numbers of those rows that belong to the split, as `metalearn.datasets.TrainingRuns`, `HeldOut`
    and their siblings on the host draw them. uint8 images are scaled to 0..1.

    Args:
      model: the network that is trained.
      examples: n, the rows of the dataset, those that are not trained on included.
      inner_steps: T.
      batch: B, examples of an inner step, read in shuffled epochs.
      optimizer: the inner optimizer. Adam and its relatives take `eps_root`, without which scores
        may be exact and predict nothing.
      objective: outputs, targets -> loss (), metrics; a mean over examples, of which the inner loop
        weights each term. The outer loss is that of the queries.
      outer_loss: learner, inputs [m, ...], targets [m, ...] -> loss (), or (loss (), metrics): of
        the trained model (`metalearn.Learner`) on the queries. None: their objective.
      groups: [n] integers from 0, the group of each example, such as its source: the examples of a
        group share a weight. None: each has its own.
      tokens: S, targets of an example, if each has a weight of its own; None: an example has one.
      bounds: between which the outer optimizer keeps weights.
    """

    model: Model
    examples: Count
    inner_steps: Count
    batch: Count
    optimizer: optax.GradientTransformation = described(optax.sgd, 0.1, momentum=0.9)
    objective: Objective = cross_entropy
    outer_loss: Callable[..., Any] | None = None
    groups: Sequence[int] | None = dataclasses.field(default=None, repr=False)
    tokens: Count | None = None
    bounds: tuple[float, float] = (0.0, 2.0)

    def __post_init__(self) -> None:
        check_fields(self, "groups")
        check_reads("DataWeights", self.inner_steps, self.batch)
        low, high = self.bounds if len(self.bounds) == 2 else (0.0, -1.0)
        if not low <= 1 <= high:
            raise ValueError(
                f"`DataWeights(bounds={self.bounds})`: they are a pair (lowest, highest) around "
                "one, the weight that every example starts from, such as (0.0, 2.0)."
            )
        if self.groups is not None:
            object.__setattr__(self, "groups", _checked_groups(self.groups, self.examples))

    def init(self, key: jax.Array) -> jax.Array:
        """Return weights of one: [examples] or [groups], with a last axis [tokens] if they have."""
        del key
        count = self.examples if self.groups is None else max(self.groups) + 1
        return jnp.ones((count,) if self.tokens is None else (count, self.tokens))

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training of a fresh model, drawn with `key`."""
        self._check_count(episode.support[1])
        model_key, noise_key = jax.random.split(key)

        def init(eta: jax.Array) -> ModelTraining:
            self._check_eta(eta)
            params, statistics = self.model.init(model_key)
            return ModelTraining(params, start(self.optimizer, params), statistics)

        def step(eta: jax.Array, state: ModelTraining, batch: Batch, grad: GradFn) -> ModelTraining:
            number, rows = batch
            examples = read_rows(episode.support, rows)
            weights = self.weights(eta, row_numbers(episode.support[2], rows))
            step_key = jax.random.fold_in(noise_key, number)
            evaluated, statistics = self._evaluate(state, examples, weights, step_key, grad)
            optimizer = differentiable_at_zero(self.optimizer)
            updates, slots = update(optimizer, evaluated, state.optimizer, state.params)
            return ModelTraining(optax.apply_updates(state.params, updates), slots, statistics)

        def loss(eta: jax.Array, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            inputs, targets = read_rows(episode.query, episode.query[2])
            value, metrics = self._outer_loss(*self.trained(eta, state), key, inputs, targets)
            return value, {**metrics, "weight_min": eta.min(), "weight_mean": eta.mean()}

        return Unroll(init, step, loss)

    def weights(self, eta: jax.Array, rows: jax.Array) -> jax.Array:
        """Return the weights of rows [...] of the dataset: [...], or [..., tokens]; NaN of none."""
        if self.groups is not None:
            groups = jnp.asarray(np.asarray(self.groups, np.int32))
            rows = groups.at[rows].get(mode="fill", fill_value=ABSENT)
        return eta.at[rows].get(mode="fill", fill_value=jnp.nan)

    def losses(self, outputs: Any, targets: Any) -> jax.Array:
        """Return the loss of each example, [batch], or with `tokens` of each token, [batch, S]."""

        def of_one(outputs: Any, targets: Any) -> jax.Array:
            alone = jax.tree.map(lambda leaf: leaf[None], (outputs, targets))
            return self.objective(*alone)[0]

        each = jax.vmap(of_one)
        return (each if self.tokens is None else jax.vmap(each))(outputs, targets)

    def with_steps(self, steps: int) -> DataWeights:
        """Return the same algorithm with another number of inner steps."""
        return dataclasses.replace(self, inner_steps=steps)

    def trained(self, eta: jax.Array | None, state: ModelTraining) -> tuple[Any, Any]:
        """Return (the parameters of the trained model, its running statistics)."""
        del eta
        return evaluation_params(state.optimizer, state.params), state.statistics

    def outer_optimizer(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Return the optimizer, its weights projected on `bounds` after every update."""
        return within(optimizer, *self.bounds)

    def pictures(self) -> Mapping[str, Callable[..., Mapping[str, Any]]]:
        """Return "weights": see `metalearn.algorithms.pictures`."""
        return {"weights": pictures.data_weights}

    def _evaluate(
        self, state: ModelTraining, examples: Any, weights: jax.Array, key: jax.Array, grad: GradFn
    ) -> tuple[Evaluated, Any]:
        """Return (the weighted loss of a batch with its gradient, the model's next statistics)."""

        def losses(params: Any, examples: Any, key: jax.Array) -> tuple[jax.Array, Any]:
            inputs, targets = examples
            outputs, statistics = self.model.apply(
                params, state.statistics, inputs, train=True, key=key
            )
            losses = self.losses(outputs, targets)
            if losses.shape[1:] != weights.shape[1:]:
                raise ValueError(
                    f"`DataWeights(tokens={self.tokens})` has weights {[*weights.shape[1:]]} for "
                    f"each example, whose losses are {[*losses.shape[1:]]}. Let `tokens` be the "
                    "targets of an example, or None: one weight for all of them."
                )
            return losses, statistics

        return weighted_mean_gradient(grad, losses, state, examples, weights, key)

    def _outer_loss(
        self, params: Any, statistics: Any, key: jax.Array, inputs: Any, targets: Any
    ) -> tuple[jax.Array, Metrics]:
        if self.outer_loss is None:
            return self.objective(self.predict(params, statistics, inputs, None), targets)

        def judged(params: Any) -> Any:
            learner = Learner(params, statistics, key, self.inner_steps, self.predict)
            assert self.outer_loss is not None
            return self.outer_loss(learner, inputs, targets)

        outputs = judged(params)
        value, metrics = outputs if isinstance(outputs, tuple) else (outputs, {})
        name = getattr(self.outer_loss, "__name__", str(self.outer_loss))
        if jnp.ndim(value):
            raise ValueError(
                f"`DataWeights(outer_loss={name})` returned an array {[*jnp.shape(value)]}, but a "
                "loss is one number, (). Take the mean over the queries."
            )
        if not depends(judged, params):
            raise ValueError(
                f"`DataWeights(outer_loss={name})` does not depend on the parameters of the model, "
                "so that all scores would be zero. Compute it from what the trained model says of "
                "the queries, `learner.predict(inputs)`, or from `learner.params`."
            )
        return value, metrics

    def _check_count(self, targets: Any) -> None:
        count = row_count(targets)
        if count is not None and count != self.examples:
            raise ValueError(
                f"`DataWeights(examples={self.examples})` has a weight for each row of a dataset "
                f"of {self.examples:,}, but these tasks have {count:,} rows, of which some may be "
                f"validation examples: take examples={count}."
            )

    def _check_eta(self, eta: Any) -> None:
        shapes = [
            [*jnp.shape(leaf)] for leaf in (eta, jax.eval_shape(self.init, jax.random.key(0)))
        ]
        if shapes[0] != shapes[1]:
            kind = "example" if self.groups is None else "group"
            raise ValueError(
                f"`DataWeights` got weights of the shape {shapes[0]}, but has one for each {kind}: "
                f"{shapes[1]}. Start from `DataWeights.init(key)`, which are ones."
            )


def _checked_groups(groups: Any, examples: int) -> tuple[int, ...]:
    """Return the group of each example as a tuple; ValueError unless there is one for each."""
    numbers = np.asarray(groups)
    whole = numbers.ndim == 1 and (numbers.dtype.kind in "iu" or all(map(is_integer, groups)))
    if not whole or len(numbers) != examples or numbers.min() < 0:
        raise ValueError(
            f"`DataWeights(groups=)` is {numbers.dtype}{[*numbers.shape]}, but names the group of "
            f"each of the {examples:,} examples by an integer from 0: a sequence [{examples}]. Of "
            "names: `np.unique(names, return_inverse=True)[1]`."
        )
    return tuple(numbers.tolist())
