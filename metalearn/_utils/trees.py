"""Splitting a pytree's leaves by kind or by path, and joining them again.

Inner states, batches and model statistics mix float arrays with integers, booleans and PRNG keys,
and only the first kind carries derivatives. An algorithm may adapt some parameters and not others,
and names them by path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Where = str | Callable[[str], bool]  # a regular expression for paths, or a function of one
Join = Callable[[Sequence[Any], Sequence[Any]], Any]


def is_array(leaf: Any) -> bool:
    """Return whether a leaf is an array; a Python scalar is not, it stays static."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def is_differentiable(leaf: Any) -> bool:
    """Return whether a leaf carries derivatives: a floating-point or complex array or scalar."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def split(
    tree: Any, where: Callable[[Any], bool] | Sequence[bool] = is_differentiable
) -> tuple[list[Any], list[Any], Join]:
    """Return (leaves where true, other leaves, a function that joins them again).

    Args:
      tree: any pytree.
      where: a function leaf -> bool, or a bool for each leaf.
    """
    if callable(where):
        where = [where(leaf) for leaf in jax.tree.leaves(tree)]
    return _split(tree, where)


def split_by_path(tree: Any, where: Where) -> tuple[list[Any], list[Any], Join]:
    """Split into the leaves whose path matches, and the others; see `matching`."""
    return _split(tree, matching(paths(tree), where))


def matching(names: Sequence[str], where: Where) -> list[bool]:
    """Return whether each path matches a regular expression, or a function says so.

    A path is written like "params/head/kernel". ValueError, with all paths, if none matches the
    expression; a function may choose none.
    """
    if callable(where):
        return [bool(where(name)) for name in names]
    mask = [re.search(where, name) is not None for name in names]
    if not any(mask):
        raise ValueError(f"No parameter path matches {where!r}. There are: {', '.join(names)}.")
    return mask


def masked(tree: Any, mask: Sequence[bool]) -> Any:
    """Return the tree with an `optax.MaskedNode`, which has no leaves, where the mask is false."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, mask, strict=True)
    return jax.tree.unflatten(treedef, [leaf if m else optax.MaskedNode() for leaf, m in pairs])


def filled(tree: Any, others: Any) -> Any:
    """Return a tree from `masked` with the leaves of `others` where it has none."""
    return jax.tree.map(
        lambda leaf, other: other if is_masked(leaf) else leaf, tree, others, is_leaf=is_masked
    )


def is_masked(node: Any) -> bool:
    """Return whether a node is an `optax.MaskedNode`."""
    return isinstance(node, optax.MaskedNode)


def nodes(tree: Any, kinds: Any) -> Iterator[Any]:
    """Yield the nodes of a tree that are of some kinds, from the outside in."""

    def is_kind(node: Any) -> bool:
        return isinstance(node, kinds)

    return filter(is_kind, jax.tree.leaves(tree, is_leaf=is_kind))


def paths(tree: Any) -> list[str]:
    """Return the path of each leaf, its keys joined by slashes."""
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_path]


def precision(x: Any) -> Any:
    """Return the dtype to compute in: that of an array, and float32 at least."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def precise(x: jax.Array) -> jax.Array:
    """Return an array in float32 at least: bfloat16 has eight bits, too few for sums and moves."""
    return x.astype(precision(x))


def strong(tree: Any) -> Any:
    """Return the arrays without weak types, which would cause a second compilation of a step."""

    def convert(leaf: Any) -> Any:
        if jax.dtypes.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
            return leaf  # keys have no weak type
        return jax.lax.convert_element_type(leaf, jnp.result_type(leaf))

    return jax.tree.map(convert, tree)


def in_dtypes_of(old: Any, new: Any) -> Any:
    """Return `new` with its float leaves in the dtypes of `old`, a tree of the same structure."""

    def convert(before: Any, after: Any) -> Any:
        return after.astype(jnp.result_type(before)) if is_differentiable(after) else after

    return jax.tree.map(convert, old, new)


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """Return `yes` if a condition () holds, else `no`: pytrees of arrays, PRNG keys included."""
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def size(tree: Any) -> int:
    """Return the number of scalars in a pytree."""
    return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(tree))


def _split(tree: Any, mask: Sequence[bool]) -> tuple[list[Any], list[Any], Join]:
    leaves, treedef = jax.tree.flatten(tree)

    def join(chosen: Sequence[Any], others: Sequence[Any]) -> Any:
        sources = iter(chosen), iter(others)
        return jax.tree.unflatten(treedef, [next(sources[0 if m else 1]) for m in mask])

    chosen = [leaf for leaf, m in zip(leaves, mask, strict=True) if m]
    others = [leaf for leaf, m in zip(leaves, mask, strict=True) if not m]
    return chosen, others, join
