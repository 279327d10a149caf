"""Model-agnostic meta-learning: learn an initialisation that adapts in a few steps.

For a task with support set S and query set Q, from eta = theta_0,

    theta_{t+1} = theta_t - alpha grad L_S(theta_t)      t = 0 .. T-1
    F(eta)      = L_Q(theta_T)

Finn, Abbeel and Levine 2017 (arXiv:1703.03400). Three relatives are options, and combine:

- Meta-SGD, Li et al. 2017 (arXiv:1707.09835): alpha is a vector, one learned rate per
  parameter (`learned_rates`).
- First-order MAML, same paper as MAML: the inner gradient is treated as a
  constant (`first_order`); about a third of the work, and no Hessian products.
- ANIL, Raghu et al. 2020 (arXiv:1909.09157): only the head adapts, the body is reused
  (`adapted="head"`); the inner loop carries and differentiates only the head.

Two more change the inner loss:

- iMAML, Rajeswaran et al. 2019 (arXiv:1909.04630): lambda/2 |theta - theta_0|^2 is added to it
  (`proximal`), so that the loop converges to a solution that depends on theta_0. Exact engines
  differentiate the loop that was run; the engine `Implicit` takes the paper's derivative, that at
  the solution.
- Mini-batches of the support set (`batch`), for loops of many steps on larger support sets.

Parameters are fast (`adapted`: the inner loop changes them), slow (`learned` alone: they are the
same in all tasks, and the outer loop changes them) or frozen (neither), by their paths. What is
frozen is no part of eta or of the inner state: it costs no tangent, no slot of an optimizer and no
saved residual. It comes from the model, `metalearn.models.with_params`, and is an argument of the
compiled programs.

The inner optimizer receives a tree of the model's own structure, so its labels and masks go by
path (`optax.multi_transform`, `optax.masked`, `optax.adamw(mask=)`); leaves that do not adapt are
an `optax.MaskedNode` there, as in `optax.masked`. The extra arguments that its `update` may
have: `metalearn.optimizers.updates`.

What batch normalisation does inside the inner loop is the most repeated question of the field, and
the usual reason why two implementations of MAML disagree. `batch_norm` names one of three policies:

- "transductive" (the default): always normalise by the statistics of the current batch, support
  and query alike, without running statistics. This is what MAML's own code does, and most
  published few-shot numbers: the queries of a task are evaluated in one batch, and help each
  other.
- "running": a task starts from the model's initial statistics, updates them on its own support set
  at every inner step, and its queries are normalised by them one by one. No information passes
  between queries. After few steps the running averages are still close to the initial statistics:
  give the layer a small momentum (0 uses the last support batch alone). The statistics depend on
  the parameters and so carry a derivative; `flax.nnx.BatchNorm` cuts it with a `stop_gradient` of
  its own, the layers of `metalearn.models` do not.
- "frozen": the model's initial statistics are used throughout and never change. They have to come
  from a pre-trained network, whose `init` returns them. (Those of an untrained network are mean 0
  and variance 1; in `hk.BatchNorm` variance 0, and the result is NaN.) No dropout.

Dropout is on in inner steps, in evaluation too, where they train on the support set, unless the
policy is "frozen". It is off for queries under every policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import above, at_least, is_integer, pattern, pick
from metalearn._utils.fields import check_fields, renamed_fields
from metalearn._utils.readable import described, readable, show
from metalearn._utils.trees import filled, masked, matching, paths, split, split_by_path
from metalearn.algorithm import Algorithm
from metalearn.algorithms import pictures
from metalearn.algorithms.epochs import epochs, epochs_of_some
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.algorithms.support import check_pair, sharded
from metalearn.engines.inner_loop import depends
from metalearn.model import Model, check_dropout
from metalearn.optimizers.updates import evaluate, evaluation_params, start, update
from metalearn.unroll import Batch, Episode, GradFn, Masked, Metrics, ModelTraining, Unroll


class BatchNorm(NamedTuple):
    """A policy of batch normalisation: how a network is called on the support and query set.

    train_on_support: the `train` flag of inner steps; dropout follows it too.
    train_on_query: the `train` flag of the outer loss, without dropout.
    carry_statistics: carry running statistics from inner step to inner step, and to the query set.
    mode: the same in words.
    """

    train_on_support: bool
    train_on_query: bool
    carry_statistics: bool
    mode: str


POLICIES = {
    "transductive": BatchNorm(
        train_on_support=True,
        train_on_query=True,
        carry_statistics=False,
        mode="batch statistics and dropout in inner steps; batch statistics without dropout for "
        "queries",
    ),
    "running": BatchNorm(
        train_on_support=True,
        train_on_query=False,
        carry_statistics=True,
        mode="batch statistics and dropout in inner steps; running statistics of the support set "
        "without dropout for queries",
    ),
    "frozen": BatchNorm(
        train_on_support=False,
        train_on_query=False,
        carry_statistics=False,
        mode="initial statistics without dropout in inner steps and for queries",
    ),
}


def batch_norm_policy(name: str) -> BatchNorm:
    """Return the policy of batch normalisation with this name.

    Raises:
      ValueError: for another name, with the names there are.
    """
    return pick(POLICIES, name, "batch-normalisation policy")


class SupportAlgorithm(Algorithm):
    """What algorithms share that adapt a model to a support set (inputs, targets). Abstract.

    `model`, `batch_norm` and `inner_steps` are fields of theirs, as of `MAML`.
    """

    model: Model
    batch_norm: str
    inner_steps: int

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        """Return one key per inner step, [T]: every step reads the whole support set."""
        del episode
        return jax.random.split(key, self.inner_steps)

    def predict(self, params: Any, statistics: Any, inputs: Any, key: jax.Array | None) -> Any:
        """Return the outputs for queries [n, ...], under the policy of batch normalisation."""
        train = batch_norm_policy(self.batch_norm).train_on_query
        return self.model.apply(params, statistics, inputs, train=train, dropout=False, key=key)[0]

    def model_mode(self) -> str:
        """Say in which mode the model is in inner steps and for queries."""
        return batch_norm_policy(self.batch_norm).mode

    def support_set(self, support: Any) -> Any:
        """Return a support set; ValueError unless it is (inputs [n, ...], targets [n, ...])."""
        name = type(self).__name__
        check_pair(name, support)
        if len(support) > 2:
            raise ValueError(
                f"`{name}.adapt(support=)` takes (inputs, targets), but got {len(support)} parts. "
                f"{name} reads all examples: pass the inputs and targets of those it is to read."
            )
        return tuple(support)

    def shard_examples(self, episode: Episode, shard: Callable[[Any], Any]) -> Episode:
        """Return the episode with its support set, which all steps read, and its query sharded."""
        return sharded(episode, shard)


class Initialisation(NamedTuple):
    """The meta-parameters eta of MAML.

    params: theta_0, the learned parameters of the model: its own tree, with an `optax.MaskedNode`
      for every parameter that is not learned.
    rates: Meta-SGD: one learned rate per adapted parameter, a list of arrays like them; else None.
    """

    params: Any
    rates: Any


@renamed_fields(adapt="adapted")
@readable
@dataclasses.dataclass(frozen=True)
class MAML(SupportAlgorithm):
    """Model-agnostic meta-learning: learn the initialisation. Finn et al. 2017.

    Support and query: (inputs [n, ...], targets [n, ...]).

    Args:
      model: the network that adapts.
      objective: outputs, targets -> loss (), metrics; of the inner and of the outer loss.
      optimizer: the inner optimizer.
      inner_steps: T, inner steps in training.
      eval_steps: inner steps in evaluation; None: as in training.
      learned_rates: Meta-SGD: the initial value of the learned rates. They multiply the updates of
        the inner optimizer, so its own rate is one: `optax.sgd(1.0)`. None: no learned rates.
      first_order: treat the inner gradient as a constant in the backward pass.
      adapted: a regular expression that the paths of the adapted parameters match, such as "head",
        or a function of a path that returns whether it adapts; the other parameters stay at
        theta_0. "": all adapt.
      batch_norm: "transductive", "running" or "frozen": see `metalearn.algorithms.maml`.
      learned: the parameters that the outer loop learns, a regular expression or a function of a
        path; "": all. The others begin as the model initialises them: those that adapt begin
        there in every task, and what neither adapts nor is learned is frozen.
      proximal: iMAML: lambda, the strength of a term lambda/2 |theta - theta_0|^2 of the inner
        loss. None: no such term.
      batch: support examples of an inner step, in shuffled epochs; None: the whole support set.
    """

    model: Model
    objective: Objective = cross_entropy
    optimizer: optax.GradientTransformation = described(optax.sgd, 0.4)
    inner_steps: int = 1
    eval_steps: int | None = None
    learned_rates: float | None = None
    first_order: bool = False
    adapted: str | Callable[[str], bool] = ""
    batch_norm: str = "transductive"
    learned: str | Callable[[str], bool] = ""
    proximal: float | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("adapted", "learned"):
            if not callable(getattr(self, name)):
                pattern("MAML", **{name: getattr(self, name)})
        check_fields(self, "inner_steps", "eval_steps")
        check_dropout("MAML", self.model)
        batch_norm_policy(self.batch_norm)
        above("MAML", 0, proximal=self.proximal)
        at_least("MAML", 1, batch=self.batch)
        if not all(is_integer(n) and n >= 1 for n in (self.inner_steps, self.evaluation_steps)):
            raise ValueError(
                f"MAML adapts in at least one inner step, but inner_steps={self.inner_steps} "
                f"and eval_steps={self.eval_steps}."
            )

    @property
    def evaluation_steps(self) -> int:
        """Return the number of inner steps in evaluation."""
        return self.inner_steps if self.eval_steps is None else self.eval_steps

    def init(self, key: jax.Array) -> Initialisation:
        """Return the initialisation, and the learned rates of Meta-SGD."""
        params, _ = self.model.init(key)
        self._check_frozen(params, key)
        learned = masked(params, matching(paths(params), self.learned))
        if self.learned_rates is None:
            return Initialisation(learned, None)
        adapted, _, _ = split_by_path(params, self.adapted)
        rates = [jnp.full_like(leaf, self.learned_rates) for leaf in adapted]
        return Initialisation(learned, rates)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the adaptation to one task."""
        policy = batch_norm_policy(self.batch_norm)
        initial = None if self.learned == "" else self.model.init(key)[0]

        def whole(eta: Initialisation) -> Any:  # theta_0, with what is not learned
            return eta.params if initial is None else filled(eta.params, initial)

        def init(eta: Initialisation) -> ModelTraining:
            params = whole(eta)
            adapted, _, _ = split_by_path(params, self.adapted)
            _, statistics = self.model.init(key)
            optimizer = start(self.optimizer, self._masked(params, adapted))
            return ModelTraining(adapted, optimizer, statistics)

        def step(
            eta: Initialisation, state: ModelTraining, batch: Batch, grad: GradFn
        ) -> ModelTraining:
            params, key, data = whole(eta), batch, episode.support
            if self.batch is not None:
                key, rows = batch
                data = jax.tree.map(lambda leaf: leaf[rows], episode.support)
            theta = self._masked(params, state.params)

            def support_loss(theta: Any) -> Any:
                inputs, targets = data
                outputs, statistics = self.model.apply(
                    self._joined(params, jax.tree.leaves(theta)),
                    state.statistics,
                    inputs,
                    train=policy.train_on_support,
                    key=key,
                )
                loss, metrics = self.objective(outputs, targets)
                if self.proximal is not None:
                    start, _, _ = split_by_path(params, self.adapted)
                    moved = optax.tree.sub(jax.tree.leaves(theta), start)
                    loss = loss + self.proximal / 2 * optax.tree.norm(moved, squared=True)
                return loss, (statistics, metrics)

            evaluated = evaluate(grad, support_loss, theta)
            statistics, _ = evaluated.aux
            if self.first_order:
                constant = jax.lax.stop_gradient((evaluated.grads, evaluated.value))
                evaluated = evaluated._replace(grads=constant[0], value=constant[1])
            updates, optimizer = update(self.optimizer, evaluated, state.optimizer, theta)
            changes = jax.tree.leaves(updates)
            if eta.rates is not None:
                changes = jax.tree.map(jnp.multiply, eta.rates, changes)
            adapted = optax.apply_updates(state.params, changes)
            carried = statistics if policy.carry_statistics else state.statistics
            return ModelTraining(adapted, optimizer, carried)

        def loss(eta: Initialisation, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            inputs, targets = episode.query
            outputs = self.predict(*self.trained(eta, state), inputs, key)
            return self.objective(outputs, targets)

        return Unroll(init, step, loss)

    def _check_frozen(self, params: Any, key: jax.Array) -> None:
        """Raise ValueError if what nobody adapts or learns would be drawn anew for every task."""
        names = paths(params)
        learned, adapted = matching(names, self.learned), matching(names, self.adapted)
        if not any(adapted):
            raise ValueError(
                f"`MAML(adapted={show(self.adapted)})` chooses none of {', '.join(names)}: the "
                "inner loop would have nothing to change."
            )
        where = [not (a or b) for a, b in zip(learned, adapted, strict=True)]  # frozen

        def values(key: jax.Array) -> list[Any]:
            return split(self.model.init(key)[0], where)[0]

        if any(where) and depends(values, key):
            first = next(name for name, w in zip(names, where, strict=True) if w)
            raise ValueError(
                f"`MAML(adapted={show(self.adapted)}, learned={show(self.learned)})` leaves "
                f"{first} as the model initialises it, which is at random, anew for every task. "
                "Give the model its values, `with_params(model, params)` of `metalearn.models`; or "
                "learn it."
            )

    def _masked(self, params: Any, adapted: list[jax.Array]) -> Any:
        """Return the adapted leaves in the model's tree, an `optax.MaskedNode` for all others."""
        _, fixed, join = split_by_path(params, self.adapted)
        return join(adapted, [optax.MaskedNode()] * len(fixed))

    def _joined(self, params: Any, adapted: list[jax.Array]) -> Any:
        """Return all parameters of the model: the adapted leaves, the others as in theta_0."""
        _, fixed, join = split_by_path(params, self.adapted)
        return join(adapted, fixed)

    def trained(self, eta: Initialisation, state: ModelTraining) -> tuple[Any, Any]:
        """Return (all parameters of the model after adaptation, its running statistics)."""
        params = eta.params
        if self.learned != "":  # what is frozen is the same for every key
            params = filled(params, self.model.init(jax.random.key(0))[0])
        theta = evaluation_params(state.optimizer, self._masked(params, state.params))
        return self._joined(params, jax.tree.leaves(theta)), state.statistics

    def shard_examples(self, episode: Episode, shard: Callable[[Any], Any]) -> Episode:
        """Return the episode sharded; with `batch` its query alone, as batches are rows."""
        if self.batch is not None:
            return episode._replace(query=shard(episode.query))
        return super().shard_examples(episode, shard)

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        """Return one key per inner step, [T]; with `batch` also its support rows, [T, batch]."""
        if self.batch is None:
            return jax.random.split(key, self.inner_steps)
        key, epoch_key = jax.random.split(key)
        steps, targets = jnp.arange(self.inner_steps), episode.support[1]
        if isinstance(targets, Masked):
            rows = epochs_of_some(jnp.asarray(targets.mask), steps, self.batch, epoch_key)
        else:
            examples = jnp.arange(jax.tree.leaves(episode.support)[0].shape[0])
            rows = epochs(examples, steps, self.batch, epoch_key)
        return jax.random.split(key, self.inner_steps), rows

    def pictures(self) -> Mapping[str, Callable[..., Mapping[str, Any]]]:
        """Return "adaptation": see `metalearn.algorithms.pictures`."""
        return {"adaptation": pictures.adaptation}

    def evaluation(self) -> MAML:
        """Return the same algorithm with `eval_steps` inner steps."""
        return dataclasses.replace(self, inner_steps=self.evaluation_steps)

    def with_steps(self, steps: int) -> MAML:
        """Return the same algorithm with another number of inner steps."""
        return dataclasses.replace(self, inner_steps=steps)
