"""N-way K-shot classification: a task is a few classes with a few examples of each.

An episode draws `ways` classes, then `shots + queries` examples of each: the inner loop
learns from the first (support), and the outer loss is computed on the rest (query). Labels
are 0 .. ways-1, assigned to the classes anew for every task, so a label has no meaning
outside its episode and has to be learned in the inner loop (Vinyals et al. 2016,
arXiv:1606.04080).

The examples are on the device in their stored type and are gathered, then converted, inside the
jit that trains on them: no host work, no transfer per step. An episode is a function of the key. A
batch of tasks is a `vmap` over keys, and costs about as much as writing its pixels in float32
(`python -m metalearn.experiments.benchmarks.sampler`). Data that do not fit the device stay on the
host: `metalearn.datasets.HostFewShot` draws the same episodes for the same keys.

What an episode holds of stored examples is decided by their type, or by `scale`:

| stored as | without `scale` | with a number as `scale` |
|---|---|---|
| uint8 of two axes or more, images | float32, divided by 255: 0..1 | float32, times `scale` |
| uint8 of fewer axes | refused: pixels or tokens? | float32, times `scale` |
| other integers, booleans | unchanged: tokens, masks | float32, times `scale` |
| floats | unchanged | unchanged type, times `scale` |

`distinct` draws k distinct integers below n inside jit, by shifted integers. The i-th draw is
uniform over the n - i integers that are not drawn yet. Instead of listing these (a permutation of
n: 4,112 values for 5 draws) or rejecting repeats, draw r from 0 .. n - i - 1 and shift it past the
earlier draws: with c_0 < c_1 < ... the earlier draws, c_j - j of the free integers lie below c_j,
hence the r-th free integer is

    r + |{j : c_j - j <= r}|.

Every ordered choice is equally likely. Cost: k steps of O(k), independent of n, which is
4x faster than `top_k` of n uniforms for n = 183, equal to it for n = 20, and hundreds
of times faster than `jax.random.choice(replace=False)`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from metalearn._utils.fields import check_fields
from metalearn._utils.pixels import are_pixels
from metalearn.datasets.arrays import arrays, one_array, rows_of
from metalearn.datasets.class_index import ClassIndex, from_labels, labelled
from metalearn.datasets.folders import read_folder
from metalearn.datasets.task_sizes import check_classes, check_sizes, check_task
from metalearn.tasks import Tasks
from metalearn.unroll import Episode

Scales = tuple[float | None, ...]  # for each array of an example; None: by its type


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FewShot(Tasks):
    """N-way K-shot tasks over an index of classes, on the device.

    Create one with `FewShot.from_arrays(inputs, labels, ...)`, or of an index with
    `FewShot.create(index, ...)`.

    A pytree: `examples` and `counts` are its leaves, so pass it to jit as an argument
    (a jit that closes over it would store the whole dataset as a constant of the program).

    Args:
      examples: [classes, examples, ...], or a pytree of such arrays.
      counts: [classes] int32, the number of real examples of each class.
      ways: classes in a task.
      shots: support examples per class.
      queries: query examples per class.
      scale: for each array of an example, the factor of its values; None: uint8 images are
        divided by 255, others unchanged. (): None for all.
      variants: of every class, such as the four quarter turns of `rotate`, where a task has one at
        most of each; 1: all classes are classes of their own.
    """

    examples: Any = dataclasses.field(repr=False)
    counts: jax.Array = dataclasses.field(repr=False)
    ways: int = dataclasses.field(metadata={"static": True})
    shots: int = dataclasses.field(metadata={"static": True})
    queries: int = dataclasses.field(metadata={"static": True})
    scale: Scales = dataclasses.field(default=(), metadata={"static": True}, repr=False)
    variants: int = dataclasses.field(default=1, metadata={"static": True}, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls,
        index: ClassIndex,
        *,
        ways: int,
        shots: int,
        queries: int,
        scale: Any = None,
        variants: int = 1,
    ) -> FewShot:
        """Put an index on the device, after checking that such tasks can be drawn from it.

        Args:
          index: the examples by class. uint8 images are scaled to 0..1; floats and other
            integers (features, tokens) are unchanged.
          ways: classes in a task.
          shots: support examples per class.
          queries: query examples per class.
          scale: a factor for the values of all inputs, such as 1 / 255; or a pytree like the
            inputs of an example, of factors and None. None: only uint8 images are scaled.
          variants: how many the index has of every class, as `rotate` orders them: 4 of a rotated
            one. A task then has one at most of each, drawn at random, as in MAML's published code
            on Omniglot. 1: a task may have several turns of one character, as classes.

        Raises:
          ValueError: if the index has fewer than `ways` classes (variants counted once), or a
            class has fewer than `shots + queries` examples; if a size is not an integer, or there
            are not as many variants of each class; for uint8 examples that are not images, which
            may be pixels or tokens; or for a scale that is no number.
          TypeError: if `index` is not a `ClassIndex` of arrays.
        """
        index = _arrays(index)
        classes, rest = divmod(len(index.counts), max(int(variants), 1))
        if variants < 1 or rest:
            raise ValueError(
                f"`FewShot.create(variants={variants})`: the {len(index.counts)} classes of the "
                "index are not as many of each. Pass 4 for `rotate(index)`, or 1."
            )
        check_sizes(index.counts[:classes], ways, shots, queries)
        check_sizes(index.counts, ways, shots, queries)
        scales = check_scale(index.examples, scale, 2)
        examples, counts = jax.tree.map(jnp.asarray, (index.examples, index.counts))
        sizes = int(ways), int(shots), int(queries)
        return cls(examples, counts, *sizes, scales, int(variants))

    @classmethod
    def from_arrays(
        cls,
        inputs: Any,
        labels: Any,
        *,
        ways: int,
        shots: int,
        queries: int,
        scale: Any = None,
    ) -> FewShot:
        """Make tasks of examples with their labels, put on the device.

        Features and float images are used as they are. Images of uint8 become float32 in 0..1,
        unless `scale` says otherwise. Integers of other types (tokens) stay integers. 64-bit
        numbers become 32-bit ones, unless `jax_enable_x64` is set.

        Args:
          inputs: [n, ...] of any numbers: an array, a list, or a dictionary, tuple or another
            pytree of arrays, each with a row for every example.
          labels: [n] integers or names, an array or a list: the classes.
          ways: classes in a task.
          shots: support examples per class.
          queries: query examples per class.
          scale: see `create`; 1 leaves the values of uint8 pixels at 0..255.

        Raises:
          ValueError: if there are not as many inputs as labels, or one class only; and as
            `create`.
          TypeError: if inputs or labels are no arrays of numbers (or names).

        >>> features = np.random.default_rng(0).normal(size=(40, 3))
        >>> tasks = FewShot.from_arrays(features, ["a", "b"] * 20, ways=2, shots=1, queries=4)
        >>> tasks.sample(jax.random.key(0)).support[0].shape
        (2, 3)
        """
        inputs, names, classes = labelled("FewShot.from_arrays", inputs, labels)
        check_classes("FewShot.from_arrays", names, np.bincount(classes), shots, queries)
        index = from_labels(inputs, classes)
        return cls.create(index, ways=ways, shots=shots, queries=queries, scale=scale)

    @classmethod
    def from_folder(
        cls,
        folder: str | pathlib.Path,
        *,
        ways: int,
        shots: int,
        queries: int,
        size: Sequence[int] | None = None,
        channels: int | None = None,
        scale: Any = None,
        progress: bool = True,
    ) -> FewShot:
        """Make tasks of a folder of PNG and JPEG images, with a subfolder for each class.

        The decoded images are cached; see `metalearn.datasets.folders`.

        Args:
          folder: such as "data/train", which holds data/train/CLASS/IMAGE.png.
          ways: classes in a task.
          shots: support examples per class.
          queries: query examples per class.
          size: (height, width) to resize all images to; None: they are of one size.
          channels: 1 (grey), 3 (RGB) or 4 (RGBA); None: 1 if every image is grey, else 3.
          scale: see `create`; None: pixels are float32 in 0..1.
          progress: show a progress bar while images are decoded.

        Raises:
          FileNotFoundError: if there is no such folder.
          ValueError: if it has fewer than two classes, one has too few images, an image cannot be
            read, or the images have several sizes and none is asked for.
        """
        check_task(ways, shots, queries)
        read = read_folder(folder, size=size, channels=channels, progress=progress)
        assert read.labels is not None  # there are two classes at least
        what, counts = f"FewShot.from_folder({str(folder)!r})", np.bincount(read.labels)
        larger = "the {few} smaller ones: move their folders elsewhere"
        check_classes(what, np.asarray(read.classes), counts, shots, queries, larger)
        index = from_labels(read.images, read.labels)
        return cls.create(index, ways=ways, shots=shots, queries=queries, scale=scale)

    def label_range(self) -> tuple[int, int]:
        """Return (0, ways - 1)."""
        return 0, self.ways - 1

    def indices(self, key: jax.Array) -> tuple[Int[Array, " ways"], Int[Array, "ways examples"]]:
        """Draw one task as indices: classes [ways], examples [ways, shots + queries], int32."""
        needed = self.shots + self.queries
        return draw_indices(key, self.counts, self.ways, needed, self.variants)

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task, grouped by class: label 0 first, label ways-1 last.

        Returns:
          `support` = (inputs [ways * shots, ...], labels [ways * shots] int32 in
          0 .. ways-1), and `query` likewise with `queries` per class. Inputs of uint8 images
          are float32 in 0..1, others as in the index. Classes are distinct, and so are all
          examples of a class in the episode.
        """
        classes, picks = support_first(*self.indices(key), self.shots)
        inputs = jax.tree.map(lambda leaf: _gather(leaf, classes, picks), self.examples)
        return episode_of(inputs, self.ways, self.shots, self.queries, self.scale)


