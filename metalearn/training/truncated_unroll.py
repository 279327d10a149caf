"""Truncated unrolls: eta is updated every K inner steps, inner states are carried on.

A learned optimizer is meant for thousands of inner steps. With full unrolls, one update of eta
costs one such inner loop, and its derivative through so many steps is often chaotic. So the inner
loop is cut into truncations of K steps: each outer step unrolls the next K steps of every task
from its carried inner state, and takes the outer loss at the end of the truncation,

    theta_{(i+1)K} = K steps from theta_{iK}, a constant            dF/deta through those K alone

A task is unrolled up to its horizon N and then replaced by a new one. So that not all tasks of a
batch end together, the first horizons are staggered: cut to fractions of their length. Horizons
drawn log-uniformly train eta on many beginnings and some long inner loops (Metz et al. 2020,
arXiv:2009.11243).

Ignoring the derivative through earlier truncations biases the meta-gradient towards the short
term (Wu et al. 2018, arXiv:1803.02021). `metalearn.PES` is unbiased, at the cost of variance.

Each task may have a transformation of its own of its meta-gradients, such as Adam's, whose state is
carried with the task and outlives its inner loop: the tasks of a batch are then a population whose
updates are averaged, and one whose meta-gradients are large does not outweigh the others (Calian et
al. 2025, arXiv:2505.17895). It costs the memory of its state, times the number of tasks.

Non-finite tasks are masked out of the mean, counted (`tasks_reset`) and replaced; the others are
not affected.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import Count, is_integer
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import described, readable
from metalearn._utils.trees import select
from metalearn.sharding.batched_means import divisors
from metalearn.tasks import Tasks
from metalearn.training.faults import all_finite, mean_of_finite, or_zero
from metalearn.training.full_unroll import FullUnroll, step_metrics
from metalearn.unroll import Eta, InnerState, Metrics, horizon, resumed


@readable
@dataclasses.dataclass(frozen=True)
class Truncation:
    """How unrolls are truncated. The longest horizon T is the algorithm's own number of steps.

    The outer loss is taken at the end of every truncation. Reverse and forward engines see how
    `init` depends on eta in the first truncation of a task only: a learned initialisation is
    better trained with full unrolls, or by `PES`.

    Args:
      steps: K, inner steps between two updates of eta. Divides T.
      shortest: horizons are drawn log-uniformly between `shortest` and T, as multiples of K;
        None: all horizons are T.
      staggered: cut the first horizons to fractions of their length, so that tasks end at
        different outer steps.
      transform: of the meta-gradient of each task, before the mean over tasks, such as
        `optax.scale_by_adam()`. It rescales: the outer optimizer descends.
    """

    steps: int
    shortest: Count | None = None
    staggered: bool = True
    transform: optax.GradientTransformation = described(optax.identity)

    def __post_init__(self) -> None:
        check_fields(self, "steps")
        if not is_integer(self.steps) or self.steps < 1:
            raise ValueError(
                f"`Truncation(steps={self.steps})`: A truncation takes at least one inner step, "
                f"not {self.steps}."
            )
        if self.shortest is not None and self.shortest < self.steps:
            raise ValueError(
                f"No horizon is shorter than a truncation: shortest={self.shortest}, steps="
                f"{self.steps}. Take shortest >= {self.steps}, or shorter truncations."
            )
        if self.transform is not type(self).transform:
            _check_transform(self.transform)

    def check(self, horizon: int) -> None:
        """Raise ValueError where `horizon` inner steps cannot be truncated like this."""
        if not horizon:
            raise ValueError(
                f"`Trainer(truncation=Truncation({self.steps}))` cuts inner loops into "
                "truncations, but these take no inner steps (T = 0). Leave `truncation`."
            )
        if self.steps > horizon:
            raise ValueError(
                f"A truncation of {self.steps} inner steps is longer than the horizon, which is "
                f"{horizon}. Take at most {horizon} steps, or a longer inner loop."
            )
        if horizon % self.steps:
            raise ValueError(
                f"A horizon of {horizon} inner steps does not divide into truncations of "
                f"{self.steps}. Lengths that fit: {divisors(horizon)}."
            )
        if self.shortest is not None and self.shortest > horizon:
            raise ValueError(
                f"shortest={self.shortest}, but the longest horizon, the algorithm's own number "
                f"of inner steps, is {horizon}."
            )

    def draw(self, key: jax.Array, longest: int, share: jax.Array) -> jax.Array:
        """Draw the horizon of a new task: (), int32, a multiple of K, times `share` ()."""
        # In truncations, from the fewest that reach `shortest`; rounded down from below one more
        # than the most, so that each number has its share. A little keeps 2 from becoming 1.99999.
        most = longest // self.steps
        fewest = most if self.shortest is None else -(-self.shortest // self.steps)
        low, high = jnp.log(float(fewest)), jnp.log(float(most + 1))
        drawn = jnp.floor(jnp.exp(jax.random.uniform(key, minval=low, maxval=high)) + 1e-4)
        cut = jnp.ceil(share * jnp.clip(drawn, fewest, most) - 1e-4)
        return jnp.maximum(cut, 1).astype(jnp.int32) * self.steps

    def shares(self, tasks: int, begins: jax.Array) -> jax.Array:
        """Return the fraction of its horizon that each task gets [tasks]; 1 after the first step.

        `begins`: (), bool: whether this is the first outer step.
        """
        cut = (jnp.arange(tasks) + 1.0) / tasks
        return jnp.where(begins & self.staggered, cut, 1.0)


class CarriedUnroll(NamedTuple):
    """An inner loop between two truncations. In a train state, leaves are [tasks, ...]."""

    key: jax.Array  # (): it draws the task, its horizon and its batches
    step: jax.Array  # (), int32: inner steps taken
    horizon: jax.Array  # (), int32: inner steps it will take; 0: a new task is drawn next
    state: InnerState
    engine: Any  # the engine's own state
    transform: Any  # the state of the transformation of its meta-gradients


@dataclasses.dataclass(frozen=True)
class TruncatedUnroll(FullUnroll):
    """Truncated unrolls carried across outer steps; non-finite tasks are masked and replaced.

    truncation: how many inner steps an outer step takes, and up to which horizons.
    """

    truncation: Truncation

    def begin(self, eta: Eta, tasks: Tasks | None, keys: jax.Array) -> CarriedUnroll:
        """Return placeholders [tasks] of horizon 0, which trigger the drawing of new tasks."""
        if tasks is None:
            raise ValueError(
                "Truncated training carries inner states from step to step, and their shapes "
                "are those of the tasks: call `Trainer.init(key, tasks)`."
            )

        def placeholder(eta: Eta, tasks: Tasks, key: jax.Array) -> CarriedUnroll:
            task, zero = self.draw(tasks, key), jnp.zeros((), jnp.int32)
            engine = self.engine.init(task.engine_key, task.unroll, eta)
            transform = self.truncation.transform.init(eta)
            return CarriedUnroll(key, zero, zero, task.unroll.init(eta), engine, transform)

        return jax.jit(jax.vmap(placeholder, (None, None, 0)))(eta, tasks, keys)

    def next_steps(
        self, carried: CarriedUnroll, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return (whether it is over, key, first step) of each unroll's next truncation.

        Args:
          carried: where the unrolls stand.
          keys: of the new tasks that replace those whose horizon is over.
        """
        ends = carried.step >= carried.horizon
        start = select(ends, jnp.zeros_like(carried.step), carried.step)
        return ends, select(ends, keys, carried.key), start

    def mean_gradient(
        self, eta: Eta, tasks: Tasks, keys: jax.Array, carried: Any, first: jax.Array
    ) -> tuple[Eta, Metrics, CarriedUnroll]:
        if not isinstance(carried, CarriedUnroll):
            raise ValueError(
                "This state has no inner runs to go on with: it is not of truncated training, or "
                "was read without its tasks. Begin with `Trainer.init(key, tasks)` of this "
                "trainer, or read it by `Trainer.restore(directory, tasks)`."
            )
        shares = self.truncation.shares(self.batch.size, first)
        inputs = carried, keys, shares
        means, carried = self.batch.mean_and_each(self._advance, (eta, tasks), inputs)
        grads, metrics, left_out = mean_of_finite(means, self.batch.size)
        return grads, {**metrics, "tasks_reset": left_out}, carried

    def _advance(
        self, eta: Eta, tasks: Tasks, run: tuple[CarriedUnroll, jax.Array, jax.Array]
    ) -> tuple[Any, CarriedUnroll]:
        """Take the next K steps of an unroll, or the first of a new one where its horizon is over.

        `run`: (where the unroll stands, the key of a new task, the share of its horizon that a
        new task gets). Returns ((meta-gradient, metrics, finite), where the unroll stands now);
        a task that is not finite counts as zero, with finite=False.
        """
        carried, new_key, share = run
        ends, key, start = self.next_steps(carried, new_key)
        task = self.draw(tasks, key)
        longest = horizon(jax.eval_shape(task.batches))
        self.truncation.check(longest)
        # 2^31 - 1 is no task's: what is drawn here is drawn from nothing else.
        drawn = self.truncation.draw(jax.random.fold_in(key, 2**31 - 1), longest, share)
        last = select(ends, drawn, carried.horizon)
        batches = task.batches_at(start + jnp.arange(self.truncation.steps, dtype=jnp.int32))
        fresh = self.engine.init(task.engine_key, task.unroll, eta)
        engine = select(ends, fresh, carried.engine)
        unroll = resumed(task.unroll, ends, carried.state)
        (loss, aux), grads = self.engine.value_and_grad(unroll, eta, batches, engine)
        finite = all_finite(loss, aux, grads)
        grads, transform = self.truncation.transform.update(grads, carried.transform, eta)
        transform = select(finite, transform, carried.transform)
        step = jnp.where(finite, start + self.truncation.steps, last)
        after = CarriedUnroll(key, step, last, aux.state, aux.engine, transform)
        return or_zero(finite, (grads, step_metrics(loss, aux))), after


def _check_transform(transform: optax.GradientTransformation) -> None:
    """Raise ValueError for a transformation that changes the sign of a gradient, as optimizers do.

    The outer optimizer would then ascend.
    """
    with jax.ensure_compile_time_eval():
        one = jnp.ones(1)
        try:
            update, _ = transform.update(one, transform.init(one), one)
        except Exception:  # it needs the tree of eta, such as one by names of parameters
            return
        value = float(update[0])
    if value < 0:
        raise ValueError(
            f"`Truncation(transform=)` turns the meta-gradient 1 into {value:.3g}: it descends, as "
            "an optimizer with a learning rate does, and the outer optimizer, which descends as "
            "well, would go uphill. Take a transformation that rescales, such as "
            "`optax.scale_by_adam()` in place of `optax.adam(1e-3)`, and give the learning rate to "
            "the outer optimizer, such as `optax.sgd(1e-3)`."
        )
