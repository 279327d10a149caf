"""Language modelling as a task: train on one text, evaluate on another.

An episode has, for each inner step, a batch of windows of the training text (support), and windows
of held-out text (query). A window lies within one piece of the text, so it has one source. If part
of the training text is corrupted (`metalearn.datasets.corruption`), the outer loss is on clean
held-out text, and the query has additional `probes` windows of a corrupted copy of that text,
flagged as corrupted, for metrics.

The tokens are on the device and windows are gathered inside jit: an episode is a function of the
key. A window of length S holds S + 1 tokens of the text; targets are inputs shifted by one.

Tokens are bytes by default: 256 tokens represent any text, without training or a vocabulary file.
A tokenizer of your own is a function from a string to integers, with the size of its vocabulary.
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
from metalearn._utils.readable import show
from metalearn.datasets.arrays import least_and_largest
from metalearn.datasets.corruption import Corruption, Pieces, cut
from metalearn.datasets.reading import examples, open_source
from metalearn.tasks import Tasks
from metalearn.unroll import Episode


class Tokenizer(NamedTuple):
    """A function from a text to integers in 0 .. vocabulary - 1.

    encode: text -> [n] integers.
    vocabulary: the number of tokens.
    """

    encode: Callable[[str], np.ndarray]
    vocabulary: int

    def __repr__(self) -> str:
        return f"Tokenizer({show(self.encode)}, {self.vocabulary})"

    def __call__(self, text: str) -> np.ndarray:
        """Return the tokens [n] of a text; ValueError if `encode` returns anything else."""
        tokens = np.asarray(self.encode(text))
        good = tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
        if not good or (tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocabulary):
            returned = f"{tokens.dtype}{list(tokens.shape)}"
            if good:
                returned += f" with values from {tokens.min()} to {tokens.max()}"
            raise ValueError(
                f"The tokenizer returned {returned}, but tokens are a one-dimensional array of "
                f"integers in 0 .. vocabulary - 1 = {self.vocabulary - 1}. Let `encode` return "
                "only ids, and let `vocabulary` count all of them, including special tokens."
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
    r"""Return a text of TensorFlow Datasets, its records joined by newlines.

    Args:
      name: the dataset's name in TFDS, such as "tiny_shakespeare" or "lm1b".
      split: a split or slice of one, such as "train" or "train[:1000]".
      feature: the feature that holds the text.
      data_dir: the directory of datasets; None is TFDS's default, $TFDS_DATA_DIR or
        ~/tensorflow_datasets.

    Raises:
      DatasetNotPreparedError: if the dataset is missing, with the command that prepares it.
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
    """Windows of a text; leading axes are [T, batch] in support, [queries + probes] in query.

    inputs: [..., S] int32.
    targets: [..., S] int32, the token after each input.
    source: [...] int32, the piece of the training text, or a training piece that is clean too, or
      corrupted in the same way.
    corrupted: [...] bool, whether the piece is corrupted; None: no text is.
    """

    inputs: jax.Array
    targets: jax.Array
    source: jax.Array
    corrupted: jax.Array | None


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Text(Tasks):
    """Language modelling on windows of a text. Create one with `Text.create`.

    A pytree: the texts are its leaves, so pass it to jit as an argument.

    Args:
      train: the training text, part of which may be corrupted.
      held_out: the clean text of the outer loss.
      corrupted: a corrupted copy of the held-out text, for probes; None: no corruption.
      length: S, tokens in a window.
      inner_steps: T.
      batch: windows in an inner step.
      queries: held-out windows of a task.
      probes: corrupted held-out windows of a task.
      vocabulary: the number of tokens.
    """

    train: Pieces = dataclasses.field(repr=False)
    held_out: Pieces = dataclasses.field(repr=False)
    corrupted: Pieces | None = dataclasses.field(repr=False)
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
        """Put two texts on the device, after checking that such tasks can be drawn from them.

        Args:
          train: the text of the inner loop.
          held_out: the text of the outer loss, always clean.
          length: S, tokens in a window.
          inner_steps: T.
          batch: windows in an inner step.
          queries: held-out windows of a task.
          probes: corrupted held-out windows of a task, for metrics; needs a corruption.
          pieces: the number of pieces of the text, each a source.
          corruption: of a share of the training pieces; None: all pieces are clean.
          tokenizer: from text to integers; by default bytes.

        Raises:
          ValueError: if a window is longer than a piece, or a size is not positive.
        """
        check_sizes("Text", length, inner_steps, batch, queries, probes, pieces, corruption)
        texts = {"training": tokenizer(train), "held-out": tokenizer(held_out)}
        for name, tokens in texts.items():
            check_length("Text", name, len(tokens), length, pieces)
        training, query = (cut(tokens, pieces) for tokens in texts.values())
        corrupted = None
        if corruption is not None:
            clean, bad = corruption.sources(pieces)
            training = corruption.corrupt(training, bad, tokenizer.vocabulary)
            corrupted = corruption.corrupt(query, np.arange(pieces), tokenizer.vocabulary)
            corrupted = corrupted._replace(source=corruption.like(bad, pieces))
            query = query._replace(source=np.resize(clean, pieces))
        training, query, corrupted = jax.tree.map(jnp.asarray, (training, query, corrupted))
        sizes = (length, inner_steps, batch, queries, probes, tokenizer.vocabulary)
        return cls(training, query, corrupted, *sizes)

    @property
    def sources(self) -> int:
        """The number of sources."""
        return self.held_out.source.shape[0]

    def label_range(self) -> tuple[int, int] | None:
        """Return the least and the largest token of all texts."""
        texts = self.train, self.held_out, self.corrupted
        return least_and_largest(*(text.tokens for text in texts if text is not None))

    def clean(self) -> Text:
        """Return the same tasks without the corrupted pieces of the training text."""
        clean = np.flatnonzero(~np.asarray(self.train.corrupted))
        return dataclasses.replace(self, train=Pieces(*(x[clean] for x in self.train)))

    def windows(self) -> Windows:
        """Return the training text as windows side by side, leaves [n, ...], on the host.

        The tokens at the end of a piece that fill no window are left out. To score all of the
        text, and to train on a part of it; tasks draw windows that begin anywhere.
        """
        tokens, source, corrupted = map(np.asarray, self.train)
        each = tokens.shape[1] // (self.length + 1)  # windows of a piece
        cut = tokens[:, : each * (self.length + 1)].reshape(-1, self.length + 1).astype(np.int32)
        columns: Any = cut[:, :-1], cut[:, 1:], np.repeat(source, each), np.repeat(corrupted, each)
        return Windows(*columns)

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task: support = Windows [T, batch], query = Windows [queries + probes]."""
        support_key, query_key, probe_key = jax.random.split(key, 3)
        support = self._windows(self.train, support_key, (self.inner_steps, self.batch))
        query = self._windows(self.held_out, query_key, (self.queries,))
        if self.corrupted is None or not self.probes:
            return Episode(support, query._replace(corrupted=None))
        probes = self._windows(self.corrupted, probe_key, (self.probes,))
        return Episode(support, jax.tree.map(lambda *x: jnp.concatenate(x), query, probes))

    def _windows(self, pieces: Pieces, key: jax.Array, shape: tuple[int, ...]) -> Windows:
        """Draw windows of some pieces, with leading axes `shape`."""
        piece, start = draw_windows(key, shape, pieces.tokens.shape, self.length)
        positions = start[..., None] + jnp.arange(self.length + 1).reshape(*[1] * len(shape), -1)
        tokens = pieces.tokens[piece[..., None], positions].astype(jnp.int32)
        source, corrupted = pieces.source[piece], pieces.corrupted[piece]
        return Windows(tokens[..., :-1], tokens[..., 1:], source, corrupted)


def draw_windows(
    key: jax.Array, shape: tuple[int, ...], pieces: tuple[int, ...], length: int
) -> tuple[jax.Array, jax.Array]:
    """Draw windows: (the piece of each, where it begins in the piece), int32.

    Args:
      key: of the draws.
      shape: of each result.
      pieces: (the number of pieces, tokens in a piece).
      length: S; a window takes length + 1 tokens.
    """
    piece_key, start_key = jax.random.split(key)
    count, size = pieces
    piece = jax.random.randint(piece_key, shape, 0, count)
    return piece, jax.random.randint(start_key, shape, 0, size - length)


def check_sizes(
    what: str,
    length: int,
    inner_steps: int,
    batch: int,
    queries: int,
    probes: int = 0,
    pieces: int = 1,
    corruption: Corruption | None = None,
) -> None:
    """Raise ValueError unless the sizes of a task are integers, and positive; see `Text`."""
    sizes = {"length": length, "inner_steps": inner_steps, "batch": batch, "queries": queries}
    integers(what, **sizes, probes=probes, pieces=pieces)
    if min(length, inner_steps, batch, queries, pieces) < 1 or probes < 0:
        raise ValueError(
            f"`{what}` got length={length}, inner_steps={inner_steps}, batch={batch}, queries="
            f"{queries}, probes={probes}, pieces={pieces}, but a task has at least one of each "
            "(probes may be 0). Pass positive integers, such as length=64, inner_steps=8, "
            "batch=16, queries=16."
        )
    if probes and corruption is None:
        raise ValueError(
            f"`Text` got probes={probes}, windows of corrupted held-out text, but no corruption. "
            "Pass corruption=Corruption(...), or probes=0."
        )


def check_length(what: str, name: str, tokens: int, length: int, pieces: int = 1) -> None:
    """Raise ValueError if a window does not fit into a piece of a text.

    Args:
      what: the class, as its user writes it.
      name: of the text.
      tokens: in the text.
      length: S; a window takes length + 1 tokens.
      pieces: into which the text is cut.
    """
    longest = tokens // pieces - 1
    if length > longest:
        many = f" in {pieces} pieces of {tokens // pieces}" if pieces > 1 else ""
        raise ValueError(
            f"`{what}` got length={length}, but the {name} text has {tokens} tokens{many}, and a "
            f"window of {length} inputs and their targets takes {length + 1}. Take a longer text"
            f"{', fewer pieces' if pieces > 1 else ''} or length={longest} at most."
        )