def draw_indices(
    key: jax.Array, counts: Int[Array, " classes"], ways: int, needed: int, variants: int = 1
) -> tuple[Int[Array, " {ways}"], Int[Array, "{ways} {needed}"]]:
    """Draw `ways` distinct classes and `needed` distinct examples of each, int32.

    Args:
      key: of the task.
      counts: the number of examples of each class.
      ways: classes of the task.
      needed: its examples of a class.
      variants: of every class, of which a task has one; see `FewShot`.
    """
    class_key, example_key = jax.random.split(key)
    if variants == 1:
        classes = distinct(class_key, counts.shape[0], ways)
    else:
        class_key, variant_key = jax.random.split(class_key)
        different = counts.shape[0] // variants
        turns = jax.random.randint(variant_key, (ways,), 0, variants, jnp.int32)
        classes = distinct(class_key, different, ways) + different * turns
    keys = jax.random.split(example_key, ways)
    return classes, jax.vmap(lambda key, n: distinct(key, n, needed))(keys, counts[classes])


def support_first(
    classes: Int[Array, " ways"], picks: Int[Array, "ways examples"], shots: int
) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """Return (class, number in the class) of each example: the support set, then the query set.

    One gather of rows, then two contiguous slices: on a CPU twice as fast as two gathers, or as a
    slice per class.
    """
    classes = jnp.broadcast_to(classes[:, None], picks.shape)

    def flat(table: jax.Array) -> jax.Array:
        return jnp.concatenate([table[:, :shots].reshape(-1), table[:, shots:].reshape(-1)])

    return flat(classes), flat(picks)


