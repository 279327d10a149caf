"""Where the arrays of a run lie: the layout of an outer step over a mesh of devices.

With n devices along the axis "tasks", every device draws and unrolls its own tasks_per_step / n
tasks and averages them, and one all-reduce averages the averages:

    g = 1/n sum_i g_i          |eta| numbers and the metrics, once in an outer step

The task-sharded memory (inner states, activations, what is kept for the way back) falls to 1/n;
eta, the outer optimizer's state and the data are on every device. The outer update is computed
on each of them, from the same numbers.

An eta that is too large for a device is cut along the axis "model" (FSDP, Zhao et al. 2023,
arXiv:2304.11277; ZeRO, Rajbhandari et al. 2019, arXiv:1910.02054). Rules (`metalearn.sharding.partition`)
say how:

    Layout(make_mesh(model=2), rules=(("embedding", P("model")), ("kernel$", P(None, "model"))))

They hold for eta, where they have to fit; and, where they fit, for the state of the outer
optimizer, whose paths end in those of eta, and for inner states, by path or by being of the shape
of a leaf of eta. What no rule matches is whole on every device. The compiler does the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metalearn._utils.fields import check_fields
from metalearn._utils.trees import paths
from metalearn.sharding import partition
from metalearn.sharding.batched_means import all_reduce_mean, at_once, check_shares, mean_and_each
from metalearn.sharding.mesh import TASKS, auto_axes, on_current_mesh
from metalearn.unroll import Batch, Eta, GradFn, InnerState, Unroll


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with an axis "tasks", and rules for what is cut along its other axes.

    Args:
      mesh: of `metalearn.make_mesh`, or any whose axes are left to the compiler.
      rules: (regular expression, how a leaf with such a path is cut); the first match counts.
    """

    mesh: Mesh
    rules: partition.Rules = ()

    def __post_init__(self) -> None:
        check_fields(self, "rules")
        given: Any = self.rules
        for rule in given if isinstance(given, tuple | list) else [given]:
            kinds = isinstance(rule, tuple) and [*map(type, rule)]
            if kinds != [str, P]:
                raise TypeError(
                    f"`Layout(rules={given!r})`: they are pairs of a regular expression and a "
                    'PartitionSpec, such as `(("kernel$", P(None, "model")),)`.'
                )
        if TASKS not in self.mesh.axis_names:
            raise ValueError(
                f"A layout needs a mesh with an axis {TASKS!r}, but this one has "
                f"{self.mesh.axis_names}. `metalearn.make_mesh()` makes one."
            )
        partition.check_rules(self.rules, self.mesh.shape)

    @property
    def devices(self) -> int:
        """Return how many devices, or groups of them, take tasks of their own."""
        return self.mesh.shape[TASKS]

    def check(self, tasks_per_step: int, chunk: int | None) -> None:
        """Raise ValueError where the tasks of a step do not divide among the devices."""
        check_shares(tasks_per_step, self.devices, chunk)

    def shardings(self, state: Any) -> Any:
        """Return where each leaf of a train state lies: a pytree like it, of shardings."""
        rules, sizes = self.rules, self.mesh.shape
        alike = partition.specs_by_shape(rules, sizes, state.eta)

        def spec(path: str, shape: tuple[int, ...]) -> P:
            part, _, rest = path.partition("/")
            if part == "eta":
                return partition.eta_spec(rules, sizes, rest, shape)
            if part == "optimizer":
                return partition.state_spec(rules, sizes, rest, shape, alike)
            if part == "inner":
                return P(TASKS, *partition.state_spec(rules, sizes, rest, shape[1:], alike))
            return P()

        leaves, treedef = jax.tree.flatten(state)
        specs = [spec(path, leaf.shape) for path, leaf in zip(paths(state), leaves, strict=True)]
        return jax.tree.unflatten(treedef, [NamedSharding(self.mesh, s) for s in specs])

    @property
    def replicated(self) -> NamedSharding:
        """Return the sharding of what every device has a whole copy of."""
        return NamedSharding(self.mesh, P())

    def replicate(self, tree: Any) -> Any:
        """Return a pytree of arrays with a copy on every device, of every process.

        In each process it has to hold the same numbers. What lies there already stays.
        """
        return jax.tree.map(functools.partial(_put, where=self.replicated), tree)

    def mean_and_each(
        self, function: Callable[..., tuple[Any, Any]], shared: Any, inputs: Any, chunk: int | None
    ) -> tuple[Any, Any]:
        """Do what `metalearn.sharding.batched_means.mean_and_each` does, every device with its own inputs.

        Args:
          function: (*shared, input) -> what is averaged, what is returned of each.
          shared: what every device has all of; inside, nothing of outside may be closed over.
          inputs: leaves [n, ...].
          chunk: as many at once on a device.
        """
        own = jax.tree.leaves(inputs)[0].shape[0] // self.devices
        chunk = at_once(own, chunk)

        def on_device(shared: Any, inputs: Any) -> tuple[Any, Any]:
            mean, each = mean_and_each(functools.partial(function, *shared), inputs, chunk)
            return all_reduce_mean(mean, TASKS, whole=not self.cuts), each

        return self._by_hand(on_device, (P(), P(TASKS)))(shared, inputs)

    def each(self, function: Callable[[Any, Any], Any], shared: Any, inputs: Any) -> Any:
        """Return `function` of inputs [n, ...], every device with its own; all of it on each."""
        found = self._by_hand(function, P(TASKS))(shared, inputs)
        return jax.lax.with_sharding_constraint(found, self.replicated)

    def _by_hand(self, function: Callable[..., Any], out: Any) -> Callable[..., Any]:
        """Map over the axis of tasks; what is cut along other axes is left to the compiler.

        What varies over devices is not tracked (`check_vma`): eta would count as the same on all
        of them, and each single use of it would be all-reduced on the way back.
        """
        manual = set(self.mesh.axis_names) - set(auto_axes(self.mesh.shape))
        options: Any = {"in_specs": (P(), P(TASKS)), "out_specs": out, "axis_names": manual}
        return jax.shard_map(function, mesh=self.mesh, check_vma=False, **options)

    @property
    def cuts(self) -> bool:
        """Say whether a rule cuts anything at all."""
        there = auto_axes(self.mesh.shape)
        return any(axis in there for _, spec in self.rules for axis in partition.axes(spec))

    def constrain(self, unroll: Unroll) -> Unroll:
        """Return an unroll whose inner states are cut as the rules say."""

        def init(eta: Eta) -> InnerState:
            return self.cut(unroll.init(eta), eta)

        def step(eta: Eta, state: InnerState, batch: Batch, grad: GradFn) -> InnerState:
            return self.cut(unroll.step(eta, state, batch, grad), eta)

        return unroll._replace(init=init, step=step)

    def cut(self, state: Any, eta: Any) -> Any:
        """Return an inner state, cut as the rules say, in a program that maps over tasks."""
        alike = partition.specs_by_shape(self.rules, self.mesh.shape, eta)

        def leaf_cut(path: str, leaf: Any) -> Any:
            shape = jnp.shape(leaf)
            spec = partition.state_spec(self.rules, self.mesh.shape, path, shape, alike)
            if not partition.axes(spec):
                return leaf
            return jax.lax.with_sharding_constraint(
                leaf, on_current_mesh(NamedSharding(self.mesh, spec))
            )

        leaves, treedef = jax.tree.flatten(state)
        return jax.tree.unflatten(treedef, map(leaf_cut, paths(state), leaves))


def abstract(state: Any, shardings: Any) -> Any:
    """Return the shapes of a train state, and where its leaves lie."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        shardings,
    )


def _put(leaf: Any, where: NamedSharding) -> Any:
    """Place an array. Not by `device_put`, which sends it to all processes to compare."""
    if isinstance(leaf, jax.Array) and leaf.sharding == where:
        return leaf
    return jax.jit(_same, out_shardings=where)(leaf)


def _same(leaf: Any) -> Any:
    return leaf
