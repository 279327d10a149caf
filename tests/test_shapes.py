"""The shapes that signatures state are checked while tests run: see conftest.py."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from metalearn.algorithms.loss_weights.features import auc
from metalearn.models.attention import causal_attention


def test_an_argument_of_another_shape_is_found():
    with pytest.raises(TypeCheckError, match="positive"):
        auc(jnp.zeros(3), jnp.zeros(4, bool))


def test_an_argument_of_another_kind_of_numbers_is_found():
    heads = jnp.zeros((1, 2, 3, 4))
    with pytest.raises(TypeCheckError, match="k"):
        causal_attention(heads, heads.astype(int), heads)
