"""An inner run as a function of eta: its end, its tangents and its cotangents, step by step.

Four compiled programs serve `metalearn.diagnostics.smoothness`:

    run        eta + h v  ->  theta_T and the outer loss; called for every h and v
    three      eta, v, h  ->  the metasmoothness of the runs at eta, eta + h v and eta + 2 h v
    tangents   eta, v     ->  |d theta_t / d h| and |d g_t / d h| of every inner step t, by one
                              forward pass; g_t is the inner gradient, so that the second is the
                              norm of a Hessian product (and of the mixed term, where eta is in the
                              inner loss)
    pull_back  eta        ->  the meta-gradient, |dF / d theta_t| of every t, and the directions

All of them read one task, so that nothing but eta changes between two calls, and are
deterministic: the same eta gives the same bits. theta are those leaves of the inner state that the
inner gradients are taken with respect to; where a step rebuilds them first, all floating-point
leaves of the state.

`InnerRuns` is what they have in common with a run that is cut into segments
(`metalearn.training.segmented_runs`).

The cotangents cost no memory: each step passes its state through an identity whose backward pass
returns the norm of the cotangent as the derivative with respect to a probe, a number per step.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.compiling import quick_compilation
from metalearn._utils.trees import is_differentiable, precise, split
from metalearn.engines import Reverse
from metalearn.engines.base import outer_loss
from metalearn.engines.grad_recorder import Recorder, Tape
from metalearn.engines.inner_loop import inner_loop
from metalearn.optimizers.updates import update_outer
from metalearn.tasks import (
    AtOuterStep,
    DrawnTask,
    Reads,
    Tasks,
    WithConstants,
    draw_task,
    fetched,
    fetches_key,
)
from metalearn.train_state import TrainState
from metalearn.unroll import Batch, Eta, InnerState, Unroll, horizon


class End(NamedTuple):
    """The end of an inner run.

    Args:
      theta: leaves of theta_T.
      loss: (), the outer loss.
      inner_losses: [T, n], of each step, in the order in which its inner gradients are taken.
    """

    theta: list[jax.Array]
    loss: jax.Array
    inner_losses: jax.Array


class ThreeRuns(NamedTuple):
    """Three inner runs from eta on along a random direction v.

    Args:
      metasmoothness: (), of theta_T; see `metalearn.diagnostics.smoothness`.
      losses: [3], the outer loss at eta, eta + h v and eta + 2 h v.
    """

    metasmoothness: jax.Array
    losses: jax.Array


class Tangents(NamedTuple):
    """The derivative of an inner run along one direction of eta, by forward mode.

    Args:
      slope: (), of the outer loss.
      theta: [T], the norm of the derivative of theta after each step.
      gradients: [T], the norm of the derivative of the inner gradients of each step; 0 where a step
        takes them inside of a transformation of its own.
    """

    slope: jax.Array
    theta: jax.Array
    gradients: jax.Array


class Pullback(NamedTuple):
    """The derivative of the outer loss, by reverse mode.

    Args:
      loss: (), the outer loss.
      cotangents: [T], the norm of its derivative with respect to theta after each step.
      directions: like eta, each of the norm of the scale of eta; see `scale_of`.
      slopes: [directions], of the outer loss along them.
      outer_step: (), the first update of the outer optimizer, in lengths of its direction.
    """

    loss: jax.Array
    cotangents: jax.Array
    directions: list[Eta]
    slopes: jax.Array
    outer_step: jax.Array


class InnerRuns(abc.ABC):
    """The inner run of one task, at any eta. Abstract.

    Attributes:
      key: (), draws the task.
    """

    key: jax.Array

    @property
    @abc.abstractmethod
    def horizon(self) -> int:
        """T, the inner steps that are run."""

    @abc.abstractmethod
    def run(self, v: Eta, h: float) -> End:
        """Return the end of the run at eta + h v."""

    @abc.abstractmethod
    def three(self, draw: jax.Array, h: float) -> ThreeRuns:
        """Return three runs along the random direction of a key."""

    @abc.abstractmethod
    def tangents(self, v: Eta) -> Tangents:
        """Return the tangents of the run along v, by inner step."""

    @abc.abstractmethod
    def pull_back(self, draws: Sequence[jax.Array], given: Sequence[Eta] = ()) -> Pullback:
        """Return the meta-gradient along directions, and its way back.

        The directions are the negative meta-gradient, the first update of the outer optimizer,
        those of `given`, and a random one for each key of `draws`.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class PerturbedRuns(InnerRuns):
    """The inner run of one task, at any eta, in one program.

    Args:
      trainer: a `Trainer`; its engine is not read.
      tasks: those of the next outer step, on the devices.
      state: before that outer step.
      key: (), draws the task.
      steps: inner steps; None: all T.
    """

    trainer: Any
    tasks: Tasks
    state: TrainState
    key: jax.Array
    steps: int | None

    @classmethod
    def create(
        cls, trainer: Any, state: TrainState, tasks: Tasks, key: jax.Array | None = None
    ) -> PerturbedRuns:
        """Return the run of the task that `key` draws, read from the host where it is there.

        Args:
          trainer: a `Trainer`. Of truncated unrolls the first is run, from a fresh inner state.
          state: before the outer step.
          tasks: that are trained on.
          key: (), of the task; None: the first of the outer step after `state`.
        """
        first = int(state.step) * trainer.tasks_per_step
        fetch = fetches_key(tasks, key)
        key = trainer.task_keys(state)[0] if key is None else key
        steps = None if trainer.truncation is None else trainer.truncation.steps
        if fetch:
            tasks = fetched(tasks, key[None], first, trainer.algorithm, Reads(0, steps))
        return cls(trainer, with_arguments(trainer, state, tasks), state, key, steps)

    def draw(self, tasks: Tasks, key: jax.Array) -> tuple[DrawnTask, Batch]:
        """Return the task, and the batches of its inner steps."""
        layout = self.trainer.batch.inner_layout
        task = draw_task(self.trainer.algorithm, tasks, key, layout=layout)
        return task, task.first_batches(self.steps)

    @functools.cached_property
    def horizon(self) -> int:
        """T, the inner steps that are run."""
        return horizon(jax.eval_shape(lambda *args: self.draw(*args)[1], self.tasks, self.key))

    def _end(self, eta: Eta, tasks: Tasks, key: jax.Array) -> End:
        task, batches = self.draw(tasks, key)
        state, inner = inner_loop(task.unroll, eta, batches)
        loss = outer_loss(task.unroll, eta, state)[0]
        theta = split(state, is_theta(task.unroll, eta, batches))[0]
        return End(theta, loss, inner.losses)

    @functools.cached_property
    def _run(self) -> Any:
        def run(eta: Eta, v: Eta, h: jax.Array, tasks: Tasks, key: jax.Array) -> End:
            return self._end(moved(eta, v, h), tasks, key)

        return jax.jit(run)

    def run(self, v: Eta, h: float) -> End:
        """Return the end of the run at eta + h v."""
        return self._run(self.state.eta, v, jnp.float32(h), self.tasks, self.key)

    def three(self, draw: jax.Array, h: float) -> ThreeRuns:
        """Return three runs along the random direction of a key, in one program."""

        def three(eta: Eta, h: jax.Array, draw: jax.Array, tasks: Tasks, key: jax.Array) -> Any:
            v = random_direction(eta, draw)
            sizes = h * jnp.arange(3, dtype=jnp.float32)
            ends = jax.lax.map(lambda size: self._end(moved(eta, v, size), tasks, key), sizes)
            return ThreeRuns(metasmoothness(ends.theta), ends.loss)

        return _once(three, self.state.eta, jnp.float32(h), draw, self.tasks, self.key)

    def tangents(self, v: Eta) -> Tangents:
        """Return the tangents of the run along v, by inner step. Compiled at each call."""

        def tangents(eta: Eta, v: Eta, tasks: Tasks, key: jax.Array) -> Tangents:
            task, batches = self.draw(tasks, key)
            return _push(task.unroll, eta, v, batches)

        return _once(tangents, self.state.eta, v, self.tasks, self.key)

    def pull_back(self, draws: Sequence[jax.Array], given: Sequence[Eta] = ()) -> Pullback:
        """Return the meta-gradient along directions, and its way back. Compiled at each call."""

        def pull_back(state: TrainState, given: Any, draws: Any, tasks: Any, key: Any) -> Pullback:
            task, batches = self.draw(tasks, key)
            pulled = _pulled(task.unroll, state.eta, batches)
            return along_directions(self.trainer.optimizer, state, given, draws, *pulled)

        state = dataclasses.replace(self.state, inner=())
        return _once(pull_back, state, list(given), list(draws), self.tasks, self.key)


