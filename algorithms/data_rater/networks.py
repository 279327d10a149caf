"""A rater of texts: a small transformer without a causal mask, and one number at its end."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.fields import check_fields
from metalearn.model import Model
from metalearn.models.attention import full_attention
from metalearn.models.transformer import Architecture


@dataclasses.dataclass(frozen=True)
class _TextRater(Model):
    """See `text_rater`."""

    architecture: Architecture

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, ())."""
        transformer = self.architecture.init(key)
        return {"transformer": transformer, "score": jnp.zeros(self.architecture.width)}, ()

    def apply(
        self,
        params: Any,
        state: Any,
        inputs: Any,
        *,
        train: bool,
        dropout: bool = True,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Return (scores [batch], state), of `inputs` = (inputs, targets) [batch, S]."""
        del train, dropout, key
        tokens, targets = inputs
        window = jnp.concatenate([tokens, targets[:, -1:]], axis=1)
        hidden = self.architecture.hidden_states(params["transformer"], window)
        return hidden.mean(1) @ params["score"].astype(hidden.dtype), state


def text_rater(
    vocabulary: int, width: int = 32, layers: int = 1, heads: int = 2, **options: Any
) -> Model:
    """Return a rater of windows of a text: (inputs, targets) [batch, S] int -> scores [batch].

    A transformer reads the whole window, S + 1 tokens; the score is a linear function of the mean
    of its hidden states over the positions, zero at the start. For `DataRater(rater=)`.

    Args:
      vocabulary: the number of tokens.
      width: of the residual stream.
      layers: number of blocks.
      heads: of each attention.
      options: other fields of `Architecture`, such as `positions`.
    """
    fields: dict[str, Any] = {"attention": full_attention, "tied": True, **options}
    return _TextRater(Architecture(vocabulary, width, layers, heads, **fields))
