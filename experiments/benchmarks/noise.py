"""The noise of hypergradients, and its reduction by sharing a hyperparameter over a window.

    python -m metalearn.experiments.benchmarks.noise [--seeds 100] [--horizon 250]
    python -m metalearn.experiments.benchmarks.noise --dataset mnist    # LeNet, 10 seeds

The experiment of Micaelli & Storkey 2021 (arXiv:2007.07869). A network is trained for T steps by
SGD with momentum, from many seeds: each draws theta_0, the split and the order of the batches.
One pass of mixed flow per seed gives g_t, the hypergradient of the learning rate of each single
step; a rate shared over a window of W steps has the mean of theirs, an estimate of E[g_t]. With
MSE_W the squared error of that mean, averaged over steps and seeds, the paper shows

    MSE_W <= (1 + c (W - 1)) / W MSE_1 + eps^2 (W^2 - 1) / 12

with c the largest correlation between the g_t of two steps, and eps the largest change of E[g_t]
from one step to the next: the noise falls, but not as 1 / W, and the bias grows. eps is computed
from the estimated E[g_t], whose remaining noise makes it too large.

`greedy` is the hypergradient of a single step, d L_val(theta_{t+1}) / d alpha_t, as an estimate of
the same E[g_t]: its bias is that of every greedy method.

Unbiased errors: each seed is compared with the mean of all the others (leave-one-out), and the
variance of that mean is subtracted. Numbers after +- are the standard error of a jackknife.

Writes noise.md, noise.csv, noise.npz (all hypergradients), and with matplotlib noise.png.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from metalearn import MixedFlow, Tasks, Unroll
from metalearn._utils.intervals import half_width
from metalearn.algorithms import FDS, Hyperparameter, sgd
from metalearn.experiments.build import datasets, key_of
from metalearn.models import Linen, linen_networks

NAME = "learning_rate"
GREEDY = "greedy"
Row = dict[str, Any]


def problem(options: Mapping[str, Any]) -> tuple[FDS, Tasks]:
    """Return training with one learning rate for all steps, and the splits of a dataset."""
    source = {"tfds": options["dataset"], "data_dir": None, "noise_seed": 0}
    chosen = {key: options[key] for key in ("validation", "label_noise")}
    runs = datasets.training_run(**source, **chosen)
    module: Any = linen_networks.LeNet(runs.outputs, convolution="auto")
    if options["dataset"] == "digits":  # 8 x 8
        module = linen_networks.MLP(runs.outputs, (64,))
    learned = {NAME: Hyperparameter(0.0, 1.0, options["lr"])}
    optimizer = functools.partial(sgd, momentum=options["momentum"])
    model = Linen(module, runs.inputs)
    return FDS(model, learned, options["horizon"], options["batch"], optimizer), runs.train


def greedy(unroll: Unroll, eta: Any, batches: Any) -> jax.Array:
    """Return the derivative of the loss after each step by the rate of that step, [T].

    That is -grad L_val(theta_{t+1}) . v_t, with v_t the direction of the step.
    """

    def move(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        def after(eta: Any) -> tuple[jax.Array, Any]:
            new = unroll.step(eta, state, batch, jax.grad)
            return unroll.loss(eta, new)[0], new

        grads, new = jax.grad(after, has_aux=True)(eta)
        return new, grads[NAME][0]

    return jax.lax.scan(move, unroll.init(eta), batches)[1]


def hypergradients(algorithm: FDS, tasks: Tasks, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the hypergradients of each step from one seed: exact [T] and greedy [T]."""
    sample_key, unroll_key, batch_key = jax.random.split(key, 3)
    episode = tasks.sample(sample_key)
    batches = algorithm.batches(episode, batch_key)
    each = algorithm.unshared()
    _, grads = MixedFlow().value_and_grad(each.unroll(episode, unroll_key), each.init(key), batches)
    near = greedy(algorithm.unroll(episode, unroll_key), algorithm.init(key), batches)
    return grads[NAME], near