def with_arguments(trainer: Any, state: TrainState, tasks: Tasks) -> Tasks:
    """Return tasks with what a program reads beside them: constants, and the outer step."""
    tasks = trainer.place(tasks)
    if jax.tree.leaves(trainer.constants):
        tasks = WithConstants(tasks, trainer.constants)
    return AtOuterStep(tasks, state.step) if trainer.algorithm.anneals else tasks


def along_directions(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    given: Sequence[Eta],
    draws: Sequence[jax.Array],
    loss: jax.Array,
    grads: Eta,
    cotangents: jax.Array,
) -> Pullback:
    """Return the directions that a meta-gradient leads to, and its slope along them.

    Args:
      optimizer: the outer optimizer.
      state: before the outer step.
      given: further directions.
      draws: keys of random ones.
      loss: (), the outer loss.
      grads: the meta-gradient.
      cotangents: [T], see `Pullback`.
    """
    update, _ = update_outer(optimizer, grads, state.optimizer, state.eta, loss)
    size = optax.tree.norm(scale_of(state.eta))
    descent, followed = (scaled(tree, size) for tree in (optax.tree.scale(-1, grads), update))
    directions = [descent, followed, *given]
    directions += [random_direction(state.eta, draw) for draw in draws]
    slopes = jnp.stack([optax.tree.vdot(grads, v) for v in directions])
    return Pullback(loss, cotangents, directions, slopes, optax.tree.norm(update) / size)


