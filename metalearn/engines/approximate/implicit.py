"""Implicit differentiation: the hypergradient at a fixed point of the inner step, whatever T is.

Where the inner loop has converged, theta_T no longer depends on the path that led there, only on
the equation that it solves: theta* = step(eta, theta*, batch). Differentiate both sides, with
J = d step / d theta:

    (I - J)^T w  =  dF / d theta                                  one linear system
    dF/deta      =  dF/deta (direct)  +  (d step / d eta)^T w     one more product

Only vector-Jacobian products of `step` itself are taken, so any inner optimizer will do, and for
gradient descent this is the textbook -(d2L/d eta d theta) H^-1 dF/d theta, with Hessian products as
`MixedFlow` takes them. Memory is flat in T: no step of the loop is saved. The system is solved by
one of `SOLVERS` (`metalearn.engines.approximate.solvers`).

**It may be the derivative of another function.** At theta_T the equation holds up to the residual
step(theta_T) - theta_T, and the hypergradient is wrong by about the distance that is left to
theta*. A loop of a few steps, or one that diverges, has a hypergradient like any other, of nothing.
So the residual r = step(theta_T) - theta_T is measured in every call, as metrics,

| metric                 | what it says                                                            |
|------------------------|-------------------------------------------------------------------------|
| `fixed_point_residual` | r, relative to theta_T or to theta_T - theta_0, in the norm             |
| `fixed_point_gap`      | w . r, absolute: to first order, the change of the outer loss up to the |
|                        | fixed point, which does not fall with the learning rate as r does       |
| `solver_residual`      | of the linear system, relative to its right-hand side                   |
| `held_residual`        | what the step adds to that system by other means than its gradient,     |
|                        | relative to the right-hand side; of `variables` alone (below)           |

and there is a warning where they are too large.

**Which batch.** The step is evaluated with the last batch of the loop. Where batches differ from
step to step there is no common fixed point, and the residual shows it.

**Which variables.** By default all floating-point leaves of the inner state: with momentum, the
pair of theta and its velocity has a fixed point. A state that counts its steps (Adam's bias
correction, a learning-rate schedule) has none, and is refused. `variables="params"` solves for the
leaves whose path matches and holds all others at their last values. That is exact where the fixed
point is a zero of the inner gradient, whatever the optimizer: there the update is B(state) times
the gradient, and B cancels. It is not where the optimizer moves theta by other means than its
gradient, such as the decoupled weight decay of AdamW, or from a copy of theta that is held, such as
master weights; `held_residual` shows it. Leaves that no step changes are always held.

References: Bengio 2000; Pedregosa 2016 (arXiv:1602.02355); Lorraine et al. 2020 (arXiv:1911.02590);
Grazzi et al. 2020 (arXiv:2006.16218, fixed points of any step); Blondel et al. 2022
(arXiv:2105.15183); warm-started solves: Arbel and Mairal 2022 (arXiv:2111.14580).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.checks import Count, above, at_most, pattern, pick
from metalearn._utils.fields import check_fields
from metalearn._utils.trees import is_differentiable, matching, paths, split
from metalearn.engines import segments
from metalearn.engines.approximate.reach import (
    check_reach,
    clocks,
    last_batch,
    leaves_read,
    unchanged,
)
from metalearn.engines.approximate.solvers import SOLVERS, Settings, Vector, norm
from metalearn.engines.base import (
    ApproximationWarning,
    Aux,
    MetaGradient,
    check_eta,
    going_backwards,
    outer_loss,
)
from metalearn.engines.custom_rules import Plan
from metalearn.engines.grad_recorder import Recorder
from metalearn.engines.mixed_flow import forward_over_reverse as commuted
from metalearn.unroll import Batch, Eta, InnerState, Metrics, Unroll

RESIDUAL, GAP, SOLVED = "fixed_point_residual", "fixed_point_gap", "solver_residual"
HELD = "held_residual"
MOST = 1_000_000  # iterations
SLACK = 10.0  # a solver stops by a residual that it updates, which drifts from the true one
MOST_LEFT = 0.5  # relative residual of a series of so many terms and no tolerance


@dataclasses.dataclass(frozen=True)
class Implicit(MetaGradient):
    """Implicit differentiation at a fixed point of the inner step: right where the loop converges.

    Its metrics are `fixed_point_residual`, `fixed_point_gap`, `solver_residual`, and with
    `variables` `held_residual`. `Trainer.fit`, and a call outside of `jax.jit`, warn where they are
    too large; in a jitted function of your own read them in `aux.metrics`.

    Args:
      solver: of the linear system: "gmres" or "bicgstab" (any step), "cg" or "nystrom" (a gradient
        step with one learning rate), "neumann" (a step that contracts).
      iterations: of the solver, at most; terms of "neumann".
      tolerance: of the solver: the residual, relative to the right-hand side, at which it stops. 0
        with "neumann": exactly `iterations` terms, with a warning where they leave more than half.
      damping: added to the eigenvalues of I - J, for a singular or an indefinite one. Above 0 the
        hypergradient is biased.
      relaxation: of "neumann": the length of its steps; below 1 where eigenvalues of J are below
        -1.
      rank: of "nystrom": columns of its preconditioner, each a product and a vector of memory.
      variables: the paths of the leaves of the inner state that the fixed point is solved for, a
        regular expression such as "params"; the others are held. "": all floating-point ones.
      stationary: the largest `fixed_point_residual`, `held_residual`, and `fixed_point_gap` of the
        size of the outer loss, without a warning.
      warm_start: begin each solve from the result of the last call, as the engine's state: for
        inner states that are carried on (`Trainer(truncation=)`) from one outer step to the next.
    """

    solver: str = "gmres"
    iterations: Count = 100
    tolerance: float = 1e-5
    damping: float = 0.0
    relaxation: float = 1.0
    rank: Count = 10
    variables: str = ""
    stationary: float = 1e-3
    warm_start: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        pick(SOLVERS, self.solver, "solver")
        at_most("Implicit", MOST, iterations=self.iterations, rank=self.rank)
        above("Implicit", 0, relaxation=self.relaxation, stationary=self.stationary)
        for name, value in (("tolerance", self.tolerance), ("damping", self.damping)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"`Implicit({name}={value})`: it is a number, 0 or more.")
        pattern("Implicit", variables=self.variables)

    @property
    def commutes(self) -> bool:
        """Whether the engine assumes symmetric Jacobians of inner gradients: true."""
        return True

    def plan(self, call: commuted.Call) -> Plan:
        """Return which inputs of an inner gradient have Jacobians assumed symmetric, and why."""
        return commuted.planned(call, ())

    def init(self, key: jax.Array, unroll: Unroll, eta: Eta) -> Any:
        """Return the start of the first solve, zero; () without `warm_start`."""
        del key
        if not self.warm_start:
            return ()
        state = jax.eval_shape(unroll.init, eta)
        z = jax.eval_shape(lambda state: _parts(split(state, self._solved(state))[0]), state)
        return [jnp.zeros(part.shape, _precise(z)) for part in z]

    def value_and_grad(
        self, unroll: Unroll, eta: Eta, batches: Batch, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Eta]:
        """Return ((loss (), aux), the hypergradient like eta)."""
        check_eta(eta)
        if self.warm_start and not jax.tree.leaves(state):
            raise ValueError(
                "`Implicit(warm_start=True)` begins from the last solve: pass "
                "`state=engine.init(key, unroll, eta)`, and then `aux.engine`, as the Trainer does."
            )
        batch = last_batch(self, batches)
        theta_0 = unroll.init(eta)
        theta_T, inner, _ = segments.advance(unroll, eta, theta_0, batches)
        seen = "the fixed point of the inner step"
        check_reach(self, unroll, eta, theta_T, batch, seen)
        mask = self._solved(theta_T)
        self._check_state(unroll, eta, theta_T, batch, mask)

        leaves, held, join = split(theta_T, mask)
        whole = functools.partial(_whole, leaves)
        same = unchanged(lambda s: unroll.step(eta, s, batch, jax.grad), theta_T)

        def outer(eta: Eta, z: Vector) -> tuple[jax.Array, Any]:
            return outer_loss(unroll, eta, join(whole(z), held))

        def step(
            eta: Eta, z: Vector, inner: Any = commuted.value_and_grad, held_too: Any = same
        ) -> Vector:
            state = _without_derivative(join(whole(z), held), held_too)
            return _parts(split(unroll.step(eta, state, batch, Recorder(inner).grad), mask)[0])

        z = _parts(leaves)
        (loss, metrics), (eta_bar, right) = jax.value_and_grad(outer, (0, 1), True)(eta, z)
        with going_backwards():
            after, pull = jax.vjp(step, eta, z)
        w, rest, through = self._solve(pull, right, state)
        moved = [(x - y).astype(_precise(z)) for x, y in zip(after, z, strict=True)]
        path = [x - y for x, y in zip(z, _parts(split(theta_0, mask)[0]), strict=True)]
        size = jnp.maximum(norm(z), norm(path))
        ours: Metrics = {
            RESIDUAL: norm(moved) / jnp.where(size > 0, size, 1),
            GAP: jnp.abs(sum(jnp.vdot(a, b) for a, b in zip(w, moved, strict=True))),
            SOLVED: rest,
        }
        if self.variables:
            _, pull = jax.vjp(lambda z: step(eta, z, _constant, False), z)
            ours[HELD] = _relative([x - y for x, y in zip(w, *pull(w), strict=True)], right)
        self._warn({"loss": loss, **ours})
        aux = Aux({**metrics, **ours}, theta_T, inner, w if self.warm_start else ())
        return (loss, aux), jax.tree.map(jnp.add, eta_bar, through)

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Say where theta_T is no fixed point, and where the solver has not converged."""
        moved, gap, rest = (float(metrics[name]) for name in (RESIDUAL, GAP, SOLVED))
        loss = abs(float(metrics["loss"]))
        if moved != moved or moved == float("inf"):
            return {
                RESIDUAL: "The inner state is not finite after the last inner step: the inner loop "
                "diverges, so it has no fixed point, and `Implicit` has no hypergradient. Lower "
                "the inner learning rate, or clip the inner gradients."
            }
        texts = {}
        if moved > self.stationary or gap > self.stationary * loss:
            texts[RESIDUAL] = (
                "theta_T is no fixed point of the inner step: one more step with the last batch "
                f"changes it by {moved:.2g} of its size (stationary={self.stationary:g}), and the "
                f"outer loss, {loss:.3g} now, would change by about {gap:.2g} up to the fixed "
                "point. The hypergradient of `Implicit` is then that of another function. Take "
                "more inner steps (and one batch, or large ones), or an engine that needs no "
                "fixed point: `MixedFlow()`, or `Truncated(last=k)`."
            )
        if rest != rest:
            texts[SOLVED] = (
                "The linear system of `Implicit` has no finite solution: the derivative of the "
                "outer loss or of the inner step is not finite at theta_T, or the solver "
                f"{self.solver!r} diverged. The hypergradient is not finite."
            )
        elif rest > self._allowed:
            texts[SOLVED] = (
                f"The solver {self.solver!r} has not converged: it left a relative residual of "
                f"{rest:.2g} (tolerance={self.tolerance:g}) after at most {self.iterations} "
                f"iterations. {HELP[self.solver]}"
            )
        if metrics.get(HELD, 0) > self.stationary:
            texts[HELD] = (
                f"The inner step moves what `variables={self.variables!r}` matches by other means "
                "than its gradient, such as weight decay, or from a copy that is held: these are "
                f"{float(metrics[HELD]):.2g} of the linear system (stationary={self.stationary:g})"
                ", which holding the rest of the state gets wrong. Let the pattern match all of it "
                "(without counts of steps), or use `Truncated(last=k)`."
            )
        return texts

    @property
    def _allowed(self) -> float:
        """The largest relative residual of the solver without a doubt."""
        if self.tolerance == 0 and self.solver == "neumann":
            return MOST_LEFT
        return SLACK * (self.tolerance or Implicit.tolerance)

    def _solve(
        self, pull: Callable[..., Any], right: Vector, state: Any
    ) -> tuple[Vector, jax.Array, Eta]:
        """Return (w, the relative residual of its system (), (d step / d eta)^T w)."""
        dtype = _precise(right)

        def transposed(w: Vector) -> tuple[Eta, Vector]:
            eta_bar, z_bar = pull([x.astype(b.dtype) for x, b in zip(w, right, strict=True)])
            return eta_bar, [x.astype(dtype) for x in z_bar]

        def product(w: Vector) -> Vector:
            pairs = zip(w, transposed(w)[1], strict=True)
            return [(1 + self.damping) * x - z_bar for x, z_bar in pairs]

        scale = _largest(right).astype(dtype)  # a solver may stop at the rounding of 1
        target = [b.astype(dtype) / scale for b in right]
        start = [jnp.zeros_like(b) for b in target]
        if self.warm_start:
            fine = jnp.stack([jnp.isfinite(x).all() for x in state]).all()
            start = [jnp.where(fine, x / scale, 0) for x in state]
        settings = Settings(self.iterations, self.tolerance, self.relaxation, self.rank)
        w = SOLVERS[self.solver](product, target, start, settings)
        eta_bar, z_bar = transposed(w)
        rest = [b - (1 + self.damping) * x + y for b, x, y in zip(target, w, z_bar, strict=True)]
        left = _relative(rest, target)
        # A solver may return its start where it meets NaN.
        w, eta_bar = jax.tree.map(
            lambda x: jnp.where(jnp.isfinite(left), scale * x, jnp.nan).astype(x.dtype),
            (w, eta_bar),
        )
        return w, left, eta_bar

    def _solved(self, state: InnerState) -> list[bool]:
        """Return which leaves of a state the fixed point is solved for."""
        mask = [is_differentiable(leaf) for leaf in jax.tree.leaves(state)]
        if self.variables:
            chosen = matching(paths(state), self.variables)
            mask = [floats and named for floats, named in zip(mask, chosen, strict=True)]
        if not any(mask):
            raise ValueError(
                f"`Implicit(variables={self.variables!r})` solves for no leaf of the inner state "
                f"that has a derivative. It has: {', '.join(paths(state))}."
            )
        return mask

    def _check_state(
        self, unroll: Unroll, eta: Eta, state: InnerState, batch: Batch, mask: Sequence[bool]
    ) -> None:
        """Raise ValueError for a step that counts, or an outer loss that reads what is held."""
        names = paths(state)
        if not self.variables:
            counting = clocks(lambda s: unroll.step(eta, s, batch, jax.grad), state)
            if counting:
                raise ValueError(
                    "`Implicit`: the inner state has no fixed point as a whole, since its "
                    f"{names[counting[0]]!r} changes at every step, and the step reads it: a count "
                    "of steps (Adam's bias correction, a learning-rate schedule), or a random key. "
                    "Solve for the parameters alone, with the rest held at its last values: "
                    "`Implicit(variables='params')`, with a pattern of their paths; the leaves of "
                    f"the state are {', '.join(names[:6])}{', ...' * (len(names) > 6)}. That is "
                    "exact where the inner gradient is zero and moves them alone. Or use "
                    "`Truncated(last=k)`."
                )
            return
        read = leaves_read(lambda s: outer_loss(unroll, eta, s)[0], state)
        floats = map(is_differentiable, jax.tree.leaves(state))
        rows = zip(names, read, mask, floats, strict=True)
        lost = [name for name, is_read, solved, f in rows if f and is_read and not solved]
        if lost:
            wider = f"{self.variables}|{lost[0].partition('/')[0]}"
            raise ValueError(
                f"`Implicit(variables={self.variables!r})` holds {lost[0]!r} of the inner state, "
                "but the outer loss reads it, and how it depends on eta would be lost. Let the "
                f"pattern match it too: `Implicit(variables={wider!r})`."
            )

    def _warn(self, metrics: Mapping[str, jax.Array]) -> None:
        """Issue the doubts as warnings, where the numbers are known: outside of `jax.jit`."""
        if any(isinstance(value, jax.core.Tracer) for value in metrics.values()):
            return
        values = {name: float(value) for name, value in metrics.items()}
        for text in self.doubts(values).values():
            warnings.warn(text, ApproximationWarning, stacklevel=3)


