"""Partition rules: how arrays are sharded over a mesh, by their path in a pytree.

    (("embedding", P("model")), ("kernel$", P(None, "model")))

A rule is a regular expression and a `PartitionSpec`; the first rule that matches a path counts.
Here an array with "embedding" in its path is sharded along its first axis, one whose path ends in
"kernel" along its second, and every other array is replicated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TypeAlias

import jax
from jax.sharding import PartitionSpec as P

from metalearn._utils.checks import unusable
from metalearn._utils.trees import paths
from metalearn.sharding.mesh import TASKS, format_sizes
from metalearn.unroll import Eta

Rules: TypeAlias = tuple[tuple[str, P], ...]
Sizes: TypeAlias = Mapping[str, int]  # of a mesh, by axis
SpecsByShape: TypeAlias = dict[tuple[int, ...], P]


def check_rules(rules: Rules, sizes: Sizes) -> None:
    """Raise ValueError for an invalid pattern, or an axis that a rule cannot shard along."""
    for pattern, spec in rules:
        if reason := unusable(pattern):
            raise ValueError(
                f"The rule {pattern!r:.80}: {spec} is no regular expression of a path: {reason}"
            )
        for axis in axes(spec):
            if axis == TASKS:
                raise ValueError(
                    f"The rule {pattern!r}: {spec} cuts along {TASKS!r}, where every device needs "
                    'all of eta for tasks of its own. Cut along another axis, such as "model".'
                )
            if axis not in sizes:
                raise ValueError(
                    f"The rule {pattern!r}: {spec} names the axis {axis!r}, which is not in the "
                    f"mesh {format_sizes(sizes)}."
                )


def eta_spec(rules: Rules, sizes: Sizes, path: str, shape: tuple[int, ...]) -> P:
    """Return the spec of a leaf of eta; ValueError if its rule does not divide its shape."""
    spec = _rule(rules, path)
    if not fits(spec, sizes, shape):
        raise ValueError(
            f"The rule for {path!r} of eta is {spec}, which does not divide its shape {shape} on "
            f"the mesh {format_sizes(sizes)}. Give that path a rule of its own before this one: "
            "P() for a copy on every device."
        )
    return spec


def state_spec(
    rules: Rules, sizes: Sizes, path: str, shape: tuple[int, ...], eta_specs: SpecsByShape
) -> P:
    """Return the spec of a leaf of another state: by path, or that of eta's leaves of its shape.

    Optimizer states and inner states hold scalars and factors besides arrays like eta, so a rule
    that does not divide the shape is ignored here.
    """
    spec = _rule(rules, path)
    return spec if axes(spec) and fits(spec, sizes, shape) else eta_specs.get(shape, P())


def specs_by_shape(rules: Rules, sizes: Sizes, eta: Eta) -> SpecsByShape:
    """Return the spec of the leaves of eta by shape, for shapes whose leaves all have the same."""
    specs_of: dict[tuple[int, ...], set[P]] = {}
    for path, leaf in zip(paths(eta), jax.tree.leaves(eta), strict=True):
        specs_of.setdefault(leaf.shape, set()).add(eta_spec(rules, sizes, path, leaf.shape))
    return {shape: next(iter(specs)) for shape, specs in specs_of.items() if len(specs) == 1}


def matches(pattern: str, path: str) -> bool:
    """Say whether a rule's pattern matches a path."""
    return re.search(pattern, path) is not None


def fits(spec: P, sizes: Sizes, shape: tuple[int, ...]) -> bool:
    """Say whether a spec divides a shape."""
    shards = [math.prod(sizes[axis] for axis in axes(P(part))) for part in spec]
    return len(shards) <= len(shape) and not any(
        size % count for size, count in zip(shape, shards, strict=False)
    )


def without(axis: str, spec: P) -> P:
    """Return a spec without one axis of the mesh.

    >>> tuple(without("data", P("data", ("model", "data"))))
    (None, 'model')
    """
    parts = [[each for each in axes(P(part)) if each != axis] for part in spec]
    return P(*(tuple(part) if len(part) > 1 else next(iter(part), None) for part in parts))


def axes(spec: P) -> list[str]:
    """Return the mesh axes that a spec names."""
    parts = [part if isinstance(part, tuple) else (part,) for part in spec]
    return [axis for part in parts for axis in part if axis is not None]


def _rule(rules: Rules, path: str) -> P:
    return next((spec for pattern, spec in rules if matches(pattern, path)), P())
