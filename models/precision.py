"""Precision: a model with its parameters, or its computation, in bfloat16.

bfloat16 has the range of float32 and 8 significant bits, so a rounded number is off by up to 0.4%.
Two things may be in it, and each has its price:

- `compute`: parameters and inputs are rounded when the model is called. Activations take half the
  memory, and matrix products are fast on accelerators. Parameters, gradients and updates are
  float32, and so is the meta-gradient.
- `params`: theta itself is held in it, and so are its gradient and its updates. A step below 0.4%
  of a parameter is lost: `metalearn.optimizers.master_weights` keeps the sum of steps in float32.

The meta-gradient of either is that of the float32 model but for a few percent: a test holds it
below 5% of its norm, under every exact engine. Outputs are at least float32, and so are losses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn._utils.trees import in_dtypes_of
from metalearn.model import Model


@readable
@dataclasses.dataclass(frozen=True)
class Precision(Model):
    """A model whose parameters are held, or that is computed, in another floating-point type.

    The model's state keeps its types, and outputs are at least float32.

    Args:
      model: any.
      compute: the type that parameters and inputs are rounded to when the model is called, such as
        `jnp.bfloat16`; None: as they are.
      params: the type in which parameters are held; None: that of the model.
    """

    model: Model
    compute: Any = None
    params: Any = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("compute", "params"):
            dtype = getattr(self, name)
            if dtype is not None and not _is_floating(dtype):
                raise ValueError(
                    f"`Precision({name}={dtype!r})`: it is a floating-point type, such as "
                    "`jnp.bfloat16`, or None."
                )

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state)."""
        params, state = self.model.init(key)
        return _cast(params, self.params), state

    def apply(
        self,
        params: Any,
        state: Any,
        inputs: Any,
        *,
        train: bool,
        dropout: bool = True,
        key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Return (outputs, new state)."""
        params, inputs = _cast((params, inputs), self.compute)
        outputs, new = self.model.apply(
            params, state, inputs, train=train, dropout=dropout, key=key
        )
        outputs = jax.tree.map(_at_least_float32, outputs)
        return outputs, in_dtypes_of(state, new)


def _is_floating(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _cast(tree: Any, dtype: Any) -> Any:
    """Return a tree with its floating-point leaves in a type; None: as it is."""
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree
    )


def _at_least_float32(x: jax.Array) -> jax.Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if floating else x
