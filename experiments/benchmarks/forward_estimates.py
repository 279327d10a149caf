"""Hypergradients that are estimated while the inner loop runs forwards, beside `Truncated`.

    python -m metalearn.experiments.benchmarks.forward_estimates [--seeds 5]

Two published ideas that are no engines here: where they are accurate `Implicit` is more so, and
elsewhere they depend on settings that nobody knows beforehand. Both need no backward pass through
the loop, and memory that is flat in T:

    modes       h_t, the exact hypergradient of a run of t steps, by forward mode for t = s, 2s, ..
                up to tau. A linear recurrence in a few delays is fitted to it (dynamic mode
                decomposition of its Hankel matrix) and continued up to T, a run that is not taken.
                Hataya and Kawahara 2024 (arXiv:2402.02741), who take the limit of a long run.
    recurrence  v_{t+1} = gamma v_t + (d step_t / d eta)^T dF/d theta_{t+1}: forward mode with a
                number in the place of the Jacobian of a step, so that there are no tangents,
                whatever the size of eta. Of the kind of HPO-SGLD (Kim and Hospedales 2024,
                arXiv:2410.10417).

"Stable" modes are continued to T, those that grow without their growth; of "stationary" ones, those
with an eigenvalue of 1 alone, the limit. "The best" is the best setting in hindsight, by the exact
hypergradient: of gamma, of the delays, of the rank, and of which modes are kept. The problems:

    quadratic  50 parameters, curvatures from 0.03 to 1, T = 300 steps of gradient descent; eta:
               four coefficients of the minimum, and the logarithm of a penalty. In float64
    digits     the run of `--config=fds_digits` (MLP 64-64-10, 30% wrong labels, T = 1,000 steps of
               SGD); eta: learning rate, momentum and weight decay, constant in time
    langevin   the same, with a normal step of standard deviation 1e-3 at every inner step, the same
               one for the exact hypergradient

`h_t` at the end of the trajectory that was taken is printed beside its modes, with the same FLOPs.
An error is |g - h_T| / |h_T|, "worst entry" the largest |g_i - h_i| / |h_i|, and a cosine that of g
and h_T: medians over seeds. FLOPs are those of the compiled programs, in units of the T inner steps
alone; of `Truncated(k)`, a line through two.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metalearn import (
    Algorithm,
    Episode,
    Forward,
    Implicit,
    MetaGradient,
    MixedFlow,
    Truncated,
    Unroll,
)
from metalearn.algorithms import FDS, Hyperparameter, sgd, weighted_cross_entropy
from metalearn.cost import cost
from metalearn.datasets import TrainingRuns, read_images, with_label_noise
from metalearn.engines import segments
from metalearn.engines.inner_loop import Remat, rollout
from metalearn.models import Linen, linen_networks, train_flag

EVERY = 5  # s, inner steps between two points of a trajectory
LASTS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)  # k / T of `Truncated`
STARTS = (0.1, 0.2, 0.3, 0.5)  # tau / T
GAMMAS = (1.0, 0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.5, 0.0)
DELAYS, CUTS, KEPT = (2, 4, 8, 16), (1e-2, 1e-4, 1e-6, 1e-8), ("stable", "stationary")
FIXED = 2, 1e-4  # the delays and the cut that are not chosen in hindsight
NOISE = 1e-3
FORWARD = Forward()

Run = Callable[[Unroll, Any, Any], jax.Array]  # unroll, eta, batches -> a result


@dataclasses.dataclass(frozen=True)
class Bowl(Algorithm):
    """A quadratic of 50 parameters, of which minimum and penalty are learned.

    An episode's support is (rotation [50, 50], mix [50, 4], target [50]).

    inner_steps: T, of gradient descent.
    """

    inner_steps: int = 300

    def init(self, key: jax.Array) -> Any:
        """Return the coefficients of the minimum [4], and the logarithm of the penalty ()."""
        return {"mix": jnp.arange(1.0, 5.0) / 4, "log_penalty": jnp.log(0.01)}

    def batches(self, episode: Episode, key: jax.Array) -> Any:
        """Return the numbers of the steps."""
        return jnp.arange(self.inner_steps)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the unroll: theta begins at one."""
        rotation, mix, target = episode.support
        hessian = (rotation * jnp.geomspace(0.02, 1.0, 50)[None]) @ rotation.T

        def loss(theta: jax.Array, eta: Any) -> jax.Array:
            penalty = jnp.exp(eta["log_penalty"]) * jnp.sum(theta**2)
            return theta @ hessian @ theta / 2 - theta @ (mix @ eta["mix"]) + penalty / 2

        def step(eta: Any, theta: jax.Array, batch: Any, grad: Any) -> jax.Array:
            return theta - grad(loss)(theta, eta)

        def outer(eta: Any, theta: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
            return jnp.sum((theta - target) ** 2), {}

        return Unroll(lambda eta: jnp.ones(50), step, outer)


def bowl(seed: int) -> tuple[Bowl, Episode]:
    """Return the quadratic of a seed."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.normal(size=(50, 50)))[0]
    support = rotation, random.normal(size=(50, 4)) / 10, random.normal(size=50)
    return Bowl(), Episode(tuple(map(jnp.asarray, support)), ())


def digits(seed: int) -> tuple[FDS, Episode]:
    """Return the training run of a seed: its wrong labels, and its split."""
    images = read_images("digits", "train")
    noisy = with_label_noise(images, 0.3, seed).labels
    runs = TrainingRuns.create(*images, validation=400, training_targets=noisy)
    shape = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    model = Linen(linen_networks.MLP(10, (64,)), shape, train_flag)
    learned = {
        "learning_rate": Hyperparameter(1e-4, 1.0, 1e-2, space="log"),
        "momentum": Hyperparameter(0.0, 1.0, 0.5, space="logit"),
        "weight_decay": Hyperparameter(1e-5, 0.1, 1e-3, space="log"),
    }
    algorithm = FDS(model, learned, 1000, 64, sgd, weighted_cross_entropy)
    return algorithm, runs.sample(jax.random.key(seed))


PROBLEMS: dict[str, Callable[[int], tuple[Any, Episode]]] = {
    "quadratic": bowl,
    "digits": digits,
    "langevin": digits,
}


def with_noise(unroll: Unroll, key: jax.Array) -> Unroll:
    """Return the unroll with a normal step of the parameters after each inner step."""

    def step(eta: Any, state: Any, batch: Any, grad: Any) -> Any:
        after = unroll.step(eta, state, batch, grad)
        flat, unravel = ravel_pytree(after.params)
        normal = jax.random.normal(jax.random.fold_in(key, batch[0]), flat.shape, flat.dtype)
        return after._replace(params=unravel(flat + NOISE * normal))

    return unroll._replace(step=step)


@functools.cache
def through(engine: MetaGradient) -> Run:
    """Return the hypergradient [q] of an engine."""
    return lambda unroll, eta, batches: ravel_pytree(
        engine.value_and_grad(unroll, eta, batches)[1]
    )[0]


def shares(unroll: Unroll, eta: Any, batches: Any) -> jax.Array:
    """Return what each step contributes to the exact hypergradient, [T, q].

    The sum of the last k is the hypergradient of `Truncated(k)`, where the outer loss reads no eta.
    """

    def step(state: Any, batch: Any) -> Any:
        return unroll.step(eta, state, batch, jax.grad), state

    def back(bar: Any, inputs: Any) -> Any:
        state, batch = inputs
        one, zero = jax.tree.map(lambda x: x[None], batch), jax.tree.map(jnp.zeros_like, eta)
        cotangents = segments.Cotangents(bar, zero)
        bars = segments.pull_back(
            *(unroll, eta, state, one, [], cotangents), jax.value_and_grad, Remat()
        )
        return bars.state, ravel_pytree(bars.eta)[0]

    last, states = jax.lax.scan(step, unroll.init(eta), batches)
    bar = segments.outer_cotangents(unroll, eta, last)[1].state
    return jax.lax.scan(back, bar, (states, batches), reverse=True)[1]


def trajectory(unroll: Unroll, eta: Any, batches: Any) -> jax.Array:
    """Return h_t [n, q] after every `EVERY` of the steps, in one pass of forward mode."""

    def advance(stream: Any, segment: Any) -> Any:
        stream, inner = FORWARD.advance(unroll, eta, stream, segment)
        return stream, ravel_pytree(FORWARD.finish(unroll, eta, stream, inner)[1])[0]

    pieces = jax.tree.map(lambda x: x.reshape(-1, EVERY, *x.shape[1:]), batches)
    return jax.lax.scan(advance, FORWARD.start(unroll, eta), pieces)[1]


def terms(unroll: Unroll, eta: Any, batches: Any) -> jax.Array:
    """Return (d step_t / d eta)^T dF/d theta_{t+1}, [T, q]."""

    def cotangent(leaf: jax.Array, bar: Any) -> Any:
        return np.zeros(leaf.shape, jax.dtypes.float0) if bar is None else bar

    def step(state: Any, batch: Any) -> Any:
        after, pull = jax.vjp(lambda eta: unroll.step(eta, state, batch, jax.grad), eta)
        bars = segments.outer_cotangents(unroll, eta, after)[1].state
        bars = jax.tree.map(cotangent, after, bars, is_leaf=lambda leaf: leaf is None)
        return after, ravel_pytree(pull(bars)[0])[0]

    return jax.lax.scan(step, unroll.init(eta), batches)[1]


def continued(points: np.ndarray, count: int, delays: int, cut: float, kept: str) -> np.ndarray:
    """Return the point [q] that is `count` points after the last of a trajectory [n, q].

    Args:
      points: a trajectory.
      count: how far to continue it.
      delays: successive points in the state of the linear recurrence that is fitted.
      cut: singular values of the fit are left out below this share of the largest.
      kept: "stable": all modes, those that grow with their growth taken out; "stationary": those
        alone whose eigenvalue is within 0.02 of 1, as in the limit of a long run.
    """
    scale = np.linalg.norm(points, axis=0)
    scaled = points / np.where(scale > 0, scale, 1)
    states = np.stack([scaled[i : i + delays].ravel() for i in range(len(points) - delays + 1)])
    u, s, vh = np.linalg.svd(states[:-1].T, full_matrices=False)
    rank = int((s > cut * s[0]).sum())
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    values, vectors = np.linalg.eig(u.T @ states[1:].T @ vh.T / s)
    modes = u @ vectors
    amplitudes = np.linalg.lstsq(modes, states[-1].astype(complex), rcond=None)[0]
    powers = (values / np.maximum(np.abs(values), 1)) ** count
    if kept == "stationary":
        powers = (np.abs(values - 1) < 0.02).astype(powers.dtype)
    return np.asarray((modes @ (amplitudes * powers)).real[-points.shape[1] :] * scale)


def agreement(estimate: np.ndarray, exact: np.ndarray) -> tuple[float, float, float]:
    """Return (the relative error, the largest one of an entry, the cosine)."""
    size, norm = np.linalg.norm(exact), np.linalg.norm(estimate)
    worst = float(np.max(np.abs(estimate - exact) / np.abs(exact)))
    cosine = float(estimate @ exact / (size * norm)) if norm else 0.0
    return float(np.linalg.norm(estimate - exact) / size), worst, cosine


@functools.cache
def program(name: str, algorithm: Any, run: Run) -> Any:
    """Return the compiled function (eta, episode, batches, key) -> a result of a problem."""

    def solve(eta: Any, episode: Episode, batches: Any, key: jax.Array) -> jax.Array:
        unroll = algorithm.unroll(episode, key)
        return run(with_noise(unroll, key) if name == "langevin" else unroll, eta, batches)

    return jax.jit(solve)


def measure(
    name: str, seed: int, steps: int | None = None, costs: bool = False
) -> dict[str, tuple[float, float, float, float]]:
    """Return {contender: (FLOPs in units of the T steps alone, and its `agreement`)}.

    Args:
      name: of the problem.
      seed: of the problem.
      steps: T; None: that of the problem.
      costs: whether FLOPs are counted, which compiles; else they are NaN.
    """
    algorithm, episode = PROBLEMS[name](seed)
    algorithm = dataclasses.replace(algorithm, inner_steps=steps or algorithm.inner_steps)
    key = jax.random.key(seed)
    arguments = algorithm.init(key), episode, algorithm.batches(episode, key), key
    total = algorithm.inner_steps
    rows: dict[str, tuple[float, float, float, float]] = {}

    def result(run: Run) -> np.ndarray:
        return np.asarray(program(name, algorithm, run)(*arguments), np.float64)

    def flops(run: Run) -> float:
        return cost(program(name, algorithm, run), *arguments).flops if costs else math.nan

    def record(contender: str, work: float, estimate: np.ndarray) -> None:
        rows[contender] = work, *agreement(estimate, exact)

    plain = flops(lambda *loop: rollout(*loop)[0])
    path, parts, ends = result(trajectory), result(shares), result(terms)
    exact = path[-1]
    record('`MixedFlow("nested")`', flops(through(MixedFlow("nested"))) / plain, parts.sum(0))
    tenth = max(1, total // 10)
    work = (flops(through(Truncated(tenth))) / plain - 1) / tenth
    for last in (max(1, round(share * total)) for share in LASTS):
        record(f"`Truncated({last})`", 1 + last * work, parts[-last:].sum(0))
    implicit = Implicit("neumann", iterations=100, tolerance=0.0, variables="params")
    if name == "quadratic":
        implicit = Implicit("cg", iterations=20)
    # As many products, in a loop whose FLOPs can be counted.
    counted = dataclasses.replace(implicit, solver="neumann", tolerance=0.0)
    label = f'`Implicit("{implicit.solver}")`, {implicit.iterations} iterations'
    record(label, flops(through(counted)) / plain, result(through(implicit)))

    ages, work = np.arange(total)[::-1, None], flops(terms) / plain
    sums = {gamma: (gamma**ages * ends).sum(0) for gamma in GAMMAS}
    record("recurrence, gamma = 1", work, sums[1.0])
    best = min(sums.values(), key=lambda estimate: agreement(estimate, exact))
    record("recurrence, the best gamma", work, best)

    work = flops(trajectory) / plain
    for share in STARTS:
        tau = round(share * total)
        seen = path[: tau // EVERY]
        record(f"h_t of t = {tau}", work * share, seen[-1])
        count = (total - tau) // EVERY
        for kept in KEPT:
            record(
                f"{kept} modes of {tau} steps", work * share, continued(seen, count, *FIXED, kept)
            )
        settings = itertools.product((d for d in DELAYS if d + 3 <= len(seen)), CUTS, KEPT)
        tried = [continued(seen, count, *how) for how in settings]
        best = min(tried, key=lambda estimate: agreement(estimate, exact))
        record(f"the best modes of {tau} steps", work * share, best)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every problem, and print a Markdown table of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="T: 250, 300, ..; by default that of the problem")
    options = parser.parse_args(argv)
    for name in options.problem:
        with jax.enable_x64(name == "quadratic"):
            measured = [
                measure(name, seed, options.steps, costs=seed == 0) for seed in range(options.seeds)
            ]
        print(f"\n| {name} | FLOPs | error | worst entry | cosine |\n{'|---' * 5}|")
        for contender, (flops, *_) in measured[0].items():
            _, error, worst, cosine = np.median([rows[contender] for rows in measured], axis=0)
            numbers = f"{flops:.2f} | {error:.2g} | {worst:.2g} | {cosine:.3f}"
            print(f"| {contender} | {numbers} |", flush=True)
    print(f"\njax {jax.__version__}")


if __name__ == "__main__":
    main()
