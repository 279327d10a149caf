"""Forward mode through the loop: tangents travel with the state, nothing is stored.

With S_t = d theta_t / d eta, one column per direction in eta, each inner step pushes
the state and all columns on together,

    S_{t+1} = (d step / d theta) S_t + (d step / d eta) E

and the meta-gradient is (d loss / d theta_T) S_T + d loss / d eta. The primal runs
once however many columns there are (the step is linearized once), memory is flat in T,
and the cost is about one step per column: the engine of long horizons with a handful of
hyperparameters (Franceschi et al. 2017, arXiv:1703.01785; Micaelli & Storkey 2021,
arXiv:2007.07869). A column of an entry of eta that no step has read yet is zero, and where the
unroll says so (`Unroll.begins`) it is not pushed.

The loop need not run in one call. `start`, `advance` as often as one likes, and `finish` do
what `value_and_grad` does, and the `Stream` between them is all there is to keep: a run can be
checkpointed inside a trajectory (`Trainer(segment=)` does).

For a large eta, `directions=k` pushes k random directions v with E[v v^T] = I and
returns the mean of (dF . v) v: unbiased, with a variance of about |eta| / k times the
squared gradient (Baydin et al. 2022, arXiv:2202.08587).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import at_most, counts, is_integer
from metalearn._utils.fields import check_fields
from metalearn._utils.trees import split
from metalearn.engines.base import Aux, MetaGradient, check_eta, outer_loss
from metalearn.engines.forward.tangents import first_reads, parts, push, round_up, tangent_norms
from metalearn.engines.grad_recorder import Inner, joined
from metalearn.engines.inner_loop import step_body
from metalearn.unroll import Unroll, horizon

MOST_DIRECTIONS = 1_000_000


class Stream(NamedTuple):
    """A loop in forward mode that stands between two steps: all it takes to go on."""

    state: Any  # theta_t and whatever else the loop carries
    tangents: list[jax.Array]  # of its float leaves, each [k, ...]
    directions: Any  # like eta, leaves [k, ...]; in the order in which they come into play
    engine: Any = ()  # the engine's next state


@dataclasses.dataclass(frozen=True)
class Forward(MetaGradient):
    """One tangent per meta-parameter (exact), or `directions` random ones (unbiased)."""

    directions: int | None = None  # None: all of eta, exactly
    chunk: int | None = None  # tangents pushed at once; None: all
    max_directions: int = 1024  # an exact push of more than this is refused
    # Tangents spread over devices (not with `chunk`) along their leading axis, such as
    # `NamedSharding(mesh, PartitionSpec("tangents"))`; None: as the compiler pleases.
    sharding: jax.sharding.Sharding | None = None
    # What a tangent is multiplied with at each step: below 1 the past fades out of the
    # derivative, which is then biased (MARTHE, Donini et al. 2020, arXiv:1910.08525); 0 is greedy.
    inexact_decay: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in (("directions", self.directions), ("chunk", self.chunk)):
            if value is not None and not (is_integer(value) and value >= 1):
                raise ValueError(f"`Forward({name}={value})` must be at least 1, or None.")
        at_most("Forward", MOST_DIRECTIONS, directions=self.directions)
        counts("Forward", 0, max_directions=self.max_directions)
        if self.chunk is not None and self.sharding is not None:
            raise ValueError(
                "`Forward(chunk=..., sharding=...)`: tangents are pushed a few at a time, or "
                "spread over devices all at once. Choose one."
            )
        if not 0 <= self.inexact_decay <= 1:
            raise ValueError(
                f"`Forward(inexact_decay={self.inexact_decay})` lies between 0, greedy, and 1, "
                "exact."
            )

    def init(self, key: jax.Array, unroll: Unroll, eta: Any) -> Any:
        """Return the key of the random directions; nothing where the push is exact."""
        del unroll, eta
        return () if self.directions is None else key

    def value_and_grad(
        self, unroll: Unroll, eta: Any, batches: Any, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Any]:
        """Return ((loss (), aux), meta-gradient like eta)."""
        steps = horizon(batches)
        stream, seen = self.start(unroll, eta, state), []
        for part in parts(self._begins(unroll, eta), steps):
            numbers = jnp.arange(part.start, part.stop)  # no copy of the batches themselves
            stream, inner = self._through(unroll, eta, stream, batches, numbers, part.stop)
            seen.append(inner)
        return self.finish(unroll, eta, stream, joined(seen))

    def start(self, unroll: Unroll, eta: Any, state: Any = ()) -> Stream:
        """Return the stream before the first step; `state` is the engine's own."""
        check_eta(eta)
        directions, state = self._directions(unroll, eta, state)

        def init(_: Any, eta: Any) -> tuple[Any, Any]:
            return unroll.init(eta), None

        first, tangents, _ = self._linear(init, (), eta, [], directions)
        return Stream(first, tangents, directions, state)

    def advance(
        self, unroll: Unroll, eta: Any, stream: Stream, batches: Any, until: int | None = None
    ) -> tuple[Stream, Inner]:
        """Take the next steps: (stream, what the loop saw).

        Args:
          unroll: as for `start`, and so is eta.
          eta: the meta-parameters.
          stream: where the loop stands.
          batches: leaves [t, ...], of these steps.
          until: the number of the step after them. Directions that come into play later
            (`Unroll.begins`) are left alone; None pushes all.
        """
        return self._through(unroll, eta, stream, batches, jnp.arange(horizon(batches)), until)

    def _through(
        self,
        unroll: Unroll,
        eta: Any,
        stream: Stream,
        batches: Any,
        numbers: jax.Array,
        until: int | None,
    ) -> tuple[Stream, Inner]:
        """Take the steps of these numbers."""
        active = self._active(unroll, eta, until)
        directions = jax.tree.map(lambda x: x[:active], stream.directions)

        def move(carry: tuple[Any, list[jax.Array]], number: jax.Array) -> Any:
            batch = jax.tree.map(lambda x: jnp.asarray(x)[number], batches)

            def step(state: Any, eta: Any) -> tuple[Any, Inner]:
                return step_body(unroll, eta, jax.value_and_grad)(state, batch)

            state, tangents = carry
            if self.inexact_decay != 1:
                tangents = [self.inexact_decay * tangent for tangent in tangents]
            state, tangents, inner = self._linear(step, state, eta, tangents, directions)
            return (state, tangents), inner._replace(
                tangent_norm=tangent_norms(tangents, stream.tangents)
            )

        begun = stream.state, [tangent[:active] for tangent in stream.tangents]
        (state, tangents), inner = jax.lax.scan(move, begun, numbers)
        later = [tangent[active:] for tangent in stream.tangents]
        tangents = [jnp.concatenate(pair) for pair in zip(tangents, later, strict=True)]
        return stream._replace(state=state, tangents=tangents), inner

    def ends(self, unroll: Unroll, eta: Any, steps: int) -> list[int]:
        """Return where the parts of T steps end, in their order: at most six."""
        return [part.stop for part in parts(self._begins(unroll, eta), steps)]

    def finish(
        self, unroll: Unroll, eta: Any, stream: Stream, inner: Inner
    ) -> tuple[tuple[jax.Array, Aux], Any]:
        """Return ((loss (), aux), meta-gradient like eta) of a loop that has run."""
        diff, rest, join = split(stream.state)

        def outer(diff: list[jax.Array], eta: Any) -> tuple[jax.Array, Any]:
            return outer_loss(unroll, eta, join(diff, rest))

        (loss, metrics), cotangents = jax.value_and_grad(outer, (0, 1), has_aux=True)(diff, eta)
        slopes = _inner_products(cotangents, (stream.tangents, stream.directions))  # [k]
        grads = self._combine(unroll, slopes, stream.directions, eta)
        return (loss, Aux(metrics, stream.state, inner, stream.engine)), grads

    def _begins(self, unroll: Unroll, eta: Any) -> np.ndarray:
        """Return the step at which each direction comes into play; random ones all at once."""
        if self.directions is None:
            return first_reads(unroll.begins, eta)
        return np.zeros(self.directions, int)

    def _active(self, unroll: Unroll, eta: Any, until: int | None) -> int:
        begins = self._begins(unroll, eta)
        begun = len(begins) if until is None else int((begins < until).sum())
        return round_up(begun, self.sharding)

    def _directions(self, unroll: Unroll, eta: Any, key: Any) -> tuple[Any, Any]:
        """Return (pytree like eta with leaves [k, ...], the engine's next state)."""
        flat, unravel = jax.flatten_util.ravel_pytree(eta)
        if self.directions is None:
            self._refuse_if_large(flat.size)
            order = np.argsort(self._begins(unroll, eta), kind="stable")
            rows, key = jnp.eye(flat.size, dtype=flat.dtype)[order], ()
        elif isinstance(key, tuple):
            raise ValueError(
                f"`Forward(directions={self.directions})` draws random directions and needs a "
                "key: pass `state=engine.init(key, unroll, eta)`, as the Trainer does."
            )
        else:
            key, now = jax.random.split(key)
            rows = jax.random.rademacher(now, (self.directions, flat.size), flat.dtype)
        surplus = round_up(len(rows), self.sharding) - len(rows)
        return jax.vmap(unravel)(jnp.pad(rows, ((0, surplus), (0, 0)))), key

    def _refuse_if_large(self, count: int) -> None:
        if count > self.max_directions:
            raise ValueError(
                f"`Forward()` pushes one tangent per meta-parameter, but `eta` has {count:,} of "
                f"them (max_directions={self.max_directions}). Use `MixedFlow()` for a problem "
                "of this size, `Forward(directions=k)` for an unbiased estimate, or raise "
                "`max_directions` if the memory is there."
            )

    def _linear(
        self,
        function: Callable[[Any, Any], tuple[Any, Any]],
        state: Any,
        eta: Any,
        tangents: list[jax.Array],
        directions: Any,
    ) -> tuple[Any, list[jax.Array], Any]:
        """Apply `function` to (state, eta) once, and its derivative to every tangent."""
        diff, rest, join = split(state)
        joins = []

        def differentiable(diff: list[jax.Array], eta: Any) -> Any:
            new, seen = function(join(diff, rest), eta)
            new_diff, new_rest, new_join = split(new)
            joins.append(new_join)
            return new_diff, (new_rest, seen)

        new_diff, linear, (new_rest, seen) = jax.linearize(differentiable, diff, eta, has_aux=True)
        moved = push(linear, (tangents, directions), self.chunk, self.sharding)
        return joins[-1](new_diff, new_rest), moved, seen

    def _combine(self, unroll: Unroll, slopes: jax.Array, directions: Any, eta: Any) -> Any:
        """Turn directional derivatives [k] into a gradient like eta."""
        drawn = self.directions
        if drawn is None:
            flat, unravel = jax.flatten_util.ravel_pytree(eta)
            order = np.argsort(self._begins(unroll, eta), kind="stable")
            return unravel(slopes[np.argsort(order)].astype(flat.dtype))
        return jax.tree.map(
            lambda v: (jnp.tensordot(slopes, v, 1) / drawn).astype(v.dtype), directions
        )


def _inner_products(cotangents: Any, tangents: Any) -> jax.Array:
    """Return <cotangents, tangents[i]> for each i: [k]. Of complex leaves, the real part."""
    parts = jax.tree.map(lambda c, t: jnp.tensordot(t, c, c.ndim).real, cotangents, tangents)
    return jnp.asarray(sum(jax.tree.leaves(parts)))
