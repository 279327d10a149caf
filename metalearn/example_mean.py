"""An inner loss that is a mean over examples, by construction.

A Hessian product of a mean is the mean of the Hessian products of its parts, so an engine
may take it a few examples at a time and hold the activations of those alone. It cannot see
from an arbitrary loss whether that is so: batch statistics, or weights normalised over the
batch, tie the examples together. Written as the loss of one example, they cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


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
