"""Low-rank adaptation: a matrix W of a model becomes W + scale * A B, and A and B are parameters.

For a matrix [in, out] and rank r, A is [in, r] and B [r, out]: r (in + out) numbers in place of
in * out. B begins at zero, so that the model begins as it is. W is the sum when the model is
called, so a model of any library can be wrapped; the sum, and its cotangent, are as large as W, and
there is one for each task that is unrolled at once.

Hu et al. 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.checks import Count
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn._utils.trees import matching, paths
from metalearn.model import Model


@readable
@dataclasses.dataclass(frozen=True)
class LoRA(Model):
    """A model with low-rank terms added to some of its matrices.

    Params are {"base": those of the model, "lora": {path of a matrix: {"a": A, "b": B}}}. Which of
    them the inner loop adapts and which are learned is said by their paths, as for any model:
    `MAML(LoRA(pretrained, 4), adapted="^lora", learned="^lora")` learns where low-rank adaptation
    of a frozen model begins.

    Args:
      model: any; `with_params` of one that is to stay as it is.
      rank: r, of each term.
      paths: which matrices get a term: a regular expression for their paths, or a function of a
        path; "": all. Of an array with more than two axes the last two are the matrix, and the
        others count matrices, such as the layers of `Transformer`; arrays with fewer are left out.
      scale: of the terms; `alpha / r` in the paper.
    """

    model: Model
    rank: Count
    paths: str | Callable[[str], bool] = ""
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, the model's state)."""
        base, state = self.model.init(key)
        lora_key = jax.random.fold_in(key, 1)
        terms = {
            name: self._term(jax.random.fold_in(lora_key, number), leaf)
            for number, (name, leaf) in enumerate(self._matrices(base).items())
        }
        return {"base": base, "lora": terms}, state

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
        return self.model.apply(
            self.merged(params), state, inputs, train=train, dropout=dropout, key=key
        )

    def merged(self, params: Any) -> Any:
        """Return the parameters of the model itself, the terms added to its matrices."""
        names = iter(paths(params["base"]))

        def add(leaf: jax.Array) -> jax.Array:
            term = params["lora"].get(next(names))
            if term is None:
                return leaf
            return leaf + (self.scale * (term["a"] @ term["b"])).astype(leaf.dtype)

        return jax.tree.map(add, params["base"])

    def _term(self, key: jax.Array, leaf: jax.Array) -> dict[str, jax.Array]:
        """Return A, normal with the variance 1 / in, and B, zero."""
        *stack, rows, columns = leaf.shape
        a = jax.random.normal(key, (*stack, rows, self.rank), leaf.dtype) / math.sqrt(rows)
        return {"a": a, "b": jnp.zeros((*stack, self.rank, columns), leaf.dtype)}

    def _matrices(self, base: Any) -> dict[str, jax.Array]:
        """Return the matrices that get a term, by path; ValueError if there are none."""
        names, leaves = paths(base), jax.tree.leaves(base)
        chosen = matching(names, self.paths)
        pairs = zip(names, leaves, chosen, strict=True)
        matrices = {name: leaf for name, leaf, c in pairs if c and jnp.ndim(leaf) >= 2}
        if not matrices:
            there = [name for name, leaf in zip(names, leaves, strict=True) if jnp.ndim(leaf) >= 2]
            raise ValueError(
                f"`LoRA(paths={self.paths!r})` chooses no matrix, which is an array of two axes or "
                f"more. There are: {', '.join(there)}."
            )
        return matrices
