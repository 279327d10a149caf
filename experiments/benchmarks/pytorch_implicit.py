"""Implicit and truncated hypergradients by Betty and TorchOpt: `implicit.py` runs it, and compares.

The problem (`implicit.py` writes it to a file that both read): softmax regression with a weight
decay of its own for each of its D * C parameters, eta their logarithms,

    L(theta, eta) = mean cross-entropy + sum(exp(eta) theta^2) / 2        inner, T steps of SGD
    F(theta)      = mean cross-entropy on other examples                  outer

    betty-cg, betty-neumann   two `ImplicitProblem`s in an `Engine`, `Config(type=...)`
    torchopt-cg               `torchopt.diff.implicit.custom_root` with `solve_cg`
    torchopt-truncated        `torchopt.MetaSGD` through the last steps alone

A contender prints one JSON line, and writes its hypergradient [D, C] to gradient.npy. This file
imports nothing of the package, so that it can have an environment of its own:

    python -m venv .venv-implicit
    .venv-implicit/bin/pip install -r experiments/benchmarks/pytorch_implicit.lock

References: Choe et al. 2023, arXiv:2207.02849 (Betty); Ren et al. 2022, arXiv:2211.06934
(TorchOpt).
"""

import argparse
import contextlib
import io
import json
import logging
import pathlib
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

Data = dict[str, torch.Tensor]
OUTER_RATE = 1e4  # so that the step is not lost in the rounding of eta


def penalized(weights: torch.Tensor, decays: torch.Tensor, data: Data) -> torch.Tensor:
    """Return the inner loss ()."""
    fit = F.cross_entropy(data["inputs"] @ weights, data["labels"])
    return fit + 0.5 * (decays.exp() * weights**2).sum()


def outer_loss(weights: torch.Tensor, data: Data) -> torch.Tensor:
    """Return the outer loss ()."""
    return F.cross_entropy(data["held_inputs"] @ weights, data["held_labels"])


def descent(data: Data, decays: torch.Tensor, rate: float, steps: int) -> torch.Tensor:
    """Return the weights after so many steps of gradient descent from zero."""
    weights = torch.zeros_like(decays, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(penalized(weights, decays, data), weights)
        weights = (weights - rate * gradient).detach().requires_grad_()
    return weights


class Table(torch.nn.Module):
    """A matrix of parameters."""

    def __init__(self, values: torch.Tensor):
        super().__init__()
        self.values = torch.nn.Parameter(values.clone())

    def forward(self) -> torch.Tensor:
        """Return it."""
        return self.values


def by_betty(
    kind: str, data: Data, decays: torch.Tensor, options: argparse.Namespace
) -> torch.Tensor:
    """Return the hypergradient, read off one outer step of SGD."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            return outer_loss(self.inner(), data)

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            return penalized(self(), self.outer(), data)

    terms = options.iterations
    solver = {"cg_iterations": terms, "cg_alpha": 1.0}
    if kind == "neumann":  # Betty takes one more term than it is told
        solver = {"neumann_iterations": terms - 1, "neumann_alpha": options.rate}
    eta, theta = Table(decays), Table(torch.zeros_like(decays))
    batches = [(torch.zeros(1),)]  # the problems read all data themselves
    inner = Inner(
        "inner",
        Config(type=kind, unroll_steps=options.steps, **solver),
        theta,
        torch.optim.SGD(theta.parameters(), options.rate),
        train_data_loader=batches,
    )
    outer = Outer(
        "outer",
        Config(),
        eta,
        torch.optim.SGD(eta.parameters(), OUTER_RATE),
        train_data_loader=batches,
    )
    dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    config = EngineConfig(train_iters=options.steps, valid_step=options.steps + 1)
    with contextlib.redirect_stdout(io.StringIO()):
        Engine([outer, inner], config, dependencies).run()
    return (decays - eta.values.detach()) / OUTER_RATE


def by_custom_root(data: Data, decays: torch.Tensor, options: argparse.Namespace) -> torch.Tensor:
    """Return the hypergradient by TorchOpt's implicit differentiation."""
    import torchopt
    from torchopt.diff.implicit import custom_root

    def stationary(weights: torch.Tensor, decays: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(penalized)(weights, decays, data)

    solver = torchopt.linear_solve.solve_cg(maxiter=options.iterations, rtol=0.0, atol=0.0)

    @custom_root(stationary, argnums=1, solve=solver)
    def solve(weights: torch.Tensor, decays: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():  # of the inner loss: the call itself is not recorded
            return descent(data, decays.detach(), options.rate, options.steps).detach()

    decays = decays.clone().requires_grad_()
    loss = outer_loss(solve(torch.zeros_like(decays), decays), data)
    return torch.autograd.grad(loss, decays)[0]


def by_truncation(data: Data, decays: torch.Tensor, options: argparse.Namespace) -> torch.Tensor:
    """Return the hypergradient through the last steps, by TorchOpt's differentiable SGD."""
    import torchopt

    before = descent(data, decays, options.rate, options.steps - options.last)
    decays, theta = decays.clone().requires_grad_(), Table(before.detach())
    optimizer = torchopt.MetaSGD(theta, lr=options.rate)
    for _ in range(options.last):
        optimizer.step(penalized(theta(), decays, data))
    return torch.autograd.grad(outer_loss(theta(), data), decays)[0]


def contender(
    name: str, data: Data, decays: torch.Tensor, options: argparse.Namespace
) -> Callable[[], torch.Tensor]:
    """Return a function that computes the hypergradient [D, C]."""
    library, _, kind = name.partition("-")
    if library == "betty":
        logging.disable(logging.INFO)
        return lambda: by_betty(kind, data, decays, options)
    by = by_custom_root if kind == "cg" else by_truncation
    return lambda: by(data, decays, options)


def main() -> None:
    """Measure one contender."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--contender", required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--last", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    arrays = np.load(options.folder / "problem.npz")
    data = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "decays"}
    decays = torch.from_numpy(arrays["decays"])
    call = contender(options.contender, data, decays, options)
    gradient = call()
    seconds: list[float] = []
    plains: list[float] = []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: KiB
    for _ in range(options.rounds):
        for times, function in (
            (seconds, call),
            (plains, lambda: descent(data, decays, options.rate, options.steps)),
        ):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    np.save(options.folder / "gradient.npy", gradient.numpy())
    numbers = {
        "seconds": statistics.median(seconds),
        "plain": statistics.median(plains),
        "compile": 0.0,
        "peak_mib": peak,
        "torch": torch.__version__,
    }
    print(json.dumps(numbers, allow_nan=False))


if __name__ == "__main__":
    main()
