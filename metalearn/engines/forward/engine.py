"""Forward mode through the inner loop: tangents are carried with the inner state.

With S_t = d theta_t / d eta, one column (a tangent) per direction in eta, each inner step maps
the state and all tangents to the next,

    S_{t+1} = (d step / d theta) S_t + (d step / d eta) E

where the columns of E are the directions. The meta-gradient is
(d loss / d theta_T) S_T + d loss / d eta. The step is linearized once, however many tangents
there are. Memory is flat in T, and the time is about one inner step per tangent and step: the
engine of long horizons with a handful of hyperparameters (Franceschi et al. 2017,
arXiv:1703.01785; Micaelli & Storkey 2021, arXiv:2007.07869). The tangent of an entry of eta that
no step has read yet is zero, and where `Unroll.begins` says so it is not pushed
(`metalearn.engines.forward.tangents`).

The loop may be split over several calls: `start`, then `advance` any number of times, and
`finish` compute what `value_and_grad` does. The `Stream` between two calls is all that has to be
saved, so a checkpoint can be written in the middle of an inner loop (`Trainer(segment=)`).

For a large eta, `directions=k` pushes k random directions v with E[v v^T] = I and
returns the mean of (dF . v) v: unbiased, with a variance of about |eta| / k times the
squared gradient (Baydin et al. 2022, arXiv:2202.08587).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import CountOrZero, at_most, is_integer
from metalearn._utils.fields import check_fields
from metalearn._utils.trees import precision, split
from metalearn.engines.base import Aux, MetaGradient, check_eta, explained, outer_loss
from metalearn.engines.forward.tangents import first_reads, parts, push, round_up, tangent_norms
from metalearn.engines.grad_recorder import Inner, joined
from metalearn.engines.inner_loop import scan, step_body
from metalearn.unroll import Batch, Eta, InnerState, Metrics, Unroll, horizon

MOST_DIRECTIONS = 1_000_000


class Stream(NamedTuple):
    """An inner loop in forward mode, between two steps.

    Args:
      state: theta_t and whatever else the loop carries.
      tangents: of the float leaves of `state`, each [k, ...].
      directions: like eta, leaves [k, ...], sorted by the step that first reads each.
      engine: the engine's state for its next call.
    """

    state: InnerState
    tangents: list[jax.Array]
    directions: Eta
    engine: Any = ()


@dataclasses.dataclass(frozen=True)
class Forward(MetaGradient):
    """Forward mode: one tangent per meta-parameter (exact), or random directions (unbiased).

    Args:
      directions: random directions in eta; None: every entry of eta, exactly.
      chunk: tangents pushed at once; None: all of them.
      max_directions: the most meta-parameters that are differentiated exactly; more are refused.
      sharding: of the leading axis of the tangents over devices (not together with `chunk`), such
        as `NamedSharding(mesh, PartitionSpec("tangents"))`; None: left to the compiler.
      inexact_decay: multiplies every tangent before each step. Below 1, earlier steps count less
        and the derivative is biased (MARTHE, Donini et al. 2020, arXiv:1910.08525); 0 is greedy,
        1 is exact.
    """

    directions: int | None = None
    chunk: int | None = None
    max_directions: CountOrZero = 1024
    sharding: jax.sharding.Sharding | None = None
    inexact_decay: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in (("directions", self.directions), ("chunk", self.chunk)):
            if value is not None and not (is_integer(value) and value >= 1):
                raise ValueError(f"`Forward({name}={value})` must be at least 1, or None.")
        at_most("Forward", MOST_DIRECTIONS, directions=self.directions)
        if self.chunk is not None and self.sharding is not None:
            raise ValueError(
                "`Forward(chunk=..., sharding=...)`: tangents are pushed in chunks, or all at once "
                "and sharded over devices. Choose one."
            )
        if not 0 <= self.inexact_decay <= 1:
            raise ValueError(
                f"`Forward(inexact_decay={self.inexact_decay})` lies between 0, greedy, and 1, "
                "exact."
            )

    def init(self, key: jax.Array, unroll: Unroll, eta: Eta) -> Any:
        """Return the key of the random directions; () where the derivative is exact."""
        del unroll, eta
        return () if self.directions is None else key

    def value_and_grad(
        self, unroll: Unroll, eta: Eta, batches: Batch, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Eta]:
        """Return ((loss (), aux), meta-gradient like eta)."""
        steps = horizon(batches)
        stream, recorded = self.start(unroll, eta, state), []
        if not steps:
            _, inner = scan(step_body(unroll, eta, jax.value_and_grad), stream.state, batches)
            return self.finish(unroll, eta, stream, inner)
        for part in parts(self._begins(unroll, eta), steps):
            indices = jnp.arange(part.start, part.stop)  # so that batches are not copied
            stream, inner = self._scan(unroll, eta, stream, batches, indices, part.stop)
            recorded.append(inner)
        return self.finish(unroll, eta, stream, joined(recorded))

    def start(self, unroll: Unroll, eta: Eta, state: Any = ()) -> Stream:
        """Return the stream before the first step; `state` is the engine's own."""
        check_eta(eta)
        directions, state = self._directions(unroll, eta, state)

        def init(_: Any, eta: Eta) -> tuple[InnerState, None]:
            return unroll.init(eta), None

        theta, tangents, _ = self._push(init, (), eta, [], directions)
        return Stream(theta, tangents, directions, state)

    def advance(
        self, unroll: Unroll, eta: Eta, stream: Stream, batches: Batch, until: int | None = None
    ) -> tuple[Stream, Inner]:
        """Take the next inner steps: (stream, what was recorded of them).

        Args:
          unroll: that of `start`.
          eta: that of `start`.
          stream: from `start`, or from `advance` before.
          batches: of these steps, leaves [t, ...].
          until: the number of inner steps taken so far, with these. Directions that a later step
            first reads (`Unroll.begins`) are not pushed; None pushes all.
        """
        return self._scan(unroll, eta, stream, batches, jnp.arange(horizon(batches)), until)

    def _scan(
        self,
        unroll: Unroll,
        eta: Eta,
        stream: Stream,
        batches: Batch,
        indices: jax.Array,
        until: int | None,
    ) -> tuple[Stream, Inner]:
        """Scan over the batches at `indices`, with the tangents that may be non-zero by `until`."""
        begins = self._begins(unroll, eta)
        count = len(begins) if until is None else int((begins < until).sum())
        active = round_up(count, self.sharding)
        directions = jax.tree.map(lambda x: x[:active], stream.directions)

        def body(carry: tuple[InnerState, list[jax.Array]], index: jax.Array) -> Any:
            batch = jax.tree.map(lambda x: jnp.asarray(x)[index], batches)

            def step(state: InnerState, eta: Eta) -> tuple[InnerState, Inner]:
                return step_body(unroll, eta, jax.value_and_grad)(state, batch)

            state, tangents = carry
            if self.inexact_decay != 1:
                tangents = [self.inexact_decay * tangent for tangent in tangents]
            state, tangents, inner = self._push(step, state, eta, tangents, directions)
            norms = tangent_norms(tangents, stream.tangents)
            return (state, tangents), inner._replace(tangent_norm=norms)

        carry = stream.state, [tangent[:active] for tangent in stream.tangents]
        (state, tangents), inner = jax.lax.scan(body, carry, indices)
        zeros = [tangent[active:] for tangent in stream.tangents]  # not pushed yet
        tangents = [jnp.concatenate(pair) for pair in zip(tangents, zeros, strict=True)]
        return stream._replace(state=state, tangents=tangents), inner

    def ends(self, unroll: Unroll, eta: Eta, steps: int) -> list[int]:
        """Return the ends of the parts of T steps, ascending, at most six: values for `until`."""
        return [part.stop for part in parts(self._begins(unroll, eta), steps)]

    def finish(
        self, unroll: Unroll, eta: Eta, stream: Stream, inner: Inner
    ) -> tuple[tuple[jax.Array, Aux], Eta]:
        """Return ((loss (), aux), meta-gradient like eta) after the last step."""
        floats, others, join = split(stream.state)

        def outer(floats: list[jax.Array], eta: Eta) -> tuple[jax.Array, Metrics]:
            return outer_loss(unroll, eta, join(floats, others))

        (loss, metrics), cotangents = jax.value_and_grad(outer, (0, 1), has_aux=True)(floats, eta)
        slopes = _inner_products(cotangents, (stream.tangents, stream.directions))  # [k]
        grads = self._gradient(unroll, slopes, stream.directions, eta)
        return (loss, Aux(metrics, stream.state, inner, stream.engine)), grads

    def _begins(self, unroll: Unroll, eta: Eta) -> np.ndarray:
        """Return the step that first reads each direction [k]; random ones are read at step 0."""
        if self.directions is None:
            return first_reads(unroll.begins, eta)
        return np.zeros(self.directions, int)

    def _directions(self, unroll: Unroll, eta: Eta, key: Any) -> tuple[Eta, Any]:
        """Return (directions like eta with leaves [k, ...], the engine's next state)."""
        flat, unravel = jax.flatten_util.ravel_pytree(eta)
        if self.directions is None:
            if flat.size > self.max_directions:
                raise ValueError(
                    "`Forward()` pushes one tangent per meta-parameter, but `eta` has "
                    f"{flat.size:,} of them (max_directions={self.max_directions}). Use "
                    "`MixedFlow()` for a problem of this size, `Forward(directions=k)` for an "
                    "unbiased estimate, or raise `max_directions` if the memory is there."
                )
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

    def _push(
        self,
        function: Callable[[Any, Eta], tuple[InnerState, Any]],
        state: Any,
        eta: Eta,
        tangents: list[jax.Array],
        directions: Eta,
    ) -> tuple[InnerState, list[jax.Array], Any]:
        """Linearize `function` at (state, eta) and push every tangent through it.

        Args:
          function: state, eta -> (next state, aux).
          state: its first argument.
          eta: its second.
          tangents: of the float leaves of `state`, each [k, ...].
          directions: the tangents of eta, leaves [k, ...].

        Returns:
          (next state, the tangents of its float leaves, aux).
        """
        floats, others, join = split(state)
        joins = []

        def on_floats(floats: list[jax.Array], eta: Eta) -> Any:
            next_state, aux = function(join(floats, others), eta)
            next_floats, next_others, next_join = split(next_state)
            joins.append(next_join)
            return next_floats, (next_others, aux)

        with _going_forwards():
            next_floats, linear, (next_others, aux) = jax.linearize(
                on_floats, floats, eta, has_aux=True
            )
            next_tangents = push(linear, (tangents, directions), self.chunk, self.sharding)
        return joins[-1](next_floats, next_others), next_tangents, aux

    def _gradient(self, unroll: Unroll, slopes: jax.Array, directions: Eta, eta: Eta) -> Eta:
        """Return the gradient, like eta, of directional derivatives [k]."""
        count = self.directions
        if count is None:
            flat, unravel = jax.flatten_util.ravel_pytree(eta)
            order = np.argsort(self._begins(unroll, eta), kind="stable")
            return unravel(slopes[np.argsort(order)].astype(flat.dtype))
        return jax.tree.map(
            lambda v: (jnp.tensordot(slopes, v, 1) / count).astype(v.dtype), directions
        )


def _going_forwards() -> contextlib.AbstractContextManager[None]:
    """Raise TypeError with the way out where JAX finds a rule that has no tangents."""
    return explained(
        TypeError,
        "forward-mode autodiff (jvp) to a custom_vjp",
        "`Forward` pushes tangents through each inner step (a JVP), and `step` or `init` holds a "
        "`jax.custom_vjp`, which has none. Use `Reverse()` or `MixedFlow()`, which take it, or "
        "write it as a `jax.custom_jvp`.",
    )


def _inner_products(cotangents: Any, tangents: Any) -> jax.Array:
    """Return <cotangents, tangents[i]> for each i: [k]. Of complex leaves, the real part."""

    def product(c: jax.Array, t: jax.Array) -> jax.Array:
        highest = {"precision": "highest", "preferred_element_type": precision(t)}
        return jnp.tensordot(t, c, c.ndim, **highest).real

    parts = jax.tree.map(product, cotangents, tangents)
    return jnp.asarray(sum(jax.tree.leaves(parts)))
