"""MAML's sine waves."""

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.datasets import Sinusoid


def test_support_and_query_are_points_of_one_sine_wave():
    (x, y), (query_x, query_y) = Sinusoid(shots=10, queries=30).sample(jax.random.key(0))
    assert x.shape == y.shape == (10, 1) and query_x.shape == query_y.shape == (30, 1)
    assert x.dtype == y.dtype == jnp.float32
    # y = a sin x + b cos x: fit a and b on the support, predict the query.
    basis, query_basis = (
        np.concatenate([np.sin(x, dtype=float), np.cos(x, dtype=float)], 1) for x in (x, query_x)
    )
    weights = np.linalg.lstsq(basis, np.asarray(y, float), rcond=None)[0]
    np.testing.assert_allclose(query_basis @ weights, query_y, atol=1e-4)
    assert 0.1 <= np.linalg.norm(weights) <= 5.0


def test_ranges_are_those_of_the_paper():
    keys = jax.random.split(jax.random.key(0), 2000)
    x, y = jax.jit(jax.vmap(Sinusoid().sample))(keys).support
    assert -5 <= x.min() < -4.99 and 4.99 < x.max() <= 5
    assert 4.9 < jnp.abs(y).max() <= 5
    # E[y**2] = E[A**2] E[sin**2], about 25.5 / 3 * 1/2 with sin**2 averaged over the phase.
    assert abs(float((y**2).mean()) - (5**3 - 0.1**3) / (3 * 4.9) / 2) < 0.2


def test_it_is_a_pytree_without_leaves_and_equal_by_value():
    assert jax.tree.leaves(Sinusoid()) == []
    assert Sinusoid(shots=5) == Sinusoid(shots=5) != Sinusoid()
    sample = jax.jit(lambda tasks, key: tasks.sample(key))
    assert sample(Sinusoid(shots=5), jax.random.key(0)).support[0].shape == (5, 1)


def test_the_same_key_gives_the_same_wave():
    once, again = (Sinusoid().sample(jax.random.key(7)) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), once, again))
