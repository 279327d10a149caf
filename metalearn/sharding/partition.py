"""Rules for how arrays are cut over a mesh: by their path in a pytree, the first match counts.

    (("embedding", P("model")), ("kernel$", P(None, "model")))

An array whose path has "embedding" in it is cut along its first axis, one that ends in "kernel"
along its second, and every other one is whole on every device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from metalearn._utils.checks import unusable
from metalearn._utils.trees import paths
from metalearn.sharding.mesh import TASKS, format_sizes

Rules = tuple[tuple[str, P], ...]
Sizes = Mapping[str, int]  # of a mesh, by axis
SpecsByShape = dict[tuple[int, ...], P]


def check_rules(rules: Rules, sizes: Sizes) -> None:
    """Raise ValueError for a rule that names an axis which it cannot cut along."""
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
    """Return how a leaf of eta is cut; ValueError where its rule does not divide its shape."""
    spec = _rule(rules, path)
    if not _fits(spec, sizes, shape):
        raise ValueError(
            f"The rule for {path!r} of eta is {spec}, which does not divide its shape {shape} on "
            f"the mesh {format_sizes(sizes)}. Give that path a rule of its own before this one: P() for "
            "a copy on every device."
        )
    return spec


def state_spec(
    rules: Rules, sizes: Sizes, path: str, shape: tuple[int, ...], alike: SpecsByShape
) -> P:
    """Return how a leaf that is none of eta's is cut: by its path, or like eta's of its shape.

    The state of an optimizer and inner states hold scalars and factors beside arrays like eta, so
    a rule that does not fit here is left alone.
    """
    spec = _rule(rules, path)
    return spec if axes(spec) and _fits(spec, sizes, shape) else alike.get(shape, P())


def specs_by_shape(rules: Rules, sizes: Sizes, eta: Any) -> SpecsByShape:
    """Return how the leaves of eta are cut by their shape, where all of a shape are cut alike."""
    found: dict[tuple[int, ...], set[P]] = {}
    for path, leaf in zip(paths(eta), jax.tree.leaves(eta), strict=True):
        found.setdefault(leaf.shape, set()).add(eta_spec(rules, sizes, path, leaf.shape))
    return {shape: next(iter(specs)) for shape, specs in found.items() if len(specs) == 1}


def axes(spec: P) -> list[str]:
    """Return the axes of a mesh that a spec names."""
    parts = [part if isinstance(part, tuple) else (part,) for part in spec]
    return [axis for part in parts for axis in part if axis is not None]


def _rule(rules: Rules, path: str) -> P:
    return next((spec for pattern, spec in rules if re.search(pattern, path)), P())


def _fits(spec: P, sizes: Sizes, shape: tuple[int, ...]) -> bool:
    cuts = [math.prod(sizes[axis] for axis in axes(P(part))) for part in spec]
    return len(cuts) <= len(shape) and not any(
        size % cut for size, cut in zip(shape, cuts, strict=False)
    )
