"""Parameters from elsewhere put into a model, or into an eta, by their names.

A name is the path of a leaf, "encoder/layer_0/kernel". The tree with the values may be nested or a
flat dictionary, with slashes or dots in its names, as in a safetensors file. Every name must have
its place, of the same shape; the values take the dtype of the place.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.fields import check_fields
from metalearn._utils.trees import filled, masked, matching, paths, split
from metalearn.engines.inner_loop import depends
from metalearn.model import Model

LOGGER = logging.getLogger("metalearn.models")
SHOWN = 8  # names of one kind in a report


class Match(NamedTuple):
    """Which names of two trees belong together. Its text is a report.

    Args:
      matched: name in the target -> name among the given parameters.
      untouched: names in the target that nothing was given for.
      unknown: given names that the target does not have.
      shapes: name in the target -> (its shape, the given shape), where they differ.
    """

    matched: Mapping[str, str]
    untouched: tuple[str, ...]
    unknown: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __str__(self) -> str:
        total = len(self.matched) + len(self.untouched)
        lines = [f"{len(self.matched)} of {total} parameters were given."]
        differing = [
            f"{name} is {list(ours)}, given {list(theirs)}"
            for name, (ours, theirs) in self.shapes.items()
        ]
        unknown = [f"{name}{self._nearest(name)}" for name in self.unknown]
        for what, names in (
            ("Not given", self.untouched),
            ("Given, with no place", unknown),
            ("Of another shape", differing),
        ):
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines += [f"{what}: {', '.join(names[:SHOWN])}{more}."] if names else []
        return " ".join(lines)

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.untouched, 1)
        return f" (is it {near[0]}?)" if near else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained(Model):
    """A model that is initialised with given parameters, by `with_params`.

    They are the model's `constants`: compiled programs take them as arguments.

    Args:
      model: whose parameters they are.
      params: the parameters, by name.
      state: the model's mutable state, such as running statistics; None: as the model initialises.
      partial: whether parameters may be missing, which the model then initialises itself.
    """

    model: Model
    params: Any
    state: Any = None
    partial: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        leaves = jax.tree.leaves((self.params, self.state))
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            jax.eval_shape(self.init, jax.random.key(0))

    def __repr__(self) -> str:
        count = len(jax.tree.leaves(self.params))
        return f"Pretrained({self.model!r}, {count} arrays, partial={self.partial})"

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (the given parameters, the given state)."""
        params, state = self.model.init(key)
        params = with_params(params, self.params, partial=self.partial)
        return params, state if self.state is None else _like(state, self.state)

    def apply(
        self,
        params: Any,
        state: Any,
        inputs: Any,
        *,
        train: bool,
        dropout: bool = True,
        key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Return (outputs, new state)."""
        return self.model.apply(params, state, inputs, train=train, dropout=dropout, key=key)

    def constants(self) -> Any:
        """Return the given arrays, and those of the model."""
        return self.params, self.state, self.model.constants()

    def bind(self, constants: Any) -> Model:
        """Return the same model with these arrays."""
        params, state, inner = constants
        bound = self.model.bind(inner)
        return dataclasses.replace(self, model=bound, params=params, state=state)


@dataclasses.dataclass(frozen=True)
class Trainable(Model):
    """A model of which some parameters are parameters, and all others constants.

    Params are those of the model, with an `optax.MaskedNode` in place of each constant. For
    algorithms whose inner loop trains every parameter of a model; `MAML` says by itself what
    adapts and what is learned.

    Args:
      model: whose constants are the same for every key, as those of `with_params` are.
      paths: the parameters that stay parameters, a regular expression or a function of a path.
    """

    model: Model
    paths: str | Callable[[str], bool]

    def __post_init__(self) -> None:
        check_fields(self)
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(self.model.constants())):
            return  # checked before it was bound
        params, _ = jax.eval_shape(self.model.init, jax.random.key(0))
        where = [not m for m in matching(paths(params), self.paths)]

        def others(key: jax.Array) -> list[Any]:
            return split(self.model.init(key)[0], where)[0]

        if depends(others, jax.random.key(0)):
            raise ValueError(
                f"`Trainable(paths={self.paths!r})` makes the other parameters constants, but the "
                "model draws them at random. Give it their values: `with_params(model, params)`."
            )

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (the parameters that stay parameters, the model's state)."""
        params, state = self.model.init(key)
        return masked(params, matching(paths(params), self.paths)), state

    def apply(
        self,
        params: Any,
        state: Any,
        inputs: Any,
        *,
        train: bool,
        dropout: bool = True,
        key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Return (outputs, new state)."""
        return self.model.apply(
            self.whole(params), state, inputs, train=train, dropout=dropout, key=key
        )

    def whole(self, params: Any) -> Any:
        """Return all parameters of the model, the constants too."""
        return filled(params, self.model.init(jax.random.key(0))[0])


def with_params(target: Any, params: Any, *, state: Any = None, partial: bool = False) -> Any:
    """Put parameters into a model, an eta or a tree of parameters, by name.

    The report of what matched is logged at level info, and is `match(target, params)`.

    Args:
      target: a `Model`, which then initialises with them; or a pytree of arrays, such as the eta
        of MAML, whose names may begin with one more part ("params/..."). Other parts of a named
        tuple, such as learned rates, stay as they are.
      params: a pytree of arrays, or a flat dictionary.
      state: of a model: its mutable state, a pytree like that of its `init`.
      partial: allow parameters of the target that are not given; they stay as they are.

    Raises:
      ValueError: where names or shapes do not match, with the report.
    """
    if isinstance(target, Model):
        params, state = jax.tree.map(jnp.asarray, (params, state))  # on the device, once
        return Pretrained(target, params, state, partial)
    matches = match(target, params)
    if matches.unknown or matches.shapes or (matches.untouched and not partial):
        way_out = ""
        if matches.untouched and not (matches.unknown or matches.shapes):
            way_out = " To leave those as they are: `partial=True`."
        if matches.shapes and not matches.unknown:
            way_out = (
                " Leave those of another shape, such as a head of other classes, out of what you "
                "give, with `partial=True`: they stay as the target has them."
            )
        raise ValueError(f"`with_params`: the names do not match. {matches}{way_out}")
    LOGGER.info("with_params: %s", matches)
    values = dict(zip(paths(params), jax.tree.leaves(params), strict=True))
    names = iter(paths(target))

    def put(leaf: Any) -> Any:
        name = next(names)
        if name not in matches.matched:
            return leaf
        return jnp.asarray(values[matches.matched[name]], jnp.result_type(leaf))

    return jax.tree.map(put, target)


def match(target: Any, params: Any) -> Match:
    """Return which names of `params` have a place in `target`.

    Args:
      target: a `Model`, whose parameters it stands for; or a pytree of arrays or shapes.
      params: a pytree of arrays, or a flat dictionary.
    """
    if isinstance(target, Model):
        key = jax.eval_shape(lambda: jax.random.key(0))
        target, _ = jax.eval_shape(target.init, key)
    theirs = dict(zip(paths(params), map(np.shape, jax.tree.leaves(params)), strict=True))
    ours = dict(zip(paths(target), map(np.shape, jax.tree.leaves(target)), strict=True))
    plain = {name if name in ours else name.replace(".", "/"): name for name in theirs}
    starts = ["", *dict.fromkeys(f"{name.partition('/')[0]}/" for name in ours)]
    # The parameters may be one part of the target: take the beginning that most names fit.
    fits = {start: sum(start + name in ours for name in plain) for start in starts}
    start, *others = sorted(fits, key=lambda start: -fits[start])
    if start and others and 0 < fits[others[0]] == fits[start]:  # whole names come first
        raise ValueError(
            f"`with_params`: the names fit under {start!r} and {others[0]!r} of the target alike. "
            "Give them with that part of their names, as {'" + start + "...': array}."
        )
    matches = {
        start + name: given_name for name, given_name in plain.items() if start + name in ours
    }
    given: tuple[str, ...] = ("",)
    if hasattr(target, "_fields") and matches:  # an eta: of its other parts nothing is given
        given = tuple(f"{name.partition('/')[0]}/" for name in matches)
    shapes = {n: (ours[n], theirs[g]) for n, g in matches.items() if ours[n] != theirs[g]}
    return Match(
        {name: matches[name] for name in ours if name in matches},
        tuple(name for name in ours if name not in matches and f"{name}/".startswith(given)),
        tuple(given_name for name, given_name in plain.items() if start + name not in ours),
        shapes,
    )


def _like(state: Any, values: Any) -> Any:
    """Return the values of a state in the dtypes of `state`; ValueError for another structure."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (state, values)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"`with_params(state=)`: the model's state is {paths(state)}, but the one that was "
            f"given is {paths(values)}. Take it from the model's `init` or `apply`."
        )
    return jax.tree.map(lambda s, v: jnp.asarray(v, jnp.result_type(s)), state, values)
