"""Text divided into pieces, a known share of which is corrupted.

Learned data weights should detect harmful pieces without labels; the known corruption measures
whether they do. Real collections contain noise with a large loss (scanning errors, binary data) and
filler with a small loss (rules, repeated lines), so a threshold on the loss detects at most one of
the two. Kinds of corruption:

- "random"    every token is uniform over the vocabulary
- "shuffled"  the tokens of the piece in random order, with unchanged frequencies
- "replaced"  each token is replaced, with some probability, by a uniform one of those in the text
- "repeated"  one token of the piece, repeated
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from metalearn._utils.checks import is_integer, pick
from metalearn._utils.fields import check_fields


class Pieces(NamedTuple):
    """A text as pieces of equal length, each with its source.

    tokens: [pieces, length] integers.
    source: [pieces] int32, 0 .. sources - 1.
    corrupted: [pieces] bool.
    """

    tokens: np.ndarray
    source: np.ndarray
    corrupted: np.ndarray


def cut(tokens: np.ndarray, pieces: int) -> Pieces:
    """Return tokens [n] as `pieces` clean pieces, each its own source; a remainder is dropped."""
    length = len(tokens) // pieces
    rows = np.asarray(tokens)[: pieces * length].reshape(pieces, length)
    return Pieces(rows, np.arange(pieces, dtype=np.int32), np.zeros(pieces, bool))


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Corruption of a share of the pieces of a text.

    Args:
      share: of the pieces that are corrupted, strictly between 0 and 1.
      kinds: of corruption, assigned to corrupted pieces in turn.
      probability: with which "replaced" replaces each token.
      seed: decides which pieces are corrupted, and all random draws.
    """

    share: float = 0.5
    kinds: tuple[str, ...] = ("replaced",)
    probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "seed")
        if not 0 < self.share < 1 or not 0 < self.probability <= 1:
            raise ValueError(
                f"`Corruption` got share={self.share} and probability={self.probability}, but a "
                "share lies between 0 and 1 (some pieces stay clean) and a probability is above 0 "
                "and at most 1. For clean text pass no corruption at all."
            )
        if not self.kinds:
            raise ValueError(f"`Corruption` needs at least one of the kinds {', '.join(KINDS)}.")
        for kind in self.kinds:
            pick(KINDS, kind, "kind of corruption")
        if not is_integer(self.seed) or not 0 <= self.seed < 2**32:
            raise ValueError(
                f"`Corruption` got seed={self.seed}, but NumPy's generator takes one of 32 bits, "
                "from 0 to 4294967295."
            )

    def sources(self, pieces: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (clean sources, corrupted sources) among `pieces` pieces, both sorted."""
        count = round(self.share * pieces)
        if not 0 < count < pieces:
            raise ValueError(
                f"A share of {self.share} of {pieces} pieces is {count} of them, but some are to "
                "be clean and some corrupted. Cut the text into more pieces, or change the share."
            )
        order = np.random.RandomState(self.seed).permutation(pieces).astype(np.int32)
        return np.sort(order[count:]), np.sort(order[:count])

    def like(self, bad: np.ndarray, pieces: int) -> np.ndarray:
        """Return a corrupted source of the same kind for each of `pieces`, all corrupted in turn.

        Where no source is of that kind, any corrupted one.
        """
        kinds = len(self.kinds)
        of_kind = [bad[kind::kinds] if kind < len(bad) else bad for kind in range(kinds)]
        chosen = [of_kind[i % kinds][i // kinds % len(of_kind[i % kinds])] for i in range(pieces)]
        return np.asarray(chosen, np.int32)

    def corrupt(self, clean: Pieces, which: np.ndarray, vocabulary: int) -> Pieces:
        """Return the pieces with those at the indices `which` corrupted, and flagged."""
        tokens, corrupted = clean.tokens.copy(), clean.corrupted.copy()
        alphabet = np.unique(tokens)
        for turn, piece in enumerate(which):
            # NumPy guarantees that the stream of RandomState never changes; not default_rng's.
            draw = Draw(np.random.RandomState([self.seed, turn]), alphabet, vocabulary, self)
            tokens[piece] = KINDS[self.kinds[turn % len(self.kinds)]](tokens[piece], draw)
            corrupted[piece] = True
        return Pieces(tokens, clean.source, corrupted)


class Draw(NamedTuple):
    """The arguments of a kind of corruption.

    random: the generator of random numbers.
    alphabet: the distinct tokens of the text.
    vocabulary: the number of tokens there are.
    options: the corruption.
    """

    random: np.random.RandomState
    alphabet: np.ndarray
    vocabulary: int
    options: Corruption


def _random(tokens: np.ndarray, draw: Draw) -> np.ndarray:
    return draw.random.randint(0, draw.vocabulary, tokens.shape)


def _shuffled(tokens: np.ndarray, draw: Draw) -> np.ndarray:
    return draw.random.permutation(tokens)


def _replaced(tokens: np.ndarray, draw: Draw) -> np.ndarray:
    replaced = draw.random.random_sample(tokens.shape) < draw.options.probability
    return np.where(replaced, draw.random.choice(draw.alphabet, tokens.shape), tokens)


def _repeated(tokens: np.ndarray, draw: Draw) -> np.ndarray:
    return np.full_like(tokens, draw.random.choice(tokens))


KINDS: dict[str, Callable[[np.ndarray, Draw], np.ndarray]] = {
    "random": _random,
    "shuffled": _shuffled,
    "replaced": _replaced,
    "repeated": _repeated,
}
