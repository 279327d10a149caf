"""Master weights: parameters in bfloat16, and the sum of their updates in float32.

A parameter in bfloat16 does not move by less than 0.4% of itself: a smaller step is rounded away,
and after T steps all of them are. So the optimizer holds a copy m of the parameters in float32,

    m_{t+1}     = m_t + u_t(float32(g_t), m_t)
    theta_{t+1} = bfloat16(m_{t+1})

where g_t is the gradient at theta_t. The derivative of the loop passes through m, so it is not
rounded from step to step either. The copy is part of the optimizer's state, and is saved with the
inner state where states are saved.

Micikevicius et al. 2017 (arXiv:1710.03740).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MasterWeights(NamedTuple):
    """The state of `master_weights`.

    params: the parameters in float32.
    inner: the state of the optimizer.
    """

    params: Any
    inner: Any


def master_weights(
    optimizer: optax.GradientTransformation, dtype: Any = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that sums its updates in float32, for parameters of lower precision.

    Its updates lead from the parameters to the rounded sum, so nothing may scale them afterwards:
    it is the outermost part, and not for `learned_rates` of MAML. An inner optimizer, and an outer
    one for an eta in bfloat16.

    Args:
      optimizer: any of optax; it sees gradients and parameters in `dtype`.
      dtype: of the sum.
    """
    extended = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> MasterWeights:
        raised = _cast(params, dtype)
        return MasterWeights(raised, optimizer.init(raised))

    def update(
        grads: Any, state: MasterWeights, params: Any = None, **extra: Any
    ) -> tuple[Any, MasterWeights]:
        if params is None:
            raise ValueError(
                "`master_weights` needs the parameters: `update(grads, state, params)`."
            )
        raised = _cast(grads, dtype)
        updates, inner = extended.update(raised, state.inner, state.params, **extra)
        after = optax.apply_updates(state.params, updates)
        moves = jax.tree.map(
            lambda m, p: m.astype(p.dtype).astype(dtype) - p.astype(dtype), after, params
        )
        return moves, MasterWeights(after, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
