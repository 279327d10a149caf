"""Solvers of the linear system of implicit differentiation, A w = b with A = (I - J)^T + damping.

J is the Jacobian of an inner step, and all that a solver has of it is the product with a vector, a
vector-Jacobian product of the step. Memory is in vectors like theta:

| solver     | for                             | memory       | converges                         |
|------------|---------------------------------|--------------|-----------------------------------|
| "cg"       | A symmetric, positive           | 4            | in about sqrt(condition) products |
| "nystrom"  | the same, few large eigenvalues | rank + 5     | as if the largest were not there  |
| "neumann"  | any contraction                 | 2            | as fast as the inner loop         |
| "gmres"    | any A                           | RESTART + 3  | with the smallest residual        |
| "bicgstab" | any A                           | 8            | as "cg", as a rule                |

A is symmetric where the step is a gradient step, theta - rate * grad L(theta), with one rate for
all. With momentum, with Adam, or with a rate per parameter it is not. A solver that does not suit A
is never silent: the residual of its result is computed, with a product that is needed anyway.

"cg", "gmres" and "bicgstab" are those of `jax.scipy.sparse.linalg`. "neumann" is the series
w = sum_k (J^T)^k b (Lorraine et al. 2020, arXiv:1911.02590), the fixed-point iteration of the
adjoint; a `relaxation` below 1 makes it converge where eigenvalues of J are below -1. "nystrom" is
"cg", preconditioned by a low-rank approximation of A from `rank` random products (Hataya and Yamada
2023, arXiv:2302.09726, who invert the approximation itself; as a preconditioner: Frangella et al.
2021, arXiv:2110.02820).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
from jax.scipy.sparse import linalg

RESTART = 20  # products of "gmres" between two restarts, whose vectors are all kept

Vector = list[jax.Array]
Product = Callable[[Vector], Vector]


class Settings(NamedTuple):
    """What a solver is to do; see `Implicit`, whose fields these are.

    Args:
      iterations: at most, or terms of "neumann".
      tolerance: of the residual, relative to the right-hand side.
      relaxation: of "neumann".
      rank: of "nystrom".
    """

    iterations: int
    tolerance: float
    relaxation: float
    rank: int


def cg(product: Product, right: Vector, start: Vector, how: Settings) -> Vector:
    """Solve a symmetric positive system by conjugate gradients."""
    return linalg.cg(product, right, start, tol=how.tolerance, maxiter=how.iterations)[0]


def bicgstab(product: Product, right: Vector, start: Vector, how: Settings) -> Vector:
    """Solve any system by BiCGStab, with two products an iteration."""
    return linalg.bicgstab(product, right, start, tol=how.tolerance, maxiter=how.iterations)[0]


def gmres(product: Product, right: Vector, start: Vector, how: Settings) -> Vector:
    """Solve any system by GMRES, restarted every `RESTART` iterations."""
    restart = min(RESTART, how.iterations)
    rounds = -(-how.iterations // restart)
    return linalg.gmres(
        *(product, right, start),
        tol=how.tolerance,
        restart=restart,
        maxiter=rounds,
        solve_method="incremental",
    )[0]


def neumann(product: Product, right: Vector, start: Vector, how: Settings) -> Vector:
    """Solve by w <- w + relaxation (b - A w), until the residual is small: a Neumann series."""

    def residual(w: Vector) -> Vector:
        return jax.tree.map(jnp.subtract, right, product(w))

    def go_on(carry: Any) -> jax.Array:
        count, _, rest = carry
        return (count < how.iterations) & (norm(rest) > how.tolerance * norm(right))

    def add(carry: Any) -> Any:
        count, w, rest = carry
        w = jax.tree.map(lambda x, r: x + how.relaxation * r, w, rest)
        return count + 1, w, residual(w)

    first = 0, start, residual(start)
    if how.tolerance == 0:  # a loop whose FLOPs can be counted
        return jax.lax.fori_loop(0, how.iterations, lambda _, carry: add(carry), first)[1]
    return jax.lax.while_loop(go_on, add, first)[1]


def nystrom(product: Product, right: Vector, start: Vector, how: Settings) -> Vector:
    """Solve a symmetric positive system by conjugate gradients, preconditioned at low rank."""
    flat, unravel = jax.flatten_util.ravel_pytree(right)

    def flat_product(x: jax.Array) -> jax.Array:
        return jax.flatten_util.ravel_pytree(product(unravel(x)))[0]

    precondition = low_rank_inverse(flat_product, flat, how.rank)
    x, _ = linalg.cg(
        *(flat_product, flat, jax.flatten_util.ravel_pytree(start)[0]),
        tol=how.tolerance,
        maxiter=how.iterations,
        M=precondition,
    )
    return unravel(x)


def low_rank_inverse(
    product: Callable[[jax.Array], jax.Array], like: jax.Array, rank: int
) -> Callable[[jax.Array], jax.Array]:
    """Return x -> P^-1 x, of a Nystrom approximation U L U^T of A from `rank` random products.

    P^-1 = U (L / l)^-1 U^T + (I - U U^T), with l the smallest eigenvalue in L: the largest
    eigenvalues become l, the others stay. The identity where A is not positive.

    Args:
      product: x [n] -> A x [n].
      like: [n], the shape and dtype of x.
      rank: columns of the approximation, n at most.
    """
    columns = min(rank, like.size)
    tiny = jnp.finfo(like.dtype).eps
    # Any test matrix will do: a fixed key keeps the engine deterministic.
    test = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (like.size, columns), like.dtype))[0]
    image = jax.lax.map(product, test.T).T
    shift = tiny * jnp.linalg.norm(image)
    image = image + shift * test
    core = test.T @ image
    factor = jnp.linalg.cholesky((core + core.T) / 2)
    # NaN in the factor: A is not positive. The SVD of an identity costs the same.
    positive = jnp.isfinite(factor).all()
    factor = jnp.where(positive, factor, jnp.eye(columns, dtype=like.dtype))
    half = jax.scipy.linalg.solve_triangular(factor, image.T, lower=True).T
    vectors, values, _ = jnp.linalg.svd(half, full_matrices=False)
    eigenvalues = jnp.maximum(values**2 - shift, tiny * values[0] ** 2)
    scale = eigenvalues[-1] / eigenvalues - 1

    def precondition(x: jax.Array) -> jax.Array:
        return x + jnp.where(positive, vectors @ (scale * (vectors.T @ x)), 0)

    return precondition


def norm(x: Vector) -> jax.Array:
    """Return the norm () of a vector in parts."""
    return jnp.sqrt(sum(jnp.vdot(part, part) for part in x))


SOLVERS: dict[str, Callable[[Product, Vector, Vector, Settings], Vector]] = {
    "cg": cg,
    "nystrom": nystrom,
    "neumann": neumann,
    "gmres": gmres,
    "bicgstab": bicgstab,
}