_MORE = "Raise `iterations`, add `damping`"
HELP = {
    "cg": f"It needs a gradient step with one learning rate; else take 'gmres'. {_MORE}.",
    "nystrom": f"It needs a gradient step with one learning rate; else take 'gmres'. {_MORE}.",
    "neumann": (
        "Of a large one `fixed_point_gap` is a lower bound. Its terms shrink as the steps of the "
        "inner loop do: raise `iterations`, lower `relaxation` where they grow, or take 'gmres'."
    ),
    "gmres": f"{_MORE}, or look whether the inner loop has converged.",
    "bicgstab": f"{_MORE}, or take 'gmres', which does not break down.",
}


def _constant(fun: Any, argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Stand in for `jax.value_and_grad`; its results have no derivative."""
    differentiate = jax.value_and_grad(fun, argnums, has_aux)
    return lambda *args, **kwargs: jax.lax.stop_gradient(differentiate(*args, **kwargs))


def _without_derivative(state: InnerState, where: Sequence[bool] | bool) -> InnerState:
    leaves, treedef = jax.tree.flatten(state)
    where = [where] * len(leaves) if isinstance(where, bool) else where
    pairs = zip(leaves, where, strict=True)
    return jax.tree.unflatten(treedef, [jax.lax.stop_gradient(x) if w else x for x, w in pairs])


def _largest(x: Vector) -> jax.Array:
    """Return the largest absolute entry (), or 1 where that is zero or not finite."""
    largest = functools.reduce(jnp.maximum, [jnp.abs(part).max(initial=0) for part in x])
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)


def _relative(x: Vector, right: Vector) -> jax.Array:
    """Return the norm of x relative to that of the right-hand side (), neither squared as it is."""
    scale = _largest(right)
    size, rest = norm([b / scale for b in right]), norm([part / scale for part in x])
    return rest / jnp.where(size > 0, size, 1)


def _precise(z: Vector) -> Any:
    """Return the dtype of a solve: the widest of z, and float32 at least."""
    return jnp.result_type(jnp.float32, *(part.dtype for part in z))


def _parts(leaves: Sequence[Any]) -> Vector:
    """Return leaves as real arrays: a complex one as two."""
    arrays = map(jnp.asarray, leaves)
    split_up = ([x.real, x.imag] if jnp.iscomplexobj(x) else [x] for x in arrays)
    return [part for parts in split_up for part in parts]


def _whole(like: Sequence[Any], parts: Vector) -> list[jax.Array]:
    """Return leaves like those that `_parts` took apart."""
    rest = iter(parts)
    return [
        jax.lax.complex(next(rest), next(rest)) if jnp.iscomplexobj(x) else next(rest) for x in like
    ]
