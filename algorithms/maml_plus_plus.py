"""MAML++: what makes MAML train stably and adapt better.

Antoniou, Edwards and Storkey 2019, "How to train your MAML" (arXiv:1810.09502). Four changes to
MAML with T steps of SGD from eta = theta_0:

- **Multi-step loss.** The query loss after every step counts, and not the last alone,
  F = sum_t w_t L_Q(theta_t). The weights go linearly from 1/T each in the first outer step to
  (0, ..., 0, 1) after `multi_step` outer steps.
- **Learned rates** per parameter array and inner step: T rates for each array that adapts.
- **Batch normalisation per step.** Scales and offsets (`per_step`) are learned, T of each, and do
  not adapt: step t reads the t-th, on support and query set.
- **Derivative order.** In the first `second_order_from` outer steps inner gradients are constants.

The paper's fifth change, a cosine schedule of the outer learning rate, is the outer optimizer's
(`schedule="cosine"` in a config).

What differs from the authors' code: its weights of earlier steps stop at 0.03 / T until the end of
annealing, and here they reach zero. It accumulates running statistics per step, but normalises by
those of the batch in training and evaluation alike (`training=True`): that is the policy
"transductive" here, and nothing is accumulated.

Weights and derivative order depend on the outer step (`Algorithm.anneals`). Both cost the same
whatever they are: T more forward passes over the query set, and the full second-order derivative.
After annealing, `multi_step=0` and `second_order_from=0` are the same algorithm for less work, with
the same eta.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import above, counts, pattern
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn._utils.trees import matching, paths, split
from metalearn.algorithm import Algorithm
from metalearn.algorithms.maml import SupportAlgorithm, batch_norm_policy
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.model import Model, check_dropout
from metalearn.unroll import Batch, Episode, GradFn, Metrics, Unroll


class StepwiseInitialisation(NamedTuple):
    """The meta-parameters eta of MAML++.

    params: the arrays of the model that adapt, in the order of its leaves: theta_0.
    rates: a learned rate for each of them and each inner step: a list of arrays [T].
    per_step: the other arrays, one for each inner step: a list of arrays [T, ...].
    """

    params: list[jax.Array]
    rates: list[jax.Array]
    per_step: list[jax.Array]


class MultiStepTraining(NamedTuple):
    """The inner state of MAML++.

    params: theta_t, the arrays that adapt.
    statistics: the model's mutable state.
    outer: (), the weighted query losses of the steps before.
    """

    params: list[jax.Array]
    statistics: Any
    outer: jax.Array


@readable
@dataclasses.dataclass(frozen=True)
class MAMLPlusPlus(SupportAlgorithm):
    """MAML++: multi-step loss, rates and batch normalisation per step. Antoniou et al. 2019.

    Support and query: (inputs [n, ...], targets [n, ...]). Evaluations take T steps as training
    does, and the loss after the last.

    Args:
      model: the network that adapts.
      objective: outputs, targets -> loss (), metrics; of the inner and of the outer loss.
      rate: the learned rates before the first outer step.
      inner_steps: T, inner steps.
      multi_step: outer steps over which the weights of the query losses are annealed; 0: the loss
        after the last step alone, from the first outer step on.
      second_order_from: the first outer step with second derivatives; 0: all have them.
      per_step: a regular expression that the paths of the parameters match of which each inner step
        has its own, such as "norm"; "": none has.
      batch_norm: "transductive", "running" or "frozen": see `metalearn.algorithms.maml`.
    """

    anneals: ClassVar[bool] = True

    model: Model
    objective: Objective = cross_entropy
    rate: float = 0.1
    inner_steps: int = 5
    multi_step: int = 0
    second_order_from: int = 0
    per_step: str = ""
    batch_norm: str = "transductive"

    def __post_init__(self) -> None:
        check_fields(self, "inner_steps", "multi_step", "second_order_from")
        check_dropout("MAMLPlusPlus", self.model)
        batch_norm_policy(self.batch_norm)
        pattern("MAMLPlusPlus", per_step=self.per_step)
        above("MAMLPlusPlus", 0, rate=self.rate)
        counts("MAMLPlusPlus", 1, inner_steps=self.inner_steps)
        counts(
            "MAMLPlusPlus", 0, multi_step=self.multi_step, second_order_from=self.second_order_from
        )

    def init(self, key: jax.Array) -> StepwiseInitialisation:
        """Return the initialisation, and the rates and parameters of each inner step."""
        adapted, own, _ = self._split(self.model.init(key)[0])
        if not adapted:
            raise ValueError(
                f"`MAMLPlusPlus(per_step={self.per_step!r})` matches every parameter: the inner "
                'loop would have nothing to change. Take a narrower one, such as "norm".'
            )
        rates = [jnp.full(self.inner_steps, self.rate, leaf.dtype) for leaf in adapted]
        per_step = [jnp.repeat(leaf[None], self.inner_steps, 0) for leaf in own]
        return StepwiseInitialisation(adapted, rates, per_step)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the adaptation to one task, as it is after annealing."""
        return self.annealed(episode, key, None)

    def at_outer_step(self, step: jax.Array) -> Algorithm:
        """Return the algorithm with the weights and the derivative order of an outer step."""
        return _AtOuterStep(self, step)

    def annealed(self, episode: Episode, key: jax.Array, outer_step: jax.Array | None) -> Unroll:
        """Return the adaptation to one task in an outer step (); None: after annealing."""
        policy = batch_norm_policy(self.batch_norm)
        weights = self.weights(outer_step)
        inputs, targets = episode.support

        def init(eta: StepwiseInitialisation) -> MultiStepTraining:
            _, statistics = self.model.init(key)
            dtype = jnp.result_type(*eta.params)
            return MultiStepTraining(eta.params, statistics, jnp.zeros((), dtype))

        def query(
            eta: StepwiseInitialisation, state: MultiStepTraining, number: Any
        ) -> tuple[jax.Array, Metrics]:
            params = self._joined(eta, state.params, number)
            outputs = self.predict(params, state.statistics, episode.query[0], key)
            return self.objective(outputs, episode.query[1])

        def step(
            eta: StepwiseInitialisation, state: MultiStepTraining, batch: Batch, grad: GradFn
        ) -> MultiStepTraining:
            number, step_key = batch

            def support_loss(theta: list[jax.Array]) -> Any:
                params = self._joined(eta, theta, number)
                outputs, statistics = self.model.apply(
                    params, state.statistics, inputs, train=policy.train_on_support, key=step_key
                )
                return self.objective(outputs, targets)[0], statistics

            outer = state.outer
            if weights is not None:  # of theta_t, after t steps; theta_0 has none
                before = jnp.maximum(number - 1, 0)
                weight = jnp.where(number > 0, weights[before], 0).astype(outer.dtype)
                outer = outer + weight * query(eta, state, before)[0].astype(outer.dtype)
            grads, statistics = grad(support_loss, has_aux=True)(state.params)
            if outer_step is not None and self.second_order_from:
                first_order = outer_step < self.second_order_from
                grads = [jnp.where(first_order, jax.lax.stop_gradient(g), g) for g in grads]
            params = [
                p - rate[number] * g
                for p, rate, g in zip(state.params, eta.rates, grads, strict=True)
            ]
            carried = statistics if policy.carry_statistics else state.statistics
            return MultiStepTraining(params, carried, outer)

        def loss(
            eta: StepwiseInitialisation, state: MultiStepTraining
        ) -> tuple[jax.Array, Metrics]:
            last, metrics = query(eta, state, self.inner_steps - 1)
            if weights is None:
                return last, metrics
            return state.outer.astype(last.dtype) + weights[-1].astype(last.dtype) * last, metrics

        return Unroll(init, step, loss)

    def weights(self, outer_step: jax.Array | None) -> jax.Array | None:
        """Return the weights [T] of the query losses in an outer step; None: the last alone."""
        if outer_step is None or not self.multi_step or self.inner_steps == 1:
            return None
        share = 1 - jnp.minimum(outer_step / self.multi_step, 1)  # of the uniform weights
        last = jnp.arange(self.inner_steps) == self.inner_steps - 1
        return share / self.inner_steps + jnp.where(last, 1 - share, 0)

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        """Return the number and the key of each inner step, [T] each."""
        del episode
        return jnp.arange(self.inner_steps), jax.random.split(key, self.inner_steps)

    def trained(self, eta: StepwiseInitialisation, state: MultiStepTraining) -> tuple[Any, Any]:
        """Return (all parameters of the model after adaptation, its running statistics)."""
        return self._joined(eta, state.params, self.inner_steps - 1), state.statistics

    def with_steps(self, steps: int) -> Algorithm:
        """Refuse another number of inner steps: each step has learned rates of its own."""
        raise ValueError(
            f"`MAMLPlusPlus.adapt(steps={steps})`: its learned rates are of {self.inner_steps} "
            "inner steps, and it takes that many. Leave `steps`."
        )

    def _split(self, params: Any) -> Any:
        """Return (leaves that adapt, leaves of which each step has its own, the join of both)."""
        names = paths(params)
        own = matching(names, self.per_step) if self.per_step else [False] * len(names)
        return split(params, [not each for each in own])

    def _joined(self, eta: StepwiseInitialisation, adapted: list[Any], number: Any) -> Any:
        """Return all parameters of the model in an inner step, in its own tree."""
        _, _, join = self._split(self._params)
        return join(adapted, [leaf[number] for leaf in eta.per_step])

    @functools.cached_property
    def _params(self) -> Any:
        """The shapes of the model's parameters."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.eval_shape(lambda key: self.model.init(key)[0], key)


@dataclasses.dataclass(frozen=True, eq=False)
class _AtOuterStep(Algorithm):
    """MAML++ in one outer step, whose number () is traced."""

    algorithm: MAMLPlusPlus
    step: jax.Array

    def init(self, key: jax.Array) -> StepwiseInitialisation:
        return self.algorithm.init(key)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        return self.algorithm.annealed(episode, key, self.step)

    def shard_examples(self, episode: Episode, shard: Callable[[Any], Any]) -> Episode:
        return self.algorithm.shard_examples(episode, shard)

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        return self.algorithm.batches(episode, key)

    def evaluation(self) -> Algorithm:
        return self.algorithm
