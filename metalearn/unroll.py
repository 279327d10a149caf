"""Interface between algorithms and engines: an inner loop as functions of eta.

Meta-learning is training through training. With meta-parameters eta and inner
state theta (parameters, optimizer state, statistics, whatever the loop carries),

    theta_0     = init(eta)
    theta_{t+1} = step(eta, theta_t, batch_t, grad)        t = 0 .. T-1
    F(eta)      = loss(eta, theta_T)

and an engine returns F and dF/deta. The three functions are all it knows of the
problem, which is why any algorithm runs under any engine. T may be 0: an algorithm that adapts in
closed form does all its work in `init`, and its `step` is never run.

An inner loss that is a mean over examples may say so (`ExampleMean`). A Hessian product of a
mean is the mean of the Hessian products of its parts, so an engine may take it a few examples
at a time and hold the activations of those alone. It cannot see from an arbitrary loss whether
that is so: batch statistics, or weights normalised over the batch, tie the examples together.
Written as the loss of one example, they cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from metalearn._utils.trees import select

Eta: TypeAlias = Any  # meta-parameters: a pytree of real floating-point arrays
InnerState: TypeAlias = Any  # what the inner loop carries from step to step: any pytree
Batch: TypeAlias = Any  # what inner steps read: any pytree of arrays
Metrics: TypeAlias = dict[str, jax.Array]  # scalars () by name


class GradFn(Protocol):
    """The `grad` that an inner step receives: a stand-in for `jax.grad`, from the engine."""

    def __call__(
        self, fun: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
    ) -> Callable[..., Any]:
        """Return the gradient function of `fun`, which returns a real loss (), or (loss, aux)."""


class Unroll(NamedTuple):
    """An inner loop and the loss of the state it ends in, as functions of eta.

    `step` receives `grad`, a stand-in for `jax.grad` (`argnums` and `has_aux`
    included), and takes its inner gradients with it and nothing else: that is how
    an engine changes the way they are differentiated.

    init: eta -> theta_0, any pytree.
    step: eta, state, batch, grad -> state, one inner step.
    loss: eta, state -> (outer loss (), metrics), a dictionary of scalars.
    undo: eta, next state, batch, grad -> state, the inverse of a step; None where there is none.
      It takes the gradients that `step` took, at the same points and in the same order. See
      `metalearn.optimizers.reversible`.
    begins: pytree like eta, of integers known when tracing: the first inner step that reads each
      entry. `Forward` skips tangents that are still zero. None: all entries are read at step 0.
    resume: state -> state, applied to a state carried over from the truncated unroll before, for
      instance to reset a running sum of losses; None: the state as it is.
    """

    init: Callable[[Eta], InnerState]
    step: Callable[[Eta, InnerState, Batch, GradFn], InnerState]
    loss: Callable[[Eta, InnerState], tuple[jax.Array, Metrics]]
    undo: Callable[[Eta, InnerState, Batch, GradFn], InnerState] | None = None
    begins: Any = None
    resume: Callable[[InnerState], InnerState] | None = None


def resumed(unroll: Unroll, fresh: jax.Array, state: InnerState) -> Unroll:
    """Return the unroll from `state`, or from its own `init` where `fresh` () is true."""
    start = state if unroll.resume is None else unroll.resume(state)

    def init(eta: Eta) -> InnerState:
        return select(fresh, unroll.init(eta), start)

    # Which step first reads an entry of eta is no longer known when tracing.
    return unroll._replace(init=init, begins=None)


def horizon(batches: Batch) -> int:
    """Return T, the leading axis that all leaves of `batches` share; 0: no inner steps."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    lengths = {shape[0] if shape else None for shape in shapes}
    if len(lengths) != 1 or None in lengths:
        listed = sorted(str(shape) for shape in shapes) or "no leaves at all"
        raise ValueError(
            "The leaves of `batches` must share a leading axis of T inner steps, but their "
            f"shapes are {listed}. An inner loop that reads no data takes `jnp.arange(T)`."
        )
    return int(lengths.pop())  # type: ignore[arg-type]


class ModelTraining(NamedTuple):
    """The inner state of an algorithm whose inner loop trains a model with an optimizer.

    Args:
      params: theta, or the leaves of it that are adapted.
      optimizer: the inner optimizer's state.
      statistics: the model's mutable state.
    """

    params: Any
    optimizer: Any
    statistics: Any


class Episode(NamedTuple):
    """One task: what the inner loop learns from, and what its result is judged on."""

    support: Any  # pytree of arrays; classification: (inputs [n, ...], labels [n])
    query: Any  # pytree of arrays; classification: (inputs [m, ...], labels [m])


class TaskKeys(NamedTuple):
    """The keys () of a task: of its episode, its unroll, its inner batches and its engine."""

    episode: jax.Array
    unroll: jax.Array
    batches: jax.Array
    engine: jax.Array


def task_keys(key: jax.Array) -> TaskKeys:
    """Return the keys of the task that `key` () draws."""
    return TaskKeys(*jax.random.split(key, 4))


class Masked(NamedTuple):
    """Targets of a set of which some examples are padding, so that unequal tasks have one shape.

    The objectives of `metalearn.algorithms` leave the padding out of their means:
    `(inputs, Masked(targets, mask))` in place of `(inputs, targets)`.

    Args:
      values: [n, ...], the targets; those of padding are not read.
      mask: [n] bool, true for the examples that count.
    """

    values: Any
    mask: Any


@dataclasses.dataclass(frozen=True)
class ExampleMean:
    """The mean over a batch of a loss per example: theta, examples, *shared -> loss ().

    What all examples read alike goes into `shared`. With an aux the result is (loss (), aux),
    the leaves of aux [batch, ...], for `grad(..., has_aux=True)`.

    Args:
      loss: theta, example, *shared -> the loss () of one example, or that and an aux. Vmapped over
        the leading axis of the leaves of `examples`, [batch, ...].
    """

    loss: Callable[..., Any]

    def __call__(self, theta: Any, examples: Any, *shared: Any) -> Any:
        """Return the mean loss (), with the aux of all examples if there is one."""
        axes = (None, 0, *(None for _ in shared))
        result = jax.vmap(self.loss, in_axes=axes)(theta, examples, *shared)
        if isinstance(result, tuple):
            losses, aux = result
            return losses.mean(), aux
        return result.mean()