def _gather(examples: jax.Array, classes: jax.Array, picks: jax.Array) -> jax.Array:
    """Return some examples [n, ...] of [classes, per_class, ...]."""
    count, per_class, *shape = examples.shape
    table = examples.reshape(count * per_class, -1)
    return table[classes * per_class + picks].reshape(-1, *shape)


def episode_of(inputs: Any, ways: int, shots: int, queries: int, scale: Scales) -> Episode:
    """Return the episode of gathered examples in the order of `support_first`.

    Args:
      inputs: leaves [ways * (shots + queries), ...], in their stored type.
      ways: classes of the task.
      shots: support examples per class.
      queries: query examples per class.
      scale: for each leaf; see `FewShot`.
    """
    leaves, treedef = jax.tree.flatten(inputs)
    factors = scale or (None,) * len(leaves)
    scaled = [_scaled(leaf, factor) for leaf, factor in zip(leaves, factors, strict=True)]
    inputs, n = jax.tree.unflatten(treedef, scaled), ways * shots
    labels = jnp.arange(ways, dtype=jnp.int32)
    return Episode(
        (jax.tree.map(lambda leaf: leaf[:n], inputs), jnp.repeat(labels, shots)),
        (jax.tree.map(lambda leaf: leaf[n:], inputs), jnp.repeat(labels, queries)),
    )


def _scaled(leaf: jax.Array, factor: float | None) -> jax.Array:
    """Return examples [n, ...] as an episode holds them; see the table of the module."""
    if factor is not None:
        kind = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.float32
        return leaf.astype(kind) * jnp.asarray(factor, kind)
    if are_pixels("`FewShot`", leaf.dtype, leaf.shape[1:]):
        return leaf.astype(jnp.float32) / 255
    return leaf


