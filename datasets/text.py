"""Language modelling as a task: a model is trained on one text and judged on another.

An episode draws, per inner step, a batch of windows of the training text (support), and
windows of held-out text (query). A window never crosses from one piece of the text into the
next, so it has one source. Where the training text is corrupted in part
(`metalearn.datasets.corruption`), the outer loss reads clean held-out text, and `probes`
windows of a corrupted copy of it, flagged as such, join the query to measure by.

The tokens live on the device and windows are gathered inside jit: what is drawn depends on
the key alone. A window of S tokens is S + 1 of the text; targets are inputs moved by one.

Tokens are bytes by default: no training, no file and no unknown token, 256 of them write any
text. A tokenizer of your own is a function from a string to integers, with its vocabulary's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import integers
from metalearn._utils.fields import check_fields
from metalearn.datasets.arrays import least_and_largest
from metalearn.datasets.corruption import Corruption, Pieces, cut
from metalearn.datasets.reading import examples, open_source
from metalearn.tasks import Tasks
from metalearn.unroll import Episode


class Tokenizer(NamedTuple):
    """A function from a text to integers in 0 .. vocabulary - 1."""

    encode: Callable[[str], np.ndarray]  # str -> [n] integers
    vocabulary: int

    def __call__(self, text: str) -> np.ndarray:
        """Encode, and raise ValueError where the result is no [n] of such integers."""
        tokens = np.asarray(self.encode(text))
        good = tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
        if not good or (tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocabulary):
            found = f"{tokens.dtype}{list(tokens.shape)}"
            if good:
                found += f" with values from {tokens.min()} to {tokens.max()}"
            raise ValueError(
                f"The tokenizer returned {found}, but tokens are a one-dimensional array of "
                f"integers in 0 .. vocabulary - 1 = {self.vocabulary - 1}. Let `encode` return ids "
                "alone, and `vocabulary` count all of them, special tokens included."
            )
        return tokens


def _utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


BYTES = Tokenizer(_utf8, 256)


def read_text(
    name: str = "tiny_shakespeare",
    split: str = "train",
    *,
    feature: str = "text",
    data_dir: str | None = None,
) -> str:
    r"""Read a text of TensorFlow Datasets, its records joined by newlines.

    Args:
      name: the dataset's name in TFDS, such as "tiny_shakespeare" or "lm1b".
      split: a split or slice of one, such as "train" or "train[:1000]".
      feature: the feature that holds the text.
      data_dir: where datasets are; None is TFDS's rule, $TFDS_DATA_DIR or
        ~/tensorflow_datasets.

    Raises:
      DatasetNotPreparedError: if the dataset is not there; it says how to get it.
      ValueError: if its records have no such feature.
    """
    records = open_source(name, split, data_dir=data_dir)
    return "\n".join(_text(record, name, feature) for record in examples(records))


def _text(record: object, name: str, feature: str) -> str:
    assert isinstance(record, dict)
    value = record.get(feature)
    if not isinstance(value, bytes | str):
        raise ValueError(
            f"The dataset {name!r} has no text feature {feature!r}. Its features are "
            f"{', '.join(sorted(record))}: name the one that holds the text with feature=."
        )
    return value.decode() if isinstance(value, bytes) else value


class Windows(NamedTuple):
    """Windows of a text, [...] of them: [T, batch] in support, [queries + probes] in query."""

    inputs: jax.Array  # [..., S] int32
    targets: jax.Array  # [..., S] int32: the token after each input
    source: jax.Array  # [...] int32: the piece of the training text, or one like it
    corrupted: jax.Array | None  # [...] bool: of a corrupted piece; None: nothing is


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Text(Tasks):
    """Language modelling on windows of a text. Make one with `Text.create`.

    A pytree: the texts are its leaves, so pass it to jit as an argument.
    """

    train: Pieces = dataclasses.field(repr=False)
    held_out: Pieces = dataclasses.field(repr=False)  # clean
    spoiled: Pieces | None = dataclasses.field(repr=False)  # held-out text, corrupted
    length: int = _static()
    inner_steps: int = _static()
    batch: int = _static()
    queries: int = _static()
    probes: int = _static()
    vocabulary: int = _static()

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls,
        train: str,
        held_out: str,
        *,
        length: int,
        inner_steps: int,
        batch: int,
        queries: int,
        probes: int = 0,
        pieces: int = 1,
        corruption: Corruption | None = None,
        tokenizer: Tokenizer = BYTES,
    ) -> Text:
        """Put two texts on the device, after checking that they can serve such tasks.

        Args:
          train: the text of the inner loop.
          held_out: the text of the outer loss, always clean.
          length: S, tokens in a window.
          inner_steps: T.
          batch: windows in an inner step.
          queries: held-out windows of a task.
          probes: corrupted held-out windows of a task, for measuring; needs a corruption.
          pieces: sources that the text is cut into.
          corruption: of a share of the training pieces; None: all are clean.
          tokenizer: from text to integers; by default bytes.

        Raises:
          ValueError: if a window is longer than a piece, or a size is not positive.
        """
        _check_sizes(length, inner_steps, batch, queries, probes, pieces, corruption)
        texts = {"training": tokenizer(train), "held-out": tokenizer(held_out)}
        for name, tokens in texts.items():
            _check_length(name, len(tokens), length, pieces)
        ours, theirs = (cut(tokens, pieces) for tokens in texts.values())
        spoiled = None
        if corruption is not None:
            clean, bad = corruption.sources(pieces)
            ours = corruption.spoil(ours, bad, tokenizer.vocabulary)
            spoiled = corruption.spoil(theirs, np.arange(pieces), tokenizer.vocabulary)
            spoiled = spoiled._replace(source=np.resize(bad, pieces))
            theirs = theirs._replace(source=np.resize(clean, pieces))
        ours, theirs, spoiled = jax.tree.map(jnp.asarray, (ours, theirs, spoiled))
        sizes = (length, inner_steps, batch, queries, probes, tokenizer.vocabulary)
        return cls(ours, theirs, spoiled, *sizes)

    @property
    def sources(self) -> int:
        """Return how many sources there are."""
        return self.held_out.source.shape[0]

    def label_range(self) -> tuple[int, int] | None:
        """Return the least and the largest token that there is."""
        texts = self.train, self.held_out, self.spoiled
        return least_and_largest(*(text.tokens for text in texts if text is not None))

    def clean(self) -> Text:
        """Return the same tasks with the corrupted pieces of the training text left out."""
        kept = np.flatnonzero(~np.asarray(self.train.corrupted))
        return dataclasses.replace(self, train=Pieces(*(x[kept] for x in self.train)))

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task: support = Windows [T, batch], query = Windows [queries + probes]."""
        support_key, query_key, probe_key = jax.random.split(key, 3)
        support = self._windows(self.train, support_key, (self.inner_steps, self.batch))
        query = self._windows(self.held_out, query_key, (self.queries,))
        if self.spoiled is None or not self.probes:
            return Episode(support, query._replace(corrupted=None))
        probes = self._windows(self.spoiled, probe_key, (self.probes,))
        return Episode(support, jax.tree.map(lambda *x: jnp.concatenate(x), query, probes))

    def _windows(self, pieces: Pieces, key: jax.Array, shape: tuple[int, ...]) -> Windows:
        piece_key, start_key = jax.random.split(key)
        count, size = pieces.tokens.shape
        piece = jax.random.randint(piece_key, shape, 0, count)
        start = jax.random.randint(start_key, shape, 0, size - self.length)
        place = start[..., None] + jnp.arange(self.length + 1).reshape(*[1] * len(shape), -1)
        tokens = pieces.tokens[piece[..., None], place].astype(jnp.int32)
        source, corrupted = pieces.source[piece], pieces.corrupted[piece]
        return Windows(tokens[..., :-1], tokens[..., 1:], source, corrupted)


