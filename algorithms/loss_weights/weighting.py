"""The parts of a learned loss weight: a score, a positive function of it, a normalisation.

    w = normalize(squash(score(eta, features)))

- score: a `Weighting`, any real number per domain, per example or per token.
- squash: from a score to a weight, positive for every score, and one at score zero, so that a
  weighting with initial scores of zero starts as unweighted training. A negative weight would
  *raise* the loss of its token without bound, and if all weights are zero, so are all derivatives:
  `LossWeights` refuses functions that allow either. `bounded` is the safer choice; under a
  normalisation its upper bound slows learning down, as weights at the bound cannot differ any
  more: use `unbounded` with a normalisation.
- normalize: None, or a function of the weights of a batch, such as `mean_one`. It makes the weight
  of an example depend on the whole batch: a micro-batched Hessian product would not be exact, so
  engines do not split the batch.

References: Ren et al. 2018 (arXiv:1803.09050) and Shu et al. 2019 (arXiv:1902.07379), who
normalise over the batch; Kemaev et al. 2025 (arXiv:2505.00793) for weights of a language
model's data.

These functions are checked before training, as a compiled step cannot raise an error.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metalearn._utils.checks import Count, widths
from metalearn._utils.fields import check_fields
from metalearn.algorithms.loss_weights.features import (
    WeightInputs,
    check_names,
    features,
    width,
)
from metalearn.unroll import Eta


class Weighting(abc.ABC):
    """A learned function from the examples of a batch to scores. Subclasses are frozen dataclasses.

    The score of an example does not depend on other examples.
    """

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Eta:
        """Return eta, its parameters: any pytree of floating-point arrays."""

    @abc.abstractmethod
    def __call__(self, eta: Eta, inputs: WeightInputs) -> Float[Array, "batch S"]:
        """Return scores: [batch, 1], one per example, or [batch, S], one per token."""


@dataclasses.dataclass(frozen=True)
class DomainWeights(Weighting):
    """One score per domain. An unknown source has the score NaN, which stops the training.

    Args:
      domains: the number of domains.
    """

    domains: Count

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, key: jax.Array) -> Float[Array, " domains"]:
        """Return the scores [domains], all zero."""
        del key
        return jnp.zeros(self.domains)

    def __call__(
        self, eta: Float[Array, " domains"], inputs: WeightInputs
    ) -> Float[Array, "batch 1"]:
        """Return the score of each example's source: [batch, 1]."""
        known = (inputs.source >= 0) & (inputs.source < self.domains)
        return jnp.where(known, eta[inputs.source], jnp.nan)[:, None]


@dataclasses.dataclass(frozen=True)
class _FeatureWeights(Weighting):
    """A small network on features of the batch; a subclass scores tokens or examples."""

    features: tuple[str, ...]
    hidden: tuple[int, ...] = (16,)
    sources: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "features")
        check_names(type(self).__name__, self.features)
        width(self.features, self.sources)
        widths(type(self).__name__, hidden=self.hidden)

    def init(self, key: jax.Array) -> list[dict[str, jax.Array]]:
        """Return the layers; the last is zero, so that all initial scores are zero."""
        return init_mlp(key, (width(self.features, self.sources), *self.hidden, 1))


@dataclasses.dataclass(frozen=True)
class TokenWeights(_FeatureWeights):
    """A score per token: a small network on its features.

    Args:
      features: names of the table in `metalearn.algorithms.loss_weights.features`.
      hidden: the widths of the hidden layers.
      sources: the number of sources, for the feature "source".
    """

    features: tuple[str, ...] = ("loss", "position")

    def __call__(self, eta: Eta, inputs: WeightInputs) -> Float[Array, "batch S"]:
        """Return the score of every token: [batch, S]."""
        return mlp(eta, features(self.features, inputs, self.sources))[..., 0]


@dataclasses.dataclass(frozen=True)
class ExampleWeights(_FeatureWeights):
    """A score per example: a small network on its features, averaged over its tokens.

    Args:
      features: names of the table in `metalearn.algorithms.loss_weights.features`.
      hidden: the widths of the hidden layers.
      sources: the number of sources, for the feature "source".
    """

    features: tuple[str, ...] = ("example_loss", "spread")

    def __call__(self, eta: Eta, inputs: WeightInputs) -> Float[Array, "batch 1"]:
        """Return the score of every example: [batch, 1]."""
        return mlp(eta, features(self.features, inputs, self.sources).mean(1))


