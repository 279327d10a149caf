"""Whether a start depends on eta, read off its jaxpr."""

import jax
import jax.numpy as jnp
import pytest

from metalearn.engines.inner_loop import depends


def _through_a_reference(x):
    ref = jax.new_ref(jnp.zeros(3))
    ref[...] = 2 * x
    return jax.freeze(ref)


ETA = {"a": jnp.ones(3), "b": jnp.ones(())}


@pytest.mark.parametrize(
    "function",
    [
        lambda eta: eta,
        lambda eta: {"theta": jnp.zeros(2), "rate": 2 * eta["b"]},
        lambda eta: jax.jit(jnp.sin)(eta["a"]),
        lambda eta: _through_a_reference(eta["a"]),
        lambda eta: jax.lax.scan(lambda c, x: (c + x, None), 0.0, eta["a"])[0],
    ],
)
def test_dependence_is_found_through_any_operation(function):
    assert depends(function, ETA)


@pytest.mark.parametrize(
    "function",
    [
        lambda eta: jnp.zeros(3),
        lambda eta: jax.tree.map(jnp.zeros_like, eta),
        lambda eta: (jnp.zeros(2), eta["a"].argmax()),
    ],
)
def test_constants_shapes_and_integers_do_not_depend(function):
    assert not depends(function, ETA)