def _check_sizes(
    length: int,
    inner_steps: int,
    batch: int,
    queries: int,
    probes: int,
    pieces: int,
    corruption: Corruption | None,
) -> None:
    sizes = {"length": length, "inner_steps": inner_steps, "batch": batch, "queries": queries}
    integers("Text", **sizes, probes=probes, pieces=pieces)
    if min(length, inner_steps, batch, queries, pieces) < 1 or probes < 0:
        raise ValueError(
            f"`Text` got length={length}, inner_steps={inner_steps}, batch={batch}, queries="
            f"{queries}, probes={probes}, pieces={pieces}, but a task has at least one of each "
            "(probes may be 0). Pass positive integers, such as length=64, inner_steps=8, "
            "batch=16, queries=16."
        )
    if probes and corruption is None:
        raise ValueError(
            f"`Text` got probes={probes}, windows of corrupted held-out text, but no corruption. "
            "Pass corruption=Corruption(...), or probes=0."
        )


def _check_length(name: str, tokens: int, length: int, pieces: int) -> None:
    longest = tokens // pieces - 1
    if length > longest:
        many = f" in {pieces} pieces of {tokens // pieces}" if pieces > 1 else ""
        raise ValueError(
            f"`Text` got length={length}, but the {name} text has {tokens} tokens{many}, and a "
            f"window of {length} inputs and their targets takes {length + 1}. Take a longer text"
            f"{', fewer pieces' if pieces > 1 else ''} or length={longest} at most."
        )
