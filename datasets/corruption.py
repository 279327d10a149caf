"""Text cut into pieces, a share of which is spoiled: data whose bad part is known.

A learner of data weights should find out by itself which pieces harm; to measure whether
it does, somebody has to know. Real collections hold noise that a language model finds
hard (scanning errors, binary data) and filler that it finds easy (rules, repeated lines),
so a threshold on the loss finds one of the two at most. Kinds of corruption:

- "random"    every token is uniform over the vocabulary
- "shuffled"  the piece's own tokens in random order: nothing is wrong with their frequencies
- "replaced"  each token, with some probability, becomes a uniform one of those in the text
- "repeated"  the piece is one of its own tokens, over and over
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from metalearn._utils.checks import is_integer, pick
from metalearn._utils.fields import check_fields


class Pieces(NamedTuple):
    """A text as pieces of equal length, each with the source it counts as."""

    tokens: np.ndarray  # [pieces, length] integers
    source: np.ndarray  # [pieces] int32: 0 .. sources - 1
    corrupted: np.ndarray  # [pieces] bool


def cut(tokens: np.ndarray, pieces: int) -> Pieces:
    """Cut tokens [n] into `pieces` clean sources; fewer than `pieces` tokens are left over."""
    length = len(tokens) // pieces
    rows = np.asarray(tokens)[: pieces * length].reshape(pieces, length)
    return Pieces(rows, np.arange(pieces, dtype=np.int32), np.zeros(pieces, bool))


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Which share of the pieces is corrupted, and how. The same seed spoils the same way."""

    share: float = 0.5  # of the pieces, between 0 and 1, neither included
    kinds: tuple[str, ...] = ("replaced",)  # corrupted pieces take turns
    probability: float = 0.5  # "replaced": of each token
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
        """Return (clean sources, corrupted sources) of a number of pieces, both sorted."""
        count = round(self.share * pieces)
        if not 0 < count < pieces:
            raise ValueError(
                f"A share of {self.share} of {pieces} pieces is {count} of them, but some are to "
                "be clean and some corrupted. Cut the text into more pieces, or change the share."
            )
        order = np.random.RandomState(self.seed).permutation(pieces).astype(np.int32)
        return np.sort(order[count:]), np.sort(order[:count])

    def spoil(self, clean: Pieces, which: np.ndarray, vocabulary: int) -> Pieces:
        """Corrupt the pieces at the indices `which`, and say so."""
        tokens, corrupted = clean.tokens.copy(), clean.corrupted.copy()
        alphabet = np.unique(tokens)
        for turn, piece in enumerate(which):
            # RandomState's streams are frozen by numpy's policy; those of default_rng are not.
            draw = Draw(np.random.RandomState([self.seed, turn]), alphabet, vocabulary, self)
            tokens[piece] = KINDS[self.kinds[turn % len(self.kinds)]](tokens[piece], draw)
            corrupted[piece] = True
        return Pieces(tokens, clean.source, corrupted)


class Draw(NamedTuple):
    """What a kind of corruption may draw on."""

    random: np.random.RandomState
    alphabet: np.ndarray  # the distinct tokens of the text
    vocabulary: int
    options: Corruption


def _random(tokens: np.ndarray, draw: Draw) -> np.ndarray:
    return draw.random.randint(0, draw.vocabulary, tokens.shape)


def _shuffled(tokens: np.ndarray, draw: Draw) -> np.ndarray:
    return draw.random.permutation(tokens)


def _replaced(tokens: np.ndarray, draw: Draw) -> np.ndarray:
    hit = draw.random.random_sample(tokens.shape) < draw.options.probability
    return np.where(hit, draw.random.choice(draw.alphabet, tokens.shape), tokens)


def _repeated(tokens: np.ndarray, draw: Draw) -> np.ndarray:
    return np.full_like(tokens, draw.random.choice(tokens))


KINDS: dict[str, Callable[[np.ndarray, Draw], np.ndarray]] = {
    "random": _random,
    "shuffled": _shuffled,
    "replaced": _replaced,
    "repeated": _repeated,
}
