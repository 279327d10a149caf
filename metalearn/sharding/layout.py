"""The layout of an outer step over a mesh of devices: how its arrays and its tasks are sharded.

With n devices along the axis "tasks", every device draws and unrolls its own tasks_per_step / n
tasks and averages their meta-gradients, and one all-reduce averages these:

    g = 1/n sum_i g_i          |eta| numbers and the metrics, once per outer step

The memory of the tasks (inner states, activations, residuals for the backward pass) falls to 1/n.
Eta, the state of the outer optimizer and the data are replicated. Every device computes the same
outer update.

An eta that is too large for one device is sharded along the axis "model" (FSDP, Zhao et al. 2023,
arXiv:2304.11277; ZeRO, Rajbhandari et al. 2019, arXiv:1910.02054) by rules
(`metalearn.sharding.partition`):

    Layout(make_mesh(model=2), rules=(("embedding", P("model")), ("kernel$", P(None, "model"))))

The rules must divide the leaves of eta that they match. Where they divide, they also hold for the
state of the outer optimizer, whose paths end in those of eta, and for inner states, by path or
because a leaf has the shape of a leaf of eta. An array that no rule matches is replicated. The
compiler partitions the computation.

Along the axis "data" several devices share the inner run of each task, for fewer tasks than
devices (`metalearn.sharding.inner_run`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metalearn._utils.fields import check_fields
from metalearn._utils.trees import paths
from metalearn.sharding import partition
from metalearn.sharding.batched_means import all_reduce_mean, at_once, check_shares, mean_and_each
from metalearn.sharding.mesh import DATA, TASKS, auto_axes, check_axis_types

# What is before the path of an inner state in `TrainState.inner`, of segments or truncated.
CARRIED = re.compile("^(stream/state/|stream/|cotangents/state/|state/)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with an axis "tasks", and rules for arrays that are sharded along its other axes.

    Args:
      mesh: from `metalearn.make_mesh`, or any with an axis "tasks" and axes of type `Auto`.
      rules: (regular expression of paths, `PartitionSpec`) each; the first match counts.
    """

    mesh: Mesh | AbstractMesh
    rules: partition.Rules = ()

    def __post_init__(self) -> None:
        check_fields(self, "rules")
        rules: Any = self.rules
        for rule in rules if isinstance(rules, tuple | list) else [rules]:
            kinds = isinstance(rule, tuple) and [*map(type, rule)]
            if kinds != [str, P]:
                raise TypeError(
                    f"`Layout(rules={rules!r})`: they are pairs of a regular expression and a "
                    'PartitionSpec, such as `(("kernel$", P(None, "model")),)`.'
                )
        if TASKS not in self.mesh.axis_names:
            raise ValueError(
                f"A layout needs a mesh with an axis {TASKS!r}, but this one has "
                f"{self.mesh.axis_names}. `metalearn.make_mesh()` makes one."
            )
        check_axis_types(self.mesh)
        partition.check_rules(self.rules, self.mesh.shape)

    @property
    def devices(self) -> int:
        """Return the number of devices, or groups of devices, that unroll tasks of their own."""
        return self.mesh.shape[TASKS]

    @property
    def data(self) -> int:
        """Return the number of devices that share the inner run of a task."""
        return self.mesh.shape.get(DATA, 1)

    @property
    def inner(self) -> int:
        """Return the number of devices over which an inner run is sharded."""
        return math.prod(self.mesh.shape[axis] for axis in auto_axes(self.mesh.shape))

    def check(self, tasks_per_step: int, chunk: int | None) -> None:
        """Raise ValueError if the tasks of an outer step do not divide among the devices."""
        check_shares(tasks_per_step, self.devices, chunk)

    def shardings(self, state: Any) -> Any:
        """Return the sharding of each leaf of a train state: a pytree like it."""
        rules, sizes = self.rules, self.mesh.shape
        eta_specs = partition.specs_by_shape(rules, sizes, state.eta)

        def spec(path: str, shape: tuple[int, ...]) -> P:
            part, _, rest = path.partition("/")
            if part == "eta":
                return partition.eta_spec(rules, sizes, rest, shape)
            if part == "optimizer":
                return partition.state_spec(rules, sizes, rest, shape, eta_specs)
            if part == "inner":
                path = CARRIED.sub("", rest)
                return P(TASKS, *partition.state_spec(rules, sizes, path, shape[1:], eta_specs))
            return P()

        leaves, treedef = jax.tree.flatten(state)
        specs = [spec(path, leaf.shape) for path, leaf in zip(paths(state), leaves, strict=True)]
        return jax.tree.unflatten(treedef, [NamedSharding(self.mesh, s) for s in specs])

    @property
    def replicated(self) -> NamedSharding:
        """Return the sharding of an array with a copy on every device."""
        return NamedSharding(self.mesh, P())

    def replicate(self, tree: Any) -> Any:
        """Return a pytree of arrays with a copy on every device of every process.

        The values must be the same in every process. Arrays that are replicated already are not
        copied.
        """

        def put(leaf: Any) -> Any:
            if isinstance(leaf, jax.Array) and leaf.sharding == self.replicated:
                return leaf
            # Not by `device_put`, which sends it to all processes to compare.
            return jax.jit(_identity, out_shardings=self.replicated)(leaf)

        return jax.tree.map(put, tree)

    def mean_and_each(
        self, function: Callable[..., tuple[Any, Any]], shared: Any, inputs: Any, chunk: int | None
    ) -> tuple[Any, Any]:
        """Do `metalearn.sharding.batched_means.mean_and_each` with the inputs sharded over "tasks".

        Args:
          function: (*shared, input) -> (output to average, output to return for each input). It
            must not close over traced values.
          shared: a tuple of pytrees that are replicated over "tasks".
          inputs: leaves [n, ...].
          chunk: inputs that are vmapped at once on a device; None: as it chooses.
        """
        share = jax.tree.leaves(inputs)[0].shape[0] // self.devices
        chunk = None if chunk is None else at_once(share, chunk)

        def on_device(shared: Any, inputs: Any) -> tuple[Any, Any]:
            mean, each = mean_and_each(functools.partial(function, *shared), inputs, chunk)
            if self.devices == 1:
                return mean, each
            return all_reduce_mean(mean, TASKS, whole=not self.cuts), each

        return self._shard_map(on_device, (P(), P(TASKS)))(shared, inputs)

    def each(self, function: Callable[[Any, Any], Any], shared: Any, inputs: Any) -> Any:
        """Return function(shared, inputs [n, ...]), computed by shards and then replicated."""
        outputs = self._shard_map(function, P(TASKS))(shared, inputs)
        return jax.lax.with_sharding_constraint(outputs, self.replicated)

    def _shard_map(self, function: Callable[..., Any], out: Any) -> Callable[..., Any]:
        """Map over the axis "tasks"; the compiler partitions along the other axes.

        Without `check_vma`: with it eta would count as equal on all devices, and the backward pass
        would all-reduce the cotangent of every single use of it.
        """
        manual = set(self.mesh.axis_names) - set(auto_axes(self.mesh.shape))
        options: Any = {"in_specs": (P(), P(TASKS)), "out_specs": out, "axis_names": manual}
        return jax.shard_map(function, mesh=self.mesh, check_vma=False, **options)

    @property
    def cuts(self) -> bool:
        """Say whether any rule shards along an axis larger than 1."""
        auto = auto_axes(self.mesh.shape)
        return any(axis in auto for _, spec in self.rules for axis in partition.axes(spec))


def abstract(state: Any, shardings: Any) -> Any:
    """Return the shapes of a train state, with the shardings of its leaves."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )


def _identity(leaf: Any) -> Any:  # one function, so that `jax.jit` compiles it once per shape
    return leaf
