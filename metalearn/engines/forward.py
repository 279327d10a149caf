"""Forward mode through the loop: tangents travel with the state, nothing is stored.

With S_t = d theta_t / d eta, one column per direction in eta, each inner step pushes
the state and all columns on together,

    S_{t+1} = (d step / d theta) S_t + (d step / d eta) E

and the meta-gradient is (d loss / d theta_T) S_T + d loss / d eta. The primal runs
once however many columns there are (the step is linearized once), memory is flat in T,
and the cost is about one step per column: the engine of long horizons with a handful of
hyperparameters (Franceschi et al. 2017, arXiv:1703.01785; Micaelli & Storkey 2021,
arXiv:2007.07869).

For a large eta, `directions=k` pushes k random directions v with E[v v^T] = I and
returns the mean of (dF . v) v: unbiased, with a variance of about |eta| / k times the
squared gradient (Baydin et al. 2022, arXiv:2202.08587).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from metalearn.engines.check import check_eta, horizon, outer_loss
from metalearn.engines.engine import Aux, MetaGradient
from metalearn.engines.loop import step_body
from metalearn.engines.recorder import Inner
from metalearn.leaves import split
from metalearn.unroll import Unroll


@dataclasses.dataclass(frozen=True)
class Forward(MetaGradient):
    """One tangent per meta-parameter (exact), or `directions` random ones (unbiased)."""

    directions: int | None = None  # None: all of eta, exactly
    chunk: int | None = None  # tangents pushed at once; None: all
    max_directions: int = 1024  # an exact push of more than this is refused

    def __post_init__(self) -> None:
        for name, value in (("directions", self.directions), ("chunk", self.chunk)):
            if value is not None and value < 1:
                raise ValueError(f"`Forward({name}={value})` must be at least 1, or None.")

    def init(self, key: jax.Array, eta: Any) -> Any:
        """Return the key of the random directions; nothing where the push is exact."""
        return () if self.directions is None else key

    def value_and_grad(
        self, unroll: Unroll, eta: Any, batches: Any, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Any]:
        """Return ((loss (), aux), meta-gradient like eta)."""
        check_eta(eta)
        horizon(batches)
        directions, state = self._directions(eta, state)
        final, tangents, inner = self._push(unroll, eta, batches, directions)
        diff, rest, join = split(final)

        def outer(diff: list[jax.Array], eta: Any) -> tuple[jax.Array, Any]:
            return outer_loss(unroll, eta, join(diff, rest))

        (loss, metrics), cotangents = jax.value_and_grad(outer, (0, 1), has_aux=True)(diff, eta)
        slopes = _inner_products(cotangents, (tangents, directions))  # [k]
        return (loss, Aux(metrics, final, inner, state)), self._combine(slopes, directions, eta)

    def _directions(self, eta: Any, key: Any) -> tuple[Any, Any]:
        """Return (pytree like eta with leaves [k, ...], the engine's next state)."""
        flat, unravel = jax.flatten_util.ravel_pytree(eta)
        if self.directions is None:
            self._refuse_if_large(flat.size)
            return jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype)), ()
        if isinstance(key, tuple):
            raise ValueError(
                f"`Forward(directions={self.directions})` draws random directions and needs a "
                "key: pass `state=engine.init(key, eta)`, as the Trainer does."
            )
        key, now = jax.random.split(key)
        signs = jax.random.rademacher(now, (self.directions, flat.size), flat.dtype)
        return jax.vmap(unravel)(signs), key

    def _refuse_if_large(self, count: int) -> None:
        if count > self.max_directions:
            raise ValueError(
                f"`Forward()` pushes one tangent per meta-parameter, but `eta` has {count:,} of "
                f"them (max_directions={self.max_directions}). Use `MixedFlow()` for a problem "
                "of this size, `Forward(directions=k)` for an unbiased estimate, or raise "
                "`max_directions` if the memory is there."
            )

    def _push(
        self, unroll: Unroll, eta: Any, batches: Any, directions: Any
    ) -> tuple[Any, list[jax.Array], Inner]:
        """Run the loop: (final state, its tangents with leaves [k, ...], what it saw)."""

        def start(_: Any, eta: Any) -> tuple[Any, Any]:
            return unroll.init(eta), None

        def move(carry: tuple[Any, list[jax.Array]], batch: Any) -> Any:
            def step(state: Any, eta: Any) -> tuple[Any, Inner]:
                return step_body(unroll, eta, jax.value_and_grad)(state, batch)

            state, tangents = carry
            state, tangents, inner = self._linear(step, state, eta, tangents, directions)
            return (state, tangents), inner

        state, tangents, _ = self._linear(start, (), eta, [], directions)
        (state, tangents), inner = jax.lax.scan(move, (state, tangents), batches)
        return state, tangents, inner

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
        pushed = self._map(lambda pair: linear(*pair), (tangents, directions))
        return joins[-1](new_diff, new_rest), pushed, seen

    def _map(self, function: Callable[[Any], Any], tangents: Any) -> Any:
        if self.chunk is None:
            return jax.vmap(function)(tangents)
        count = jax.tree.leaves(tangents)[0].shape[0]
        return jax.lax.map(function, tangents, batch_size=min(self.chunk, count))

    def _combine(self, slopes: jax.Array, directions: Any, eta: Any) -> Any:
        """Turn directional derivatives [k] into a gradient like eta."""
        if self.directions is None:
            flat, unravel = jax.flatten_util.ravel_pytree(eta)
            return unravel(slopes.astype(flat.dtype))
        return jax.tree.map(
            lambda v: (jnp.tensordot(slopes, v, 1) / len(slopes)).astype(v.dtype), directions
        )


def _inner_products(cotangents: Any, tangents: Any) -> jax.Array:
    """Return <cotangents, tangents[i]> for each i: [k]."""
    parts = jax.tree.map(lambda c, t: jnp.tensordot(t, c, c.ndim), cotangents, tangents)
    return jnp.asarray(sum(jax.tree.leaves(parts)))