def metasmoothness(thetas: Sequence[jax.Array]) -> jax.Array:
    """Return the empirical metasmoothness () of three ends of training, leaves [3, ...].

    See `metalearn.diagnostics.smoothness`. NaN where nothing moves, or a parameter is not finite.
    """
    agreement = total = jnp.float32(0)
    for leaf in thetas:
        first, second, third = precise(leaf)
        weights = jnp.abs(third - first)
        agreement += jnp.sum(weights * jnp.sign(second - first) * jnp.sign(third - second))
        total += jnp.sum(weights)
    return agreement / total


def _once(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, compiled to run once."""
    return jax.jit(function, compiler_options=quick_compilation())(*args)


def moved(eta: Eta, v: Eta, h: jax.Array) -> Eta:
    """Return eta + h v."""
    return jax.tree.map(lambda x, d: x + h.astype(x.dtype) * d.astype(x.dtype), eta, v)


def scale_of(eta: Eta) -> Eta:
    """Return the scale of every entry of eta, like eta, by which a unit step moves it.

    That is the root mean square of its leaf, and 1 at most. A leaf that is zero has the scale of
    all of eta, and an eta that is zero the scale 1: what is learned as a logarithm or as a change
    has a natural unit, and parameters of a network move in shares of their size.
    """

    def rms(leaf: jax.Array) -> jax.Array:
        squares = jnp.square(leaf.astype(jnp.float32))
        return jnp.sqrt(jnp.sum(squares) / max(leaf.size, 1))

    count = sum(leaf.size for leaf in jax.tree.leaves(eta))
    whole = optax.tree.norm(eta) / jnp.sqrt(float(count))
    whole = jnp.where(whole > 0, jnp.minimum(whole, 1.0), 1.0)

    def scale(leaf: jax.Array) -> jax.Array:
        own = rms(leaf)
        own = jnp.where(own > 0, jnp.minimum(own, 1.0), whole)
        return jnp.full(leaf.shape, own.astype(leaf.dtype))

    return jax.tree.map(scale, eta)


def random_direction(eta: Eta, key: jax.Array) -> Eta:
    """Return a direction of independent Gaussian entries, times the scale of eta."""
    leaves, treedef = jax.tree.flatten(eta)
    keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))

    def draw(scale: jax.Array, key: jax.Array) -> jax.Array:
        return scale * jax.random.normal(key, scale.shape, scale.dtype)

    return jax.tree.map(draw, scale_of(eta), keys)


def scaled(tree: Eta, size: jax.Array) -> Eta:
    """Return the tree with a norm of `size`; zeros stay zeros."""
    norm = optax.tree.norm(tree)
    return optax.tree.scale(jnp.where(norm > 0, size / jnp.where(norm > 0, norm, 1), 0), tree)


def is_theta(unroll: Unroll, eta: Eta, batches: Batch) -> list[bool]:
    """Return of each leaf of the inner state whether it is part of theta; see above."""
    theta: list[bool] = []

    def step(eta: Eta, batches: Batch) -> InnerState:
        recorder = Recorder(jax.value_and_grad)
        state, batch = unroll.init(eta), jax.tree.map(lambda x: x[0], batches)
        unroll.step(eta, state, batch, recorder.grad)
        theta.extend(recorder.differentiated(state))
        return state

    state = jax.eval_shape(step, eta, batches)
    return theta if any(theta) else [is_differentiable(leaf) for leaf in jax.tree.leaves(state)]


class Carry(NamedTuple):
    """An inner state with its tangent along one direction of eta.

    Args:
      floats: leaves of the state that carry derivatives.
      others: its other leaves.
      tangents: of `floats`.
    """

    floats: list[jax.Array]
    others: list[Any]
    tangents: list[jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Pushed:
    """The tangent of d/dh at eta + h v, pushed through an inner loop in as many parts as one likes.

    Args:
      unroll: the inner loop.
      eta: the meta-parameters.
      v: the direction, like eta.
    """

    unroll: Unroll
    eta: Eta
    v: Eta

    def _at(self, h: jax.Array) -> Eta:
        return moved(self.eta, self.v, h)

    def start(self) -> Carry:
        """Return theta_0 with its tangent."""

        def init(h: jax.Array) -> Any:
            return split(self.unroll.init(self._at(h)))[:2]

        zero, one = jnp.float32(0), jnp.float32(1)
        floats, tangents, others = jax.jvp(init, (zero,), (one,), has_aux=True)
        return Carry(floats, others, tangents)

    def advance(self, carry: Carry, batches: Batch) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
        """Take some inner steps: (carry, norms [K] of the tangents of theta, of the gradients)."""
        theta = is_theta(self.unroll, self.eta, batches)
        state = jax.eval_shape(self.unroll.init, self.eta)
        kinds = [is_differentiable(leaf) for leaf in jax.tree.leaves(state)]
        of_floats = [part for part, is_float in zip(theta, kinds, strict=True) if is_float]

        def body(carry: Carry, batch: Any) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
            def step(floats: list[jax.Array], h: jax.Array) -> Any:
                tape = Tape()
                recorder = Recorder(tape.recording(jax.value_and_grad))
                before = self._join(floats, carry.others)
                state = self.unroll.step(self._at(h), before, batch, recorder.grad)
                results = [result[1] for result in tape.results if result is not None]
                after, others, _ = split(state)
                return (after, split(results)[0]), others

            primals, (tangents, of_gradients), others = jax.jvp(
                step,
                (carry.floats, jnp.float32(0)),
                (carry.tangents, jnp.float32(1)),
                has_aux=True,
            )
            of_theta = [t for t, part in zip(tangents, of_floats, strict=True) if part]
            return Carry(primals[0], others, tangents), (_norm(of_theta), _norm(of_gradients))

        return jax.lax.scan(body, carry, batches)

    def slope(self, carry: Carry) -> jax.Array:
        """Return the derivative () of the outer loss, from the carry after the last step."""

        def loss(floats: list[jax.Array], h: jax.Array) -> jax.Array:
            return outer_loss(self.unroll, self._at(h), self._join(floats, carry.others))[0]

        primals, tangents = (carry.floats, jnp.float32(0)), (carry.tangents, jnp.float32(1))
        return jax.jvp(loss, primals, tangents)[1]

    def _join(self, floats: list[jax.Array], others: list[Any]) -> InnerState:
        return split(self.unroll.init(self.eta))[2](floats, others)


def _push(unroll: Unroll, eta: Eta, v: Eta, batches: Batch) -> Tangents:
    """Push the tangent of d/dh at eta + h v through the loop."""
    pushed = Pushed(unroll, eta, v)
    carry, norms = pushed.advance(pushed.start(), batches)
    return Tangents(pushed.slope(carry), *norms)


def probed(unroll: Unroll, theta: Sequence[bool]) -> Unroll:
    """Return an unroll whose eta is (eta, probes [T]), and whose batches have step numbers beside.

    The derivative with respect to a probe is the norm of the cotangent of theta after its step.

    Args:
      unroll: of eta.
      theta: of each leaf of the inner state whether it is part of theta.
    """

    @jax.custom_vjp
    def tap(floats: list[jax.Array], probe: jax.Array) -> list[jax.Array]:
        return floats

    def forward(floats: list[jax.Array], probe: jax.Array) -> tuple[list[jax.Array], None]:
        return floats, None

    def backward(_: None, cotangents: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        return cotangents, _norm(cotangents)

    tap.defvjp(forward, backward)

    def step(probed: Any, state: InnerState, batch: Any, grad: Any) -> InnerState:
        eta, probes = probed
        after = unroll.step(eta, state, batch[0], grad)
        floats, others, join = split(after, theta)
        return join(tap(floats, probes[batch[1]]), others)

    return Unroll(
        lambda probed: unroll.init(probed[0]),
        step,
        lambda probed, state: unroll.loss(probed[0], state),
    )


def _pulled(unroll: Unroll, eta: Eta, batches: Batch) -> tuple[jax.Array, Eta, jax.Array]:
    """Return (outer loss (), meta-gradient, norms [T] of the cotangents of theta)."""
    steps = jnp.arange(horizon(batches))
    with_probes = probed(unroll, is_theta(unroll, eta, batches))
    probes = jnp.zeros(steps.shape, jnp.float32)
    engine = Reverse("nested")
    (loss, _), (grads, norms) = engine.value_and_grad(with_probes, (eta, probes), (batches, steps))
    return loss, grads, norms


def _norm(leaves: Sequence[jax.Array]) -> jax.Array:
    """Return the norm () of some arrays together, in float32."""
    squares = [jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32))) for leaf in leaves]
    return jnp.sqrt(sum(squares, jnp.float32(0)))
