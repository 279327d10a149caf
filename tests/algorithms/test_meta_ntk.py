"""MetaNTK: a kernel ridge regression with the Jacobian of the network."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import Masked
from metalearn.algorithms import MetaNTK, squared_error
from metalearn.engines.inner_loop import rollout
from metalearn.unroll import Episode
from tests.cases import MODELS, TASKS, Float64, to_float64
from tests.helpers.selection import quick

KEY = jax.random.key(6)


def sinusoid(adapted=""):
    algorithm = MetaNTK(
        Float64(MODELS["Functions"]), squared_error, adapted, penalty=0.03, scale=None
    )
    return algorithm, to_float64(algorithm.init(KEY)), to_float64(TASKS["Sinusoid"].sample(KEY))


def predictions(algorithm, eta, episode, inputs):
    @jax.jit
    def run(eta, episode, inputs):
        _, aux = rollout(algorithm.unroll(episode, KEY), eta, algorithm.batches(episode, KEY))
        return algorithm.predict(*algorithm.trained(eta, aux.state), inputs, KEY)

    return run(eta, episode, inputs)


@pytest.mark.parametrize("adapted", quick(["", "head"], lambda adapted: adapted == "head"))
def test_it_is_where_descent_of_the_linearised_network_with_weight_decay_ends(adapted, x64):
    algorithm, eta, episode = sinusoid(adapted)
    (inputs, targets), (queries, _) = episode
    flat, unravel = ravel_pytree(eta.params)
    chosen = {name: jnp.full(w.shape, adapted in name) for name, w in eta.params.items()}
    moves = ravel_pytree(chosen)[0]

    def outputs(flat, inputs):
        params = unravel(flat)
        return (jnp.tanh(inputs @ params["body"]) @ params["head"])[:, 0]

    @jax.jit
    def descended(flat):
        jacobian = jax.jacobian(outputs)(flat, inputs) * moves[None]
        decay = 0.03 * jnp.trace(jacobian @ jacobian.T) / len(inputs)

        def step(delta, _):
            error = outputs(flat, inputs) + jacobian @ delta - targets[:, 0]
            return delta - 0.02 * (jacobian.T @ error + decay * delta), None

        delta, _ = jax.lax.scan(step, jnp.zeros_like(flat), None, 30_000)
        _, change = jax.jvp(lambda flat: outputs(flat, queries), (flat,), (delta,))
        return outputs(flat, queries) + change

    ours = predictions(algorithm, eta, episode, queries)[:, 0]
    np.testing.assert_allclose(ours, descended(flat), rtol=1e-6)


@pytest.mark.slow
def test_padding_has_no_effect(x64):
    algorithm, eta, episode = sinusoid()
    inputs, targets = episode.support
    n = len(inputs)
    padded = Episode(
        (
            jnp.concatenate([inputs, inputs + 1]),
            Masked(jnp.concatenate([targets, targets]), jnp.arange(2 * n) < n),
        ),
        episode.query,
    )
    ours, expected = (predictions(algorithm, eta, e, episode.query[0]) for e in (padded, episode))
    np.testing.assert_allclose(ours, expected, rtol=1e-10)


def test_parameters_in_bfloat16_have_a_regression_in_float32():
    algorithm = MetaNTK(MODELS["Functions"], squared_error, penalty=1.0, scale=None)
    (support, queries), eta = TASKS["Sinusoid"].sample(KEY), algorithm.init(KEY)

    def cast(tree, dtype):
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def predicted(dtype):
        here = eta._replace(params=cast(cast(eta.params, jnp.bfloat16), dtype))
        inputs, targets = cast(cast((support[0], support[1]), jnp.bfloat16), dtype)
        learner = algorithm.adapt(here, (inputs, targets), KEY)
        return learner.predict(cast(cast(queries[0], jnp.bfloat16), dtype))

    outputs = predicted(jnp.bfloat16)
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(outputs, predicted(jnp.float32), rtol=0.05, atol=0.02)


def test_targets_of_another_shape_are_refused():
    algorithm, eta, episode = sinusoid()
    flat = Episode((episode.support[0], episode.support[1][:, 0]), episode.query)
    message = (
        "`MetaNTK` fits each output to its target, but the outputs are [3, 1] and the targets [3]. "
        "Give them one shape, or integer labels [n] to outputs [n, classes]."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        predictions(algorithm, eta, flat, episode.query[0])