def check_scale(examples: Any, scale: Any, axes: int) -> Scales:
    """Return a factor or None for each array of an example.

    Args:
      examples: arrays of examples, with `axes` axes before those of one example.
      scale: a number for all, or a pytree of numbers and None like the examples; None: none.
      axes: 1 for [n, ...], 2 for [classes, examples, ...].

    Raises:
      ValueError: for a scale that is no number, or of another structure; and where no scale is
        given, for uint8 examples that are no images.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(examples)

    def is_none(value: Any) -> bool:
        return value is None

    factors, like = jax.tree.flatten(scale, is_leaf=is_none)
    if len(factors) == 1 and not isinstance(scale, Mapping):
        factors, like = factors * len(leaves), treedef
    if like != treedef or not all(f is None or _is_factor(f) for f in factors):
        raise ValueError(
            f"`FewShot(scale={scale!r})`: it is a number that multiplies all inputs, such as "
            "1 / 255, or a structure like the inputs of an example, with a number or None for each "
            "array. None, the default, divides uint8 images by 255 and leaves all else as it is."
        )
    for leaf, factor in zip(leaves, factors, strict=True):
        if factor is None:
            are_pixels("`FewShot`", leaf.dtype, leaf.shape[axes:])
    return tuple(None if f is None else float(f) for f in factors)


def _is_factor(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and not isinstance(value, bool) and bool(np.isfinite(value)) and value != 0


def _arrays(index: Any) -> ClassIndex:
    """Return an index of arrays; TypeError or ValueError if it is not one."""
    if not isinstance(index, ClassIndex):
        raise TypeError(
            f"`FewShot.create` takes a `ClassIndex`, examples by class, not a "
            f"{type(index).__name__}. Of examples with their labels: "
            "`FewShot.from_arrays(inputs, labels, ...)`, or an index by "
            "`from_labels(inputs, labels)`."
        )
    examples = arrays("ClassIndex", "examples", index.examples, "[classes, examples, ...]")
    counts = np.asarray(one_array("ClassIndex", "counts", index.counts, "[classes]"))
    classes = rows_of("ClassIndex", "examples", examples)
    leaves = jax.tree.leaves(examples)
    held = {leaf.shape[1] for leaf in leaves if leaf.ndim >= 2}
    shapes_fit = all(leaf.ndim >= 2 for leaf in leaves) and len(held) == 1
    fit = shapes_fit and counts.shape == (classes,) and counts.size
    if not (fit and counts.dtype.kind in "iu" and 0 <= counts.min()):
        shapes = ", ".join(str([*leaf.shape]) for leaf in leaves)
        raise ValueError(
            f"`ClassIndex` got examples {shapes} and counts {counts.dtype}"
            f"{list(counts.shape)}, but counts say how many examples each class has: integers "
            "[classes] beside examples [classes, examples, ...]. Of examples with their labels "
            "`from_labels` makes an index."
        )
    most = held.pop()
    if counts.max() > most:
        raise ValueError(
            f"`ClassIndex` says that class {int(counts.argmax())} has {counts.max()} examples, but "
            f"its examples {list(leaves[0].shape)} hold {most} of a class. Count those "
            "that are there."
        )
    return ClassIndex(examples, counts)


def distinct(key: jax.Array, n: Int[Array, ""] | int, k: int) -> Int[Array, " {k}"]:
    """Return k distinct integers from 0 .. n-1, in uniformly random order: [k] int32.

    Args:
      key: a PRNG key.
      n: () integer, may be traced; at least k (which the caller checks) and below 2**23,
        the resolution of a float32 uniform.
      k: the number of draws, static.
    """
    steps = jnp.arange(k, dtype=jnp.int32)
    uniforms = jax.random.uniform(key, (k,), jnp.float32)
    draws = jnp.floor(uniforms * (n - steps)).astype(jnp.int32)

    def pick(earlier: jax.Array, draw: jax.Array) -> tuple[jax.Array, jax.Array]:
        picked = draw + jnp.sum(earlier - steps <= draw, dtype=jnp.int32)
        below = jnp.concatenate([jnp.full_like(earlier[:1], -1), earlier[:-1]])
        return jnp.clip(picked, below, earlier), picked  # `picked` inserted into `earlier`

    empty = jnp.full((k,), jnp.iinfo(jnp.int32).max, jnp.int32)  # earlier draws, ascending, padded
    return jax.lax.scan(pick, empty, draws)[1]
