"""Implicit and truncated hypergradients beside those of Betty and TorchOpt, on one problem.

    python -m metalearn.experiments.benchmarks.implicit [--peers-python=PYTHON]

Softmax regression (D inputs, C classes) with a weight decay of its own for each of its D * C
parameters; eta are their logarithms (Lorraine et al. 2020, arXiv:1911.02590):

    L(theta, eta) = mean cross-entropy + sum(exp(eta) theta^2) / 2        inner, T steps of SGD
    F(theta)      = mean cross-entropy on other examples                  outer

The inner loop ends near the one minimum, so that the implicit function theorem holds. Every
contender takes the same T steps, the same iterations of its solver and the same number of steps to
go back through, in float32, in a process of its own. Its numbers are

    error        relative difference from reverse mode through all T steps, in float64
    apart        relative difference from ours with the same solver
    seconds      of one hypergradient with its T steps, compiled or warm: the median
    / plain      the same in times of the T steps alone
    compile      seconds that the first call takes longer
    peak         the largest resident memory of the process, imports and compilation included

Betty and TorchOpt run in an environment of their own, set up as `pytorch_implicit.py` says, and are
left out without `--peers-python` ($METALEARN_IMPLICIT_PYTHON).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn import Algorithm, Episode, Implicit, MetaGradient, Reverse, Truncated, Unroll
from metalearn._utils import strict_json
from metalearn.engines.inner_loop import rollout
from metalearn.experiments.benchmarks.attribution import peak_mib, timed

INPUTS, CLASSES, EXAMPLES = 128, 16, 1024
STEPS, ITERATIONS, LAST, RATE = 1000, 30, 50, 0.5
DECAY = 1e-2
SOLVERS = ("cg", "neumann", "truncated")
PEERS = ("betty-cg", "torchopt-cg", "betty-neumann", "torchopt-truncated")


@dataclasses.dataclass(frozen=True)
class Decays(Algorithm):
    """A weight decay for each parameter of a softmax regression.

    An episode's support and query are (inputs [examples, D], labels [examples]).

    steps: T, of gradient descent on all of the support set.
    rate: of each step.
    """

    steps: int
    rate: float

    def init(self, key: jax.Array) -> jax.Array:
        """Return the logarithms of the decays [D, C]."""
        return jnp.full((INPUTS, CLASSES), jnp.log(DECAY))

    def batches(self, episode: Episode, key: jax.Array) -> Any:
        """Return the numbers of the steps: each takes all examples."""
        return jnp.arange(self.steps)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the unroll: theta begins at zero."""

        def fit(weights: jax.Array, examples: Any) -> jax.Array:
            inputs, labels = examples
            losses = optax.softmax_cross_entropy_with_integer_labels(inputs @ weights, labels)
            return losses.mean()

        def penalized(weights: jax.Array, decays: jax.Array) -> jax.Array:
            return fit(weights, episode.support) + 0.5 * jnp.sum(jnp.exp(decays) * weights**2)

        def step(eta: jax.Array, weights: jax.Array, batch: Any, grad: Any) -> jax.Array:
            return weights - self.rate * grad(penalized)(weights, eta)

        def loss(eta: jax.Array, weights: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
            return fit(weights, episode.query), {}

        return Unroll(jnp.zeros_like, step, loss)


def engine(solver: str, iterations: int, last: int) -> MetaGradient:
    """Return our contender."""
    if solver == "truncated":
        return Truncated(last)
    return Implicit(solver, iterations=iterations, tolerance=0.0)


def write_problem(folder: pathlib.Path) -> None:
    """Write problem.npz: inputs, labels, held_inputs, held_labels, decays."""
    random = np.random.default_rng(0)
    scales = np.linspace(0.3, 1.0, INPUTS)  # so that curvatures differ
    inputs = (random.normal(size=(2 * EXAMPLES, INPUTS)) * scales).astype(np.float32)
    truth = random.normal(size=(INPUTS, CLASSES)) * (random.random((INPUTS, 1)) < 0.3)
    noise = random.gumbel(size=(2 * EXAMPLES, CLASSES))
    labels = (inputs @ truth + noise).argmax(1)
    np.savez(
        folder / "problem.npz",
        inputs=inputs[:EXAMPLES],
        labels=labels[:EXAMPLES],
        held_inputs=inputs[EXAMPLES:],
        held_labels=labels[EXAMPLES:],
        decays=np.full((INPUTS, CLASSES), np.log(DECAY), np.float32),
    )


def read_problem(folder: pathlib.Path, dtype: Any) -> Episode:
    """Return the problem as an episode."""
    arrays = np.load(folder / "problem.npz")
    support, query = (
        (jnp.asarray(arrays[f"{of}inputs"], dtype), jnp.asarray(arrays[f"{of}labels"], jnp.int32))
        for of in ("", "held_")
    )
    return Episode(support, query)


def hypergradient(engine: MetaGradient, episode: Episode, steps: int, dtype: Any) -> Any:
    """Return (a call that computes the hypergradient [D, C], a call of the inner loop alone)."""
    algorithm, key = Decays(steps, RATE), jax.random.key(0)
    eta = algorithm.init(key).astype(dtype)

    def solve(eta: jax.Array, episode: Episode) -> jax.Array:
        unroll, batches = algorithm.unroll(episode, key), algorithm.batches(episode, key)
        return engine.value_and_grad(unroll, eta, batches)[1]

    def plain(eta: jax.Array, episode: Episode) -> jax.Array:
        unroll, batches = algorithm.unroll(episode, key), algorithm.batches(episode, key)
        return rollout(unroll, eta, batches)[0]

    compiled = [jax.jit(function) for function in (solve, plain)]
    return [lambda f=f: np.asarray(jax.block_until_ready(f(eta, episode))) for f in compiled]


def exact(folder: pathlib.Path, steps: int) -> np.ndarray:
    """Return the hypergradient [D, C] through all steps, in float64."""
    with jax.enable_x64(True):
        episode = read_problem(folder, jnp.float64)
        return hypergradient(Reverse("segments"), episode, steps, jnp.float64)[0]()


def measure(solver: str, folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Print one JSON line of our contender, and write its hypergradient to gradient.npy."""
    contender = engine(solver, options.iterations, options.last)
    episode = read_problem(folder, jnp.float32)
    call, plain = hypergradient(contender, episode, options.steps, jnp.float32)
    first, peak = timed(call)[0], peak_mib()
    plain()
    rounds = [(timed(call)[0], timed(plain)[0]) for _ in range(options.rounds)]
    seconds, alone = (statistics.median(times) for times in zip(*rounds, strict=True))
    np.save(folder / "gradient.npy", call())
    numbers = {"seconds": seconds, "plain": alone, "compile": first - seconds, "peak_mib": peak}
    print(strict_json.dumps(numbers))


def run(command: list[Any], folder: pathlib.Path, **options: Any) -> tuple[dict[str, Any], Any]:
    """Return (what a contender in a process of its own prints, its hypergradient)."""
    words = [*map(str, command)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, **options)
    numbers = strict_json.loads(done.stdout.splitlines()[-1])
    return numbers, np.load(folder / "gradient.npy")


def compare(options: argparse.Namespace) -> None:
    """Print a table of all contenders."""
    shared = [
        *(f"--steps={options.steps}", f"--iterations={options.iterations}"),
        *(f"--last={options.last}", f"--rounds={options.rounds}"),
    ]
    rows: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write_problem(folder)
        own = [sys.executable, "-m", "metalearn.experiments.benchmarks.implicit", *shared]
        for solver in SOLVERS:
            command = [*own, f"--folder={folder}", f"--measure={solver}"]
            rows[f"metalearn-{solver}"] = run(command, folder)
            if options.peers_python is None:
                continue
            script = pathlib.Path(__file__).with_name("pytorch_implicit.py")
            peer = [options.peers_python, script, *shared, f"--rate={RATE}", f"--folder={folder}"]
            # Not this package's folders: `datasets` is Hugging Face's there.
            others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            for name in PEERS:
                if name.endswith(solver):
                    rows[name] = run([*peer, f"--contender={name}"], folder, env=others)
        truth = exact(folder, options.steps)
    columns = "error", "apart", "seconds", "/ plain", "compile", "peak MiB"
    print(f"| | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    ours = truth
    for name, (numbers, gradient) in rows.items():
        ours = ours if name in PEERS else gradient
        print(
            f"| {name} | {apart(gradient, truth):.1e} | {apart(gradient, ours):.1e} | "
            f"{numbers['seconds']:.3f} | {numbers['seconds'] / numbers['plain']:.2f} | "
            f"{numbers['compile']:.1f} | {numbers['peak_mib']:.0f} |"
        )
    print(f"\n{os.cpu_count()} cores, jax {jax.__version__}, T = {options.steps}")


def apart(gradient: np.ndarray, reference: np.ndarray) -> float:
    """Return the relative difference of two hypergradients."""
    return float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference))


def main() -> None:
    """Compare, or measure one contender."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="T")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of the solvers")
    parser.add_argument("--last", type=int, default=LAST, help="steps of the truncated ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers-python", default=os.environ.get("METALEARN_IMPLICIT_PYTHON"))
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=SOLVERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.folder, options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
