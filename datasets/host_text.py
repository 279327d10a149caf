"""Language modelling on texts that stay on the host, such as token files larger than memory.

`HostText` draws the windows that `Text` draws from the same tokens without corruption, with the
same bits for the same key: where a window begins is computed by the same function of the key. The
tokens are integers [n] in an array or a `numpy.memmap`, as tokenizers write them; the windows of
the tasks of an outer step are read on the host (`metalearn.datasets.host_few_shot`), ahead in a
thread.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import counts
from metalearn._utils.fields import check_fields
from metalearn.datasets.arrays import one_array
from metalearn.datasets.sources import ArrayRows
from metalearn.datasets.text import Windows, check_length, check_sizes, draw_windows
from metalearn.tasks import Fetched, Tasks
from metalearn.unroll import Episode

MOST = 2**31 - 1  # tokens of a text: where windows begin is counted in 32 bits


@dataclasses.dataclass(frozen=True)
class WindowSizes:
    """The sizes of a task, and of its texts; from tokens to an episode.

    Args:
      length: S, tokens in a window.
      inner_steps: T.
      batch: windows in an inner step.
      queries: held-out windows of a task.
      train: tokens of the training text.
      held_out: tokens of the held-out text.
    """

    length: int
    inner_steps: int
    batch: int
    queries: int
    train: int
    held_out: int

    def starts(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draw where the windows begin: [T, batch] and [queries] int32."""
        support_key, query_key, _ = jax.random.split(key, 3)
        steps = self.inner_steps, self.batch
        _, support = draw_windows(support_key, steps, (1, self.train), self.length)
        _, query = draw_windows(query_key, (self.queries,), (1, self.held_out), self.length)
        return support, query

    def __call__(self, tokens: tuple[jax.Array, jax.Array]) -> Episode:
        """Return the episode of tokens [T, batch, S + 1] and [queries, S + 1]."""
        support, query = (
            Windows(
                text[..., :-1],
                text[..., 1:],
                jnp.zeros(text.shape[:-1], jnp.int32),
                jnp.zeros(text.shape[:-1], bool),
            )
            for text in tokens
        )
        return Episode(support, query._replace(corrupted=None))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFiles:
    """Two texts of tokens [n] on the host. It compares by identity.

    Args:
      train: the training text.
      held_out: the held-out text.
      vocabulary: the number of tokens that may occur.
    """

    train: ArrayRows
    held_out: ArrayRows
    vocabulary: int

    def read(self, support: np.ndarray, query: np.ndarray, length: int) -> Any:
        """Return the tokens [..., length + 1] int32 of windows that begin at `support`, `query`."""
        return tuple(
            self._read(name, text, np.asarray(starts), length)
            for name, text, starts in (
                ("training", self.train, support),
                ("held-out", self.held_out, query),
            )
        )

    def _read(self, name: str, text: ArrayRows, starts: np.ndarray, length: int) -> np.ndarray:
        rows = starts[..., None].astype(np.int64) + np.arange(length + 1)
        tokens = text.read(rows.reshape(-1)).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise ValueError(
                f"`HostText` read tokens from {tokens.min()} to {tokens.max()} in the {name} text, "
                f"but vocabulary={self.vocabulary}: they are from 0 to {self.vocabulary - 1}. Pass "
                "the vocabulary of the tokenizer that wrote them, and the type that it wrote."
            )
        return tokens.reshape(rows.shape).astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HostText(Tasks):
    """Language modelling on texts on the host. Create it with `HostText.create`.

    A pytree without leaves. Its episodes are those of `Text` of the same tokens, bit for bit.

    Args:
      files: the tokens.
      sizes: of tasks and texts.
    """

    files: TokenFiles = dataclasses.field(metadata={"static": True}, repr=False)
    sizes: WindowSizes = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls,
        train: Any,
        held_out: Any,
        *,
        length: int,
        inner_steps: int,
        batch: int,
        queries: int,
        vocabulary: int,
    ) -> HostText:
        """Make tasks of two texts, after checking that they can be drawn from them.

        Args:
          train: [n] integers, an array or a `numpy.memmap`: the tokens of the inner loop.
          held_out: [m] integers, the tokens of the outer loss.
          length: S, tokens in a window.
          inner_steps: T.
          batch: windows in an inner step.
          queries: held-out windows of a task.
          vocabulary: the number of tokens; those that are read are held against it.

        Raises:
          ValueError: if a window is longer than a text, a size is not positive, or a text has
            more tokens than 32 bits count.
          TypeError: if a text is no array of integers [n].
        """
        check_sizes("HostText", length, inner_steps, batch, queries)
        counts("HostText", 1, vocabulary=vocabulary)
        files = TokenFiles(_tokens("train", train), _tokens("held_out", held_out), int(vocabulary))
        check_length("HostText", "training", files.train.count, length)
        check_length("HostText", "held-out", files.held_out.count, length)
        sizes = WindowSizes(
            *(int(length), int(inner_steps), int(batch), int(queries)),
            *(files.train.count, files.held_out.count),
        )
        return cls(files, sizes)

    @property
    def needs_fetch(self) -> bool:
        """True."""
        return True

    def label_range(self) -> tuple[int, int]:
        """Return (0, vocabulary - 1)."""
        return 0, self.files.vocabulary - 1

    def windows(self) -> Windows:
        """Return the training text as windows side by side, leaves [n, ...]: views of its tokens.

        Those of a `numpy.memmap` are read when they are indexed. Tokens at the end that fill no
        window are left out.
        """
        size = self.sizes.length + 1
        tokens = self.files.train.data
        cut = tokens[: len(tokens) // size * size].reshape(-1, size)
        flags: Any = np.zeros(len(cut), np.int32), np.zeros(len(cut), bool)
        return Windows(cut[:, :-1], cut[:, 1:], *flags)

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task: support = Windows [T, batch], query = Windows [queries].

        Inside jit the program calls back to the host, and waits for the tokens.
        """
        starts, length = self.sizes.starts(key), self.sizes.length
        shapes = tuple(jax.ShapeDtypeStruct((*s.shape, length + 1), jnp.int32) for s in starts)

        def read(support: np.ndarray, query: np.ndarray) -> Any:
            return self.files.read(support, query, length)

        tokens = jax.pure_callback(read, shapes, *starts, vmap_method="broadcast_all")
        return self.sizes(tokens)

    def fetch(self, keys: jax.Array, first: int = 0) -> Fetched:
        """Read the windows of the tasks that `keys` [n] draw, whatever `first` is."""
        del first
        support, query = jax.device_get(_all_starts(keys, self.sizes))
        tokens = self.files.read(support, query, self.sizes.length)
        return Fetched(keys, jax.tree.map(jnp.asarray, tokens), self.sizes)


@functools.partial(jax.jit, static_argnames="sizes")
def _all_starts(keys: jax.Array, sizes: WindowSizes) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(sizes.starts)(keys)


def _tokens(name: str, text: Any) -> ArrayRows:
    tokens = np.asanyarray(one_array("HostText", name, text, "[n]"))
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise TypeError(
            f"`HostText` got {name} of {tokens.dtype}{list(tokens.shape)}, but a text is integers "
            "[n], one for each token. Concatenate documents, with a token between them."
        )
    if len(tokens) > MOST:
        raise ValueError(
            f"`HostText` got {name} of {len(tokens):,} tokens, and draws from {MOST:,} at most: "
            "pass a slice of it."
        )
    return ArrayRows(tokens, "HostText")
