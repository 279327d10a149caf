"""One inner run over several devices: data parallel, and its states sharded as in FSDP.

With one task, or fewer tasks than devices, the axis "tasks" of a mesh leaves devices idle. Along
the axis "data" several devices share the inner run of a task. Each of them computes the inner loss
of its part of the examples, and the compiler adds what a data-parallel training step sends,

    g = sum over devices of grad L on its examples       one all-reduce of an inner gradient

and the like for Hessian products in the backward pass. Without rules an inner state (parameters,
optimizer state, statistics) has a copy on every device. Rules shard it along the same axis:

    Layout(make_mesh(tasks=1, data=8), rules=(("kernel$", P("data")), ("bias$", P("data"))))

Every device then stores 1/n of the parameters and of the optimizer's moments, and of what is saved
of them for the backward pass; it gathers parameters before a loss and keeps its part of the
gradient (FSDP, Zhao et al. 2023, arXiv:2304.11277; ZeRO, Rajbhandari et al. 2019,
arXiv:1910.02054).

    P()          a copy on every device     all-reduce of each gradient
    P("data")    1/n on every device        all-gather before a loss, all-reduce of each gradient

An all-reduce of which a device keeps 1/n is a reduce-scatter where the compiler has one (on GPUs
and TPUs). Which arrays hold examples: every leaf of an inner batch, along its first axis, and what
`Algorithm.shard_examples` shards of an episode. Any loss is exact, whether it is a mean over
examples or ties them together, as batch normalisation does: these are constraints on the layout of
arrays (`jax.lax.with_sharding_constraint`), which change no value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from metalearn._utils.trees import paths
from metalearn.sharding import partition
from metalearn.sharding.layout import Layout
from metalearn.sharding.mesh import DATA, format_devices, format_sizes, on_current_mesh
from metalearn.unroll import Batch, Eta, ExampleMean, GradFn, InnerState, Metrics, Unroll

Shape: TypeAlias = tuple[int, ...]


def shard_examples(layout: Layout, tree: Any, axis: int = 0) -> Any:
    """Return a pytree whose leaves are sharded along one axis over the mesh axis "data".

    A leaf that has no such axis, or one that does not divide, is returned unchanged.

    One number an example is often that of a row of shuffled data. The compiler would shuffle them
    on all devices together, which sends more than they are: each device computes all of them.
    """

    def shard(leaf: Any) -> Any:
        if not _divides(layout, jnp.shape(leaf)[axis:]):
            return leaf
        if jnp.ndim(leaf) == axis + 1:
            leaf = _constrained(layout, leaf, P())
        return _constrained(layout, leaf, P(*(None,) * axis, DATA))

    return tree if layout.data == 1 else jax.tree.map(shard, tree)


def constrain(layout: Layout, unroll: Unroll, examples: Sequence[Shape] = ()) -> Unroll:
    """Return the unroll with its inner states and inner batches laid out over the devices.

    Args:
      layout: the mesh and the rules.
      unroll: of a task.
      examples: the shapes of the arrays that inner steps read besides their batch, and that are
        sharded by now.
    """

    def init(eta: Eta) -> InnerState:
        return _laid_out(layout, unroll.init(eta), eta)

    def laid_out(move: Callable[..., InnerState]) -> Callable[..., InnerState]:
        def moved(eta: Eta, state: InnerState, batch: Batch, grad: GradFn) -> InnerState:
            _check_batch(layout, batch, examples)
            batch = _sharded_batch(layout, batch)
            after = move(eta, state, batch, _gathering(layout, grad, state, eta))
            return _laid_out(layout, after, eta)

        return moved

    def loss(eta: Eta, state: InnerState) -> tuple[jax.Array, Metrics]:
        eta_specs = [
            partition.eta_spec(layout.rules, layout.mesh.shape, path, leaf.shape)
            for path, leaf in zip(paths(eta), jax.tree.leaves(eta), strict=True)
        ]
        state = _gathered(layout, state, _state_specs(layout, state, eta))
        return unroll.loss(_gathered(layout, eta, eta_specs), state)

    undo = laid_out(unroll.undo) if unroll.undo else None
    return unroll._replace(init=init, step=laid_out(unroll.step), loss=loss, undo=undo)


def check_rules(layout: Layout, trees: Mapping[str, Any]) -> None:
    """Raise ValueError for a rule that matches no array, or shards none that it matches.

    Args:
      layout: the mesh and the rules.
      trees: what the rules are for, by name: eta, the outer optimizer's state, an inner state.
    """
    leaves = [
        (path, jnp.shape(leaf))
        for tree in trees.values()
        for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True)
    ]
    for pattern, spec in layout.rules:
        matched = [leaf for leaf in leaves if partition.matches(pattern, leaf[0])]
        if not matched:
            shown = ", ".join(dict.fromkeys(path for path, _ in leaves))
            raise ValueError(
                f"The rule {pattern!r}: {spec} matches no array of {_listed(trees)}, so it would "
                f"shard nothing. Their paths are: {shown:.800}."
            )
        if partition.axes(spec) and not any(
            partition.fits(spec, layout.mesh.shape, shape) for _, shape in matched
        ):
            shown = ", ".join(dict.fromkeys(f"{path} {list(shape)}" for path, shape in matched))
            raise ValueError(
                f"The rule {pattern!r}: {spec} divides none of the arrays that it matches on the "
                f"mesh {format_sizes(layout.mesh.shape)}, so it would shard nothing: {shown:.800}. "
                "Shard another of their axes, or over fewer devices."
            )


def _listed(names: Any) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else str(last)


# Inner states.


def _state_specs(layout: Layout, state: InnerState, eta: Eta) -> list[P]:
    """Return the spec of each leaf of an inner state."""
    rules, sizes = layout.rules, layout.mesh.shape
    by_shape = partition.specs_by_shape(rules, sizes, eta)
    leaves = zip(paths(state), jax.tree.leaves(state), strict=True)
    return [partition.state_spec(rules, sizes, p, jnp.shape(leaf), by_shape) for p, leaf in leaves]


def _laid_out(layout: Layout, state: InnerState, eta: Eta) -> InnerState:
    """Return an inner state sharded by the rules."""
    return _by_leaf(layout, state, _state_specs(layout, state, eta))


def _gathered(layout: Layout, tree: Any, specs: Sequence[P]) -> Any:
    """Return a pytree whose leaves are gathered from the devices of the axis "data"."""

    def gathered(leaf: Any, spec: P) -> Any:
        if DATA not in partition.axes(spec):
            return leaf
        return _constrained(layout, leaf, partition.without(DATA, spec))

    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, map(gathered, leaves, specs))


def _by_leaf(layout: Layout, tree: Any, specs: Sequence[P]) -> Any:
    """Return a pytree whose leaves are sharded by specs; those without axes are unchanged."""

    def sharded(leaf: Any, spec: P) -> Any:
        return _constrained(layout, leaf, spec) if partition.axes(spec) else leaf

    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, map(sharded, leaves, specs))


def _constrained(layout: Layout, leaf: Any, spec: P) -> jax.Array:
    """Return a leaf with a sharding, in a program that maps over tasks or not."""
    sharding = on_current_mesh(NamedSharding(layout.mesh, spec))
    return jax.lax.with_sharding_constraint(leaf, sharding)


# Inner gradients.


def _gathering(layout: Layout, grad: GradFn, state: InnerState, eta: Eta) -> GradFn:
    """Return a `grad` whose function gets gathered parameters, and whose result is sharded.

    An argument that is differentiated is sharded as the leaf of the inner state that it is, or as
    the leaves of its shape; others are left to the compiler.
    """
    specs = _state_specs(layout, state, eta)
    if not any(DATA in partition.axes(spec) for spec in specs):
        return grad
    leaves = jax.tree.leaves(state)
    by_leaf = {id(leaf): spec for leaf, spec in zip(leaves, specs, strict=True)}
    of_shape: dict[Shape, set[P]] = {}
    for leaf, spec in zip(leaves, specs, strict=True):
        of_shape.setdefault(jnp.shape(leaf), set()).add(spec)

    def spec_of(leaf: Any) -> P:
        same = of_shape.get(jnp.shape(leaf), set())
        return by_leaf.get(id(leaf)) or (next(iter(same)) if len(same) == 1 else P())

    def gathering(
        fun: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
    ) -> Callable[..., Any]:
        chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)

        def grad_fun(*args: Any, **kwargs: Any) -> Any:
            of_arg = {i: [spec_of(leaf) for leaf in jax.tree.leaves(args[i])] for i in chosen}
            whole = _on_gathered(layout, fun, of_arg)
            result = grad(whole, argnums=argnums, has_aux=has_aux)(*args, **kwargs)
            grads = result[0] if has_aux else result
            grads = _by_leaf(layout, grads, [spec for i in chosen for spec in of_arg[i]])
            return (grads, result[1]) if has_aux else grads

        return grad_fun

    return gathering


def _on_gathered(
    layout: Layout, fun: Callable[..., Any], of_arg: Mapping[int, Sequence[P]]
) -> Callable[..., Any]:
    """Return a function that gathers some of its arguments first."""
    if isinstance(fun, ExampleMean) and [*of_arg] == [0]:
        return ExampleMean(_on_gathered(layout, fun.loss, of_arg))

    @functools.wraps(fun)
    def on_gathered(*args: Any, **kwargs: Any) -> Any:
        whole = [
            _gathered(layout, arg, of_arg[i]) if i in of_arg else arg for i, arg in enumerate(args)
        ]
        return fun(*whole, **kwargs)

    return on_gathered


# Inner batches.


def _sharded_batch(layout: Layout, batch: Batch) -> Batch:
    """Return the batch of a step, a slice of those that `shard_examples` sharded."""

    def shard(leaf: Any) -> Any:
        return _constrained(layout, leaf, P(DATA)) if _divides(layout, jnp.shape(leaf)) else leaf

    return batch if layout.data == 1 else jax.tree.map(shard, batch)


def _divides(layout: Layout, shape: Shape) -> bool:
    return bool(shape) and shape[0] > 0 and shape[0] % layout.data == 0


def _check_batch(layout: Layout, batch: Batch, examples: Sequence[Shape]) -> None:
    """Raise ValueError if the largest array of examples does not divide among the devices."""
    if layout.data == 1:
        return
    read = [*map(jnp.shape, jax.tree.leaves(batch)), *examples]
    arrays = [shape for shape in read if shape]
    devices = f"{format_devices(layout.data)} of the mesh axis {DATA!r}"
    if not arrays:
        raise ValueError(
            f"The {devices} share the examples of an inner step, but these inner steps read none: "
            "their batches have no axis. Leave that axis at 1; or, if they read examples of the "
            "episode, shard them in `Algorithm.shard_examples`."
        )
    largest = max(arrays, key=math.prod)
    if not _divides(layout, largest):
        count, fewer = largest[0], largest[0] // layout.data * layout.data
        near = [n for n in (fewer, fewer + layout.data) if n]
        raise ValueError(
            f"The {devices} share the examples of an inner step, but {count} of them, in an array "
            f"of shape {list(largest)}, do not divide among {layout.data}. The nearest "
            f"{'sizes that do are' if len(near) > 1 else 'size is'} {' and '.join(map(str, near))}."
        )
