"""N-way K-shot classification: a task is a few classes with a few examples of each.

An episode draws `ways` classes, then `shots + queries` examples of each: the inner
loop learns from the first (support), its result is judged on the rest (query). Labels
are the slots 0 .. ways-1, and which class sits in which slot is drawn anew for every
task, so a label means nothing outside its episode: that is what makes the learner
learn to learn (Vinyals et al. 2016, arXiv:1606.04080).

The examples live on the device as they are stored and are gathered, then converted, in the
jit that trains on them: no host work, no transfer per step. Images of uint8 become 0..1 there;
examples of any other type are used as they are. What is drawn depends on the
key alone. A batch of tasks is a `vmap` over keys, and costs about as much as writing
its pixels in float32 (`python -m metalearn.experiments.benchmarks.sampler`).

`distinct` draws k distinct integers below n inside jit, by shifted integers. The i-th draw is
uniform over the n - i integers not yet taken. Rather than list them (a permutation of n: 4,112
values to keep 5) or retry, draw r from 0 .. n - i - 1 and shift it past those taken: with c_0 <
c_1 < ... the integers taken so far, c_j - j of the free integers lie below c_j, hence the r-th
free integer is

    r + |{j : c_j - j <= r}|.

Every ordered choice is equally likely. Cost: k steps of O(k), whatever n is, which is
4x faster than `top_k` of n uniforms for n = 183, equal to it for n = 20, and hundreds
of times faster than `jax.random.choice(replace=False)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import integers
from metalearn._utils.fields import check_fields
from metalearn._utils.pixels import are_pixels
from metalearn.datasets.arrays import one_array
from metalearn.datasets.class_index import ClassIndex
from metalearn.tasks import Tasks
from metalearn.unroll import Episode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FewShot(Tasks):
    """N-way K-shot tasks over an index of classes. Make one with `FewShot.create`.

    A pytree: `examples` and `counts` are its leaves, so pass it to jit as an argument
    (a jit that closes over it would bake the whole dataset into the program).
    """

    examples: jax.Array = dataclasses.field(repr=False)  # [classes, examples, ...]
    counts: jax.Array = dataclasses.field(repr=False)  # [classes] int32: real examples
    ways: int = dataclasses.field(metadata={"static": True})
    shots: int = dataclasses.field(metadata={"static": True})
    queries: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(cls, index: ClassIndex, *, ways: int, shots: int, queries: int) -> FewShot:
        """Put an index on the device, after checking that it can serve such tasks.

        Args:
          index: the examples by class. Images of uint8 are read as 0..1, nothing else is
            rescaled: floats and integers (features, tokens) are used as they are.
          ways: classes in a task.
          shots: support examples per class.
          queries: query examples per class.

        Raises:
          ValueError: if the index has fewer than `ways` classes, or a class has fewer
            than `shots + queries` examples; if a size is no integer; or of uint8 that are no
            images, which may be pixels or tokens.
          TypeError: if there is no index of arrays.
        """
        index = _arrays(index)
        _check(index, ways, shots, queries)
        are_pixels("`FewShot`", index.examples.dtype, index.examples.shape[2:])
        examples, counts = jnp.asarray(index.examples), jnp.asarray(index.counts)
        return cls(examples, counts, int(ways), int(shots), int(queries))

    def label_range(self) -> tuple[int, int]:
        """Return (0, ways - 1)."""
        return 0, self.ways - 1

    def indices(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draw one task as indices: classes [ways], examples [ways, shots + queries], int32."""
        class_key, example_key = jax.random.split(key)
        classes = distinct(class_key, self.counts.shape[0], self.ways)
        keys = jax.random.split(example_key, self.ways)
        draw = jax.vmap(lambda key, n: distinct(key, n, self.shots + self.queries))
        return classes, draw(keys, self.counts[classes])

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task, grouped by class: label 0 first, label ways-1 last.

        Returns:
          `support` = (inputs [ways * shots, ...], labels [ways * shots] int32 in
          0 .. ways-1), and `query` likewise with `queries` per class. Inputs of uint8 images
          are float32 in 0..1, others as they are in the index. Classes are distinct, and so
          are all examples of a class in the episode.
        """
        classes, picks = self.indices(key)
        rows = classes[:, None] * self.examples.shape[1] + picks
        support, query = rows[:, : self.shots].reshape(-1), rows[:, self.shots :].reshape(-1)
        # One gather of whole rows, cut in two where it is contiguous: twice as fast on a
        # CPU as two gathers, or as one cut per class.
        inputs = self._gather(jnp.concatenate([support, query]))
        cut = support.size
        return Episode(
            (inputs[:cut], self._labels(self.shots)), (inputs[cut:], self._labels(self.queries))
        )

    def _gather(self, rows: jax.Array) -> jax.Array:
        classes, per_class, *shape = self.examples.shape
        table = self.examples.reshape(classes * per_class, -1)
        if not are_pixels("`FewShot`", table.dtype, tuple(shape)):
            return table[rows].reshape(-1, *shape)
        return table[rows].astype(jnp.float32).reshape(-1, *shape) / 255

    def _labels(self, per_class: int) -> jax.Array:
        return jnp.repeat(jnp.arange(self.ways, dtype=jnp.int32), per_class)


def _arrays(index: Any) -> ClassIndex:
    """Return an index of arrays; TypeError and ValueError where it is none."""
    if not isinstance(index, ClassIndex):
        raise TypeError(
            f"`FewShot.create` takes a `ClassIndex`, examples by class, not a "
            f"{type(index).__name__}. Of images with their labels: `from_labels(images, labels)`."
        )
    examples = one_array("ClassIndex", "examples", index.examples, "[classes, examples, ...]")
    counts = np.asarray(one_array("ClassIndex", "counts", index.counts, "[classes]"))
    right = examples.ndim >= 2 and counts.shape == examples.shape[:1] and counts.size
    if not (right and counts.dtype.kind in "iu" and 0 <= counts.min()):
        raise ValueError(
            f"`ClassIndex` got examples {list(examples.shape)} and counts {counts.dtype}"
            f"{list(counts.shape)}, but counts say how many examples each class has: integers "
            "[classes] beside examples [classes, examples, ...]. Of examples with their labels "
            "`from_labels` makes an index."
        )
    if counts.max() > examples.shape[1]:
        raise ValueError(
            f"`ClassIndex` says that class {int(counts.argmax())} has {counts.max()} examples, but "
            f"its examples {list(examples.shape)} hold {examples.shape[1]} of a class. Count those "
            "that are there."
        )
    return ClassIndex(examples, counts)  # type: ignore[arg-type]


def _check(index: ClassIndex, ways: int, shots: int, queries: int) -> None:
    """Raise unless every task of this shape can be drawn from every choice of classes."""
    integers("FewShot", ways=ways, shots=shots, queries=queries)
    if min(ways, shots, queries) < 1:
        raise ValueError(
            f"`FewShot` got ways={ways}, shots={shots}, queries={queries}, but a task has at least "
            f"one of each. Pass positive integers, such as ways=5, shots=1, queries=15."
        )
    classes, needed = len(index.counts), shots + queries
    if ways > classes:
        raise ValueError(
            f"`FewShot` got ways={ways}, but the index has {classes} classes and those of a task "
            f"are distinct. Ask for at most ways={classes}, or give it an index of more classes "
            f"(`rotate(index)` makes four of each)."
        )
    smallest = int(index.counts.argmin())
    fewest = int(index.counts[smallest])
    if needed > fewest:
        raise ValueError(
            f"`FewShot` got shots + queries = {shots} + {queries} = {needed}, but class {smallest} "
            f"has {fewest} examples and those of a task are distinct. Ask for at most {fewest} "
            f"together, or keep the larger classes alone with "
            f"`select(index, np.flatnonzero(index.counts >= {needed}))`."
        )


def distinct(key: jax.Array, n: jax.Array | int, k: int) -> jax.Array:
    """Draw k distinct integers from 0 .. n-1, in uniformly random order: [k] int32.

    Args:
      key: a PRNG key.
      n: () integer, may be traced; at least k (which the caller checks) and below 2**23,
        the resolution of a float32 uniform.
      k: how many, static.
    """
    steps = jnp.arange(k, dtype=jnp.int32)
    uniforms = jax.random.uniform(key, (k,), jnp.float32)
    draws = jnp.floor(uniforms * (n - steps)).astype(jnp.int32)

    def pick(taken: jax.Array, draw: jax.Array) -> tuple[jax.Array, jax.Array]:
        picked = draw + jnp.sum(taken - steps <= draw, dtype=jnp.int32)
        below = jnp.concatenate([jnp.full_like(taken[:1], -1), taken[:-1]])
        return jnp.clip(picked, below, taken), picked  # `taken` with `picked` in its place

    nothing = jnp.full((k,), jnp.iinfo(jnp.int32).max, jnp.int32)  # ascending, padded
    return jax.lax.scan(pick, nothing, draws)[1]