def init_mlp(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Return dense layers with random biases, the last layer all zero."""
    keys = jax.random.split(key, (len(widths) - 1, 2))
    layers = [
        {"w": jax.random.normal(k[0], (a, b)) / math.sqrt(a), "b": jax.random.normal(k[1], (b,))}
        for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
    ]
    return [*layers[:-1], jax.tree.map(jnp.zeros_like, layers[-1])]


def mlp(
    layers: Sequence[dict[str, jax.Array]], x: Float[Array, "*batch a"]
) -> Float[Array, "*batch b"]:
    """Apply dense layers [..., a] -> [..., b] with tanh between them."""
    for i, layer in enumerate(layers):
        x = jnp.tanh(x) if i else x
        x = x @ layer["w"] + layer["b"].reshape(*[1] * (x.ndim - 1), -1)
    return x


def bounded(scores: Float[Array, "*scores"]) -> Float[Array, "*scores"]:
    """Return 2 sigmoid(score): a weight between 0 and 2, one at score zero."""
    return 2 * jax.nn.sigmoid(scores)


def unbounded(scores: Float[Array, "*scores"]) -> Float[Array, "*scores"]:
    """Return softplus(score) / log 2: a weight above 0, one at score zero."""
    return jax.nn.softplus(scores) / math.log(2)


def mean_one(weights: Float[Array, "*weights"]) -> Float[Array, "*weights"]:
    """Scale the weights of a batch to mean one; if all are zero they stay zero, not NaN."""
    return weights / jnp.maximum(weights.mean(), jnp.finfo(weights.dtype).tiny ** 0.5)


Function = Callable[[jax.Array], jax.Array]
LARGEST = 20.0  # of the scores that are checked; 2 sigmoid(-20) is 4e-9, small and not yet zero


def check_squash(squash: Function) -> None:
    """Raise ValueError if a function from scores to weights is not positive for every score."""
    with jax.ensure_compile_time_eval():
        scores = jnp.linspace(-LARGEST, LARGEST, 401)
        weights = squash(scores)
        worst = int(jnp.nan_to_num(weights, nan=-jnp.inf).argmin())
        score, weight = float(scores[worst]), float(weights[worst])
    if not weight > 0:
        raise ValueError(
            f"`squash` turns the score {score:g} into the weight {weight:g}, but weights are "
            "positive: a negative one raises the loss of its tokens without bound, and where all "
            "are zero nothing is learned any more. Use `bounded`, `unbounded`, or another positive "
            "function, such as an exponential."
        )


def check_weighting(weighting: Weighting) -> None:
    """Raise ValueError if initial scores have the wrong shape, or weights of zero."""
    with jax.ensure_compile_time_eval():
        inputs = WeightInputs(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32))
        scores = weighting(weighting.init(jax.random.key(0)), inputs)
        shape, largest = jnp.shape(scores), float(jnp.max(scores))
    if shape not in ((2, 1), (2, 3)):
        raise ValueError(
            f"{type(weighting).__name__} returned scores of shape {list(shape)} for losses "
            "[2, 3], but scores are [batch, 1], one per example, or [batch, S], one per token."
        )
    if not -LARGEST < largest < float("inf"):
        raise ValueError(
            f"{type(weighting).__name__} begins with a largest score of {largest:g}, where all "
            "weights are zero (or nothing is a number) and no derivative leads away. Begin with "
            "scores around zero: a score of zero is a weight of one."
        )


def check_normalize(normalize: Function) -> None:
    """Raise ValueError if a normalisation makes positive weights negative, or all of them zero."""
    with jax.ensure_compile_time_eval():
        weights = normalize(jnp.array([[0.5, 1.0], [1.5, 3.0]]))
        smallest, largest = float(weights.min()), float(weights.max())
    if not (smallest >= 0 and 0 < largest < float("inf")):
        raise ValueError(
            f"`normalize` turns the weights 0.5, 1, 1.5 and 3 into ones from {smallest:g} to "
            f"{largest:g}, but weights are not negative, and not all zero. Divide by something, "
            "as `mean_one` does, rather than subtract."
        )
