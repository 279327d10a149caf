"""What an algorithm hands to an engine: an inner loop, and the task it runs on.

Meta-learning is training through training. With meta-parameters eta and inner
state theta (parameters, optimizer state, statistics, whatever the loop carries),

    theta_0     = init(eta)
    theta_{t+1} = step(eta, theta_t, batch_t, grad)        t = 0 .. T-1
    F(eta)      = loss(eta, theta_T)

and an engine returns F and dF/deta. The three functions are all it knows of the
problem, which is why any algorithm runs under any engine.

An inner loss that is a mean over examples, by construction.

A Hessian product of a mean is the mean of the Hessian products of its parts, so an engine
may take it a few examples at a time and hold the activations of those alone. It cannot see
from an arbitrary loss whether that is so: batch statistics, or weights normalised over the
batch, tie the examples together. Written as the loss of one example, they cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from metalearn._utils.trees import select


class Unroll(NamedTuple):
    """An inner loop and the loss of what it ends in, as functions of eta.

    `step` receives `grad`, a stand-in for `jax.grad` (`argnums` and `has_aux`
    included), and takes its inner gradients with it and nothing else: that is how
    an engine changes the way they are differentiated.

    init(eta) -> state: any pytree; theta_0 and whatever else the loop carries.
    step(eta, state, batch, grad) -> state: one inner step.
    loss(eta, state) -> (loss (), metrics): the outer loss, and a dictionary of scalars.
    undo(eta, next state, batch, grad) -> state: where a step can be undone, else None.
    begins: pytree like eta, the first step that reads each entry; None where all do.
    resume(state) -> state: how a state carried over from a truncated run begins the next part
      of it; None: as it is.
    """

    init: Callable[..., Any]  # eta -> state
    step: Callable[..., Any]  # eta, state, batch, grad -> state
    loss: Callable[..., Any]  # eta, state -> loss (), metrics: dict of scalars
    # Where a step can be undone: eta, next state, batch, grad -> state. It takes the gradients
    # that `step` took, at the same points and in the same order. See `metalearn.optimizers.reversible`.
    undo: Callable[..., Any] | None = None
    # Where eta comes into play entry by entry: pytree like eta, of integers known when tracing;
    # the first step that reads an entry. `Forward` leaves out what has not begun; None: all at 0.
    begins: Any = None
    # What a part of a truncated run forgets of the part before, such as a sum of losses:
    # state -> state. See `metalearn.training.truncated_unroll`.
    resume: Callable[..., Any] | None = None


def going_on(unroll: Unroll, begins: jax.Array, state: Any) -> Unroll:
    """Return the unroll from `state`, or from its own beginning where `begins` () says so."""
    resumed = state if unroll.resume is None else unroll.resume(state)

    def init(eta: Any) -> Any:
        return select(begins, unroll.init(eta), resumed)

    # When an entry of eta comes into play is no longer known when tracing.
    return unroll._replace(init=init, begins=None)


class Episode(NamedTuple):
    """One task: what the inner loop learns from, and what its result is judged on."""

    support: Any  # pytree of arrays; classification: (inputs [n, ...], labels [n])
    query: Any  # pytree of arrays; classification: (inputs [m, ...], labels [m])


@dataclasses.dataclass(frozen=True)
class ExampleMean:
    """The mean over a batch of a loss per example: theta, examples, *shared -> loss ().

    `loss(theta, example, *shared)` returns the loss () of one example, or that and an aux;
    it is vmapped over the leading axis of the leaves of `examples`, [batch, ...]. What all
    examples read alike goes into `shared`. With an aux the result is (loss (), aux), the
    leaves of aux [batch, ...], for `grad(..., has_aux=True)`.
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