def measure(options: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return exact and greedy hypergradients, [seeds, T], float64; of finite runs only."""
    algorithm, tasks = problem(options)

    @jax.jit
    def all_of(tasks: Tasks, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = functools.partial(hypergradients, algorithm, tasks)
        return jax.lax.map(one, keys, batch_size=options["chunk"])

    keys = jax.random.split(key_of(options["seed"]), options["seeds"])
    exact, near = (np.asarray(values, np.float64) for values in all_of(tasks, keys))
    finite = np.isfinite(exact + near).all(1)
    if not finite.all():
        print(f"{(~finite).sum()} of {len(exact)} runs exploded and are left out.")
    return exact[finite], near[finite]


def shared(exact: np.ndarray, width: int) -> np.ndarray:
    """Return for each step the mean over its window: [seeds, T], of windows of equal width."""
    seeds, steps = exact.shape
    return exact.reshape(seeds, -1, width).mean(2).repeat(width, 1).reshape(seeds, steps)


def mse(estimates: np.ndarray, exact: np.ndarray) -> float:
    """Return the mean squared error of estimates [seeds, T] of E[exact], without bias."""
    seeds = len(exact)
    others = (exact.sum(0) - exact) / (seeds - 1)
    return float(((estimates - others) ** 2).mean() - variance(exact) / (seeds - 1))


def variance(values: np.ndarray) -> float:
    """Return the variance over seeds, without bias, averaged over steps."""
    return float(values.var(0, ddof=1).mean())


def theorem(exact: np.ndarray, width: int) -> float:
    """Return the bound on MSE_W."""
    first = (1 + correlation(exact) * (width - 1)) / width * mse(exact, exact)
    return first + drift(exact) ** 2 * (width**2 - 1) / 12


def correlation(exact: np.ndarray) -> float:
    """Return c, the largest correlation between different steps; 0 if all are negative."""
    matrix = np.corrcoef(exact.T)
    return max(float(matrix[~np.eye(len(matrix), dtype=bool)].max()), 0.0)


def drift(exact: np.ndarray) -> float:
    """Return eps, the largest change of the mean from one step to the next."""
    return float(abs(np.diff(exact.mean(0))).max())


def rows(exact: np.ndarray, near: np.ndarray, widths: Sequence[int]) -> list[Row]:
    """Return a row per window size, and one for greedy; all relative to MSE_1 but `mse`."""
    if len(exact) < 3:
        raise ValueError(
            f"Only {len(exact)} runs are finite, and an error leaves one out and needs a variance "
            "of the others: 3 at least. Raise --seeds, or lower --lr if runs explode."
        )
    table = [_row(str(width), exact, exact, width) for width in widths]
    for row, width in zip(table, widths, strict=True):
        row["theorem"] = theorem(exact, width) / mse(exact, exact)
    return [*table, {**_row(GREEDY, near, exact, 1), "theorem": float("nan")}]


def _row(name: str, estimates: np.ndarray, exact: np.ndarray, width: int) -> Row:
    def ratio(estimates: np.ndarray, exact: np.ndarray) -> float:
        return mse(shared(estimates, width), exact) / mse(exact, exact)

    seeds = range(len(exact))
    without = [ratio(np.delete(estimates, i, 0), np.delete(exact, i, 0)) for i in seeds]
    error2, part = mse(shared(estimates, width), exact), variance(shared(estimates, width))
    first = mse(exact, exact)
    error = np.std(without) * (len(exact) - 1) ** 0.5
    row = {"W": name, "mse": error2, "ratio": error2 / first, "error": float(error)}
    return {**row, "variance": part / first, "bias2": (error2 - part) / first}


def summary(exact: np.ndarray, near: np.ndarray) -> str:
    """Return the number of runs and the sign of the bias of greedy, as text."""
    truth, look = exact.mean(0), near.mean(0)
    error = (variance(exact) / len(exact)) ** 0.5
    lagged = np.corrcoef(exact.T).diagonal(1)
    agree = (np.sign(truth) == np.sign(look)).mean()
    ends = [f"{values.mean():.2e} +- {_error(values.mean(1)):.1e}" for values in (exact, near)]
    parts = [f"{x[0]:.2e}, {x[len(x) // 2]:.2e}, {x[-1]:.2e}" for x in (truth, look)]
    return "\n".join(
        [
            f"{len(exact)} seeds, T={exact.shape[1]}. MSE_1 {mse(exact, exact):.3e}. The truth is "
            f"{np.sqrt((truth**2).mean()):.2e} in size with a standard error of {error:.1e} (root "
            "mean squares over steps).",
            f"c={correlation(exact):.3f}, eps={drift(exact):.2e}; steps next to each other: "
            f"correlation {lagged.min():.2f} to {lagged.max():.2f}.",
            f"Mean over steps: {ends[0]}, greedy {ends[1]}. At the first, middle and last step: "
            f"{parts[0]}; greedy {parts[1]}. The same sign at {agree:.0%} of the steps.",
        ]
    )


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| W | MSE_W / MSE_1 | variance | bias squared | theorem |", "|---|---|---|---|---|"]
    for row in rows:
        bound = "" if row["W"] == GREEDY else f"{row['theorem']:.3f}"
        parts = f"{row['variance']:.3f} | {row['bias2']:.3f} | {bound}"
        lines.append(f"| {row['W']} | {row['ratio']:.3f} +- {row['error']:.3f} | {parts} |")
    return "\n".join(lines)


def draw(exact: np.ndarray, near: np.ndarray, rows: Sequence[Row], path: pathlib.Path) -> None:
    """Draw errors by window size, and each step's mean with its 95% interval. By matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    windows, last = rows[:-1], rows[-1]
    widths, measured = [int(row["W"]) for row in windows], [row["ratio"] for row in windows]
    left.errorbar(widths, measured, [row["error"] for row in windows], marker="o", label="measured")
    left.plot(widths, [row["theorem"] for row in windows], "--", label="theorem, at most")
    left.axhline(last["ratio"], color="C3", label=GREEDY)
    left.set(xlabel="W, steps in a window", ylabel="MSE_W / MSE_1", xscale="log", yscale="log")
    left.legend()
    for place, name, values in ((middle, "exact", exact), (right, GREEDY, near)):
        mean, width = values.mean(0), half_width(values)
        place.plot(mean)
        place.fill_between(range(len(mean)), mean - width, mean + width, alpha=0.3)
        place.set(xlabel="step", ylabel=f"mean {name} hypergradient")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write all files."""
    options = _arguments(argv)
    exact, near = measure(options)
    table = rows(exact, near, [width for width in options["W"] if options["horizon"] % width == 0])
    machine = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    settings = f"{options['dataset']}, lr {options['lr']:g}, momentum {options['momentum']:g}"
    text = f"{settings}, {machine}\n\n{summary(exact, near)}\n\n{markdown(table)}\n"
    print(text)
    out = options["out"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "noise.md").write_text(text)
    np.savez(out / "noise.npz", exact=exact, greedy=near)
    with (out / "noise.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    if importlib.util.find_spec("matplotlib"):
        draw(exact, near, table, out / "noise.png")


def _arguments(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default="digits", help="or any image set of TFDS")
    parser.add_argument("--seeds", type=int, help="100; 10 of another dataset")
    parser.add_argument("--horizon", type=int, default=250)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--validation", type=int, default=400, help="examples")
    parser.add_argument("--label-noise", type=float, default=0.0, help="of the training labels")
    widths = [1, 5, 10, 25, 50, 125, 250]
    help_w = "of which those that divide the horizon"
    parser.add_argument("--W", type=int, nargs="+", default=widths, help=help_w)
    parser.add_argument("--chunk", type=int, default=10, help="seeds at once")
    parser.add_argument("--seed", type=int, default=0, help="of all the seeds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/noise"))
    options = vars(parser.parse_args(argv))
    options["seeds"] = options["seeds"] or (100 if options["dataset"] == "digits" else 10)
    return options


if __name__ == "__main__":
    main()
