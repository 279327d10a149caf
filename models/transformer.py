"""A decoder-only transformer as one pure function of a dict of stacked parameters.

Every layer's parameters of one kind are one array [layers, ...], and the layers run in a
`lax.scan`, so that a deep model compiles as fast as a shallow one. The same function serves
linen, NNX and Haiku: their `Transformer` modules declare these parameters and call it.

Blocks are pre-normalised, x + attention(norm(x)) and then x + mlp(norm(x)). The fields of an
`Architecture` are the choices of the published decoders: GPT-2's (layer norm, learned positions,
biases, a tied head) and Llama's (RMSNorm, rotary positions, a gated MLP, key and value heads that
groups of query heads share). `metalearn.models.hugging_face` reads both from files.

`remat` says which residuals of a block are saved for
the backward pass. With rematerialisation, `MixedFlow` has the tangents of only one block in memory
at once, which are most of its memory (Kemaev et al. 2025, arXiv:2505.00793). For L layers,
activations A of one block and x the residual stream, a gradient costs

| remat    | memory                           | extra work                    |
|----------|----------------------------------|-------------------------------|
| "none"   | L A                              | none                          |
| "dots"   | L (products with weights) + A    | attention, elementwise parts  |
| "block"  | L |x| + A                        | one more forward pass         |

`SIZES` is a family of language models from 44M to 16B parameters: those of Hoffmann et al. 2022,
"Training Compute-Optimal Large Language Models" (arXiv:2203.15556, table A9), with a vocabulary of
32,000 and an MLP four times as wide as the model. Kemaev et al. 2025 measure on the same family.
The original models have the relative positions of Transformer-XL, with an extra projection, a
matrix width x heads * head_dim per layer, which rotary positions do not need: a model here has 4 to
8% fewer parameters than its name says. The original counts include one embedding, so here the
embedding is tied to the head. For a smaller vocabulary, or another attention, replace a field:

>>> import dataclasses
>>> dataclasses.replace(SIZES["44M"], vocabulary=256, remat="block").parameters
25305600

References: Vaswani et al. 2017 (arXiv:1706.03762); RMSNorm, Zhang and Sennrich 2019
(arXiv:1910.07467); gated MLPs, Shazeer 2020 (arXiv:2002.05202); grouped queries, Ainslie et al.
2023 (arXiv:2305.13245); rematerialisation, Chen et al. 2016 (arXiv:1604.06174).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import is_integer, pick
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn.models.attention import causal_attention, rotate

Params = dict[str, jax.Array]
POSITIONS = {"rotary": "rotate queries and keys", "learned": "add a vector", "none": "nothing"}
NORMS = {"rms": "divide by the root mean square", "layer": "centre, then divide by the deviation"}
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # without attention scores
}


class Parameter(NamedTuple):
    """A declaration of a parameter, for the modules of each library.

    shape: of the array.
    init: key, shape, dtype -> array.
    """

    shape: tuple[int, ...]
    init: Callable[..., jax.Array]


@readable
@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes and options of a transformer, with its parameters and its forward pass.

    Args:
      vocabulary: number of tokens.
      width: of the residual stream.
      layers: number of blocks.
      heads: of each attention.
      hidden: the width of the MLP's hidden layer; None: 4 * width.
      head_dim: features of a head; None: width // heads.
      norm: "rms" or "layer".
      tied: whether the embedding is also the output head.
      activation: of the MLP.
      attention: q, k, v -> out, each [batch, S, heads, head_dim].
      remat: which residuals of a block are saved for the backward pass: "none", "block" or "dots".
      dtype: of the computation; None: that of the parameters.
      kv_heads: heads of keys and values, each shared by a group of queries' heads; None: as heads.
      gated: whether the MLP is down(activation(gate(x)) * up(x)), as SwiGLU; else
        down(activation(up(x))).
      positions: "rotary", "learned" or "none".
      context: the number of learned positions, the longest sequence; None otherwise.
      rotary_base: of rotary positions: the wavelengths go up to 2 pi times this.
      biases: which projections have a bias: "query", "key", "value", "out", "gate", "up", "down".
      epsilon: added to the mean square in norms.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int | None = None
    head_dim: int | None = None
    norm: str = "rms"
    tied: bool = False
    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu
    attention: Callable[..., jax.Array] = causal_attention
    remat: str = "none"
    dtype: Any = None
    kv_heads: int | None = None
    gated: bool = False
    positions: str = "rotary"
    context: int | None = None
    rotary_base: float = 10_000.0
    biases: tuple[str, ...] = ()
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self)
        pick(NORMS, self.norm, "norm")
        pick(REMAT, self.remat, "remat")
        pick(POSITIONS, self.positions, "kind of positions")
        for name in self.biases:
            pick(dict.fromkeys(self._shapes()), name, "projection")
        for name in ("vocabulary", "width", "layers", "heads"):
            if not is_integer(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(
                    f"`Architecture({name}={getattr(self, name)})` must be at least 1."
                )
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"A width of {self.width} does not divide into {self.heads} heads. Choose a "
                "multiple, or say how wide a head is with `head_dim`."
            )
        if self.heads % self.kv_size or self.kv_size < 1:
            raise ValueError(
                f"{self.heads} heads of queries do not divide into groups for {self.kv_size} heads "
                "of keys and values. Choose `kv_heads` that divides `heads`."
            )
        if (self.context is None) == (self.positions == "learned"):
            raise ValueError(
                f"`Architecture(positions={self.positions!r}, context={self.context})`: learned "
                "positions need the length of the longest sequence, `context`, and no other "
                "positions have one."
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(
                f"Rotary positions turn pairs of features, but a head has {self.head_size} of "
                "them. Choose another number of heads, or an even `head_dim`."
            )

    @property
    def head_size(self) -> int:
        """The number of features of one head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def kv_size(self) -> int:
        """The number of heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def parameters(self) -> int:
        """The total number of parameters."""
        return sum(math.prod(shape) for shape, _ in self.declare().values())

    def declare(self) -> dict[str, Parameter]:
        """Return every parameter's shape and initialiser, by name."""
        outside = {"embedding": Parameter((self.vocabulary, self.width), _normal(self.width))}
        if self.context is not None:
            outside["positions"] = Parameter((self.context, self.width), _normal(self.width))
        if not self.tied:
            outside["head"] = Parameter((self.width, self.vocabulary), _normal(self.width))
        return {**outside, **self._norm("final_norm", ()), **self._block()}

    def _block(self) -> dict[str, Parameter]:
        """Declare the parameters of all blocks, stacked along the first axis."""
        shapes = self._shapes()
        # The residual stream sums 2 L terms.
        shrink = {"out": 2 * self.layers, "down": 2 * self.layers}
        return {
            **self._norm("attention_norm", (self.layers,)),
            **self._norm("mlp_norm", (self.layers,)),
            **{
                name: Parameter((self.layers, *shape), _normal(shape[0] * shrink.get(name, 1)))
                for name, shape in shapes.items()
            },
            **{
                f"{name}_bias": Parameter((self.layers, shapes[name][1]), jax.nn.initializers.zeros)
                for name in self.biases
            },
        }

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape of each projection of a block."""
        inner, shared = self.heads * self.head_size, self.kv_size * self.head_size
        hidden = self.hidden or 4 * self.width
        gate = {"gate": (self.width, hidden)} if self.gated else {}
        return {
            "query": (self.width, inner),
            "key": (self.width, shared),
            "value": (self.width, shared),
            "out": (inner, self.width),
            **gate,
            "up": (self.width, hidden),
            "down": (hidden, self.width),
        }

    def _norm(self, name: str, stack: tuple[int, ...]) -> dict[str, Parameter]:
        shape = (*stack, self.width)
        declared = {name: Parameter(shape, jax.nn.initializers.ones)}
        if self.norm == "layer":
            declared[f"{name}_shift"] = Parameter(shape, jax.nn.initializers.zeros)
        return declared

    def init(self, key: jax.Array) -> Params:
        """Return initial parameters in float32."""
        declared = self.declare()
        keys = jax.random.split(key, len(declared))
        pairs = zip(keys, declared.items(), strict=True)
        return {name: init(key, shape, jnp.float32) for key, (name, (shape, init)) in pairs}

    def apply(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Return next-token logits [batch, S, vocabulary], at least float32."""
        x = self.hidden_states(params, tokens)
        name = "embedding" if self.tied else "head"
        head = self._cast({name: params[name]})[name]
        head = head.T if self.tied else head
        precise = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("bsd,dv->bsv", x, head, preferred_element_type=precise)

    def hidden_states(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Return the normalised residual stream after the last block: [batch, S, width]."""
        _check(tokens)
        stacked = {name: params[name] for name in self._block()}
        outside = self._cast({name: params[name] for name in params.keys() - stacked.keys()})
        block = self._apply_block
        if self.remat != "none":
            block = jax.checkpoint(block, policy=REMAT[self.remat], prevent_cse=False)
        x, _ = jax.lax.scan(block, self._embed(outside, tokens), stacked)
        return self._normalise(x, outside, "final_norm")

    def _apply_block(self, x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        """Apply one layer to the residual stream [batch, S, width]."""
        params = self._cast(params)

        def project(name: str, x: jax.Array) -> jax.Array:
            out = x @ params[name]
            return out + params[f"{name}_bias"][None, None] if name in self.biases else out

        normalised = self._normalise(x, params, "attention_norm")
        q, k, v = (
            project(name, normalised).reshape(*x.shape[:2], -1, self.head_size)
            for name in ("query", "key", "value")
        )
        if self.positions == "rotary":
            q, k = rotate(q, self.rotary_base), rotate(k, self.rotary_base)
        if self.kv_size != self.heads:
            k, v = (jnp.repeat(y, self.heads // self.kv_size, axis=2) for y in (k, v))
        x = x + project("out", self.attention(q, k, v).reshape(*x.shape[:2], -1))
        normalised = self._normalise(x, params, "mlp_norm")
        hidden = self.activation(project("gate" if self.gated else "up", normalised))
        hidden = hidden * project("up", normalised) if self.gated else hidden
        return x + project("down", hidden), None

    def _embed(self, outside: Params, tokens: jax.Array) -> jax.Array:
        """Return the residual stream before the first block, [batch, S, width]."""
        x = outside["embedding"][tokens]
        if self.context is None:
            return x
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"A sequence of {length} tokens is longer than the {self.context} positions that "
                "the transformer has learned (`context`). Cut it."
            )
        return x + outside["positions"][None, :length]

    def _cast(self, params: Params) -> Params:
        if self.dtype is None:
            return params
        return {name: leaf.astype(self.dtype) for name, leaf in params.items()}

    def _normalise(self, x: jax.Array, params: Params, name: str) -> jax.Array:
        """Normalise the last axis, in at least float32."""
        precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.norm == "layer":
            precise = precise - precise.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt((precise * precise).mean(-1, keepdims=True) + self.epsilon)
        out = (precise * scale).astype(x.dtype) * params[name][None, None]
        return out + params[f"{name}_shift"][None, None] if self.norm == "layer" else out


def _normal(fan_in: int) -> Callable[..., jax.Array]:
    return jax.nn.initializers.normal(1 / math.sqrt(fan_in))


def _check(tokens: jax.Array) -> None:
    shape, dtype = jnp.shape(tokens), jnp.result_type(tokens)
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"A transformer reads tokens as integers [batch, S], but got {dtype}{list(shape)}. "
            "Give a single sequence a batch axis, and ids of a tokenizer, or bytes, for text."
        )


def _size(width: int, heads: int, head_dim: int, layers: int) -> Architecture:
    return Architecture(32_000, width, layers, heads, head_dim=head_dim, tied=True)


SIZES = {
    "44M": _size(512, 8, 64, 8),
    "57M": _size(576, 9, 64, 9),
    "74M": _size(640, 10, 64, 10),
    "106M": _size(640, 10, 64, 16),
    "163M": _size(768, 12, 64, 18),
    "251M": _size(1024, 16, 64, 16),
    "425M": _size(1280, 10, 128, 18),
    "587M": _size(1408, 11, 128, 21),
    "1018M": _size(1792, 14, 128, 23),
    "1593M": _size(2048, 16, 128, 28),
    "2980M": _size(2560, 20, 128, 34),
    "4516M": _size(3072, 24, 128, 36),
    "6796M": _size(3584, 28, 128, 40),
    "9293M": _size(4096, 32, 128, 42),
    "11452M": _size(4352, 32, 128, 47),  # heads * head_dim is less than the width
    "16183M": _size(5120, 40, 128, 47),
}
