"""Pictures of what a run has learned, by matplotlib: `Algorithm.pictures` of our algorithms.

adaptation  MAML and its relatives: the loss on the query sets of a few held-out tasks by inner
            step; for regressions of one number, the functions before and after, too
rates       learned rates: their distribution in every parameter of the model
weights     loss weights: their distribution over the examples or tokens of a trained task, clean
            and corrupted where that is known, else by source
            of data weights, of which all examples have one: how many have which
updates     learned optimizers: the update by the gradient, when the same gradient comes again

Those of schedules are in `metalearn.algorithms.fds.pictures`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn import Tasks, Trainer
from metalearn._utils.trees import paths
from metalearn.algorithm import Algorithm
from metalearn.tasks import draw_task
from metalearn.train_state import TrainState
from metalearn.training.evaluation import task_metrics
from metalearn.unroll import horizon

TASKS = 20  # of a picture of adaptation
FUNCTIONS = 3  # of them whose functions are drawn
SOURCES = 8  # of weights that are drawn each on its own, at most
POINTS = 8  # inner steps at which a loss is computed, at most
LOG_RATIO = 30.0  # positive values with a larger ratio are drawn on a log scale
PICTURES = 3**9  # folded into the key of a run: tasks that training and evaluation do not draw


def adaptation(
    trainer: Trainer, state: TrainState, tasks: Tasks, workdir: pathlib.Path
) -> dict[str, Any]:
    """Draw the outer loss by inner step, of tasks that adapt from what was learned."""
    del workdir
    algorithm, eta = trainer.algorithm.evaluation(), trainer.learned(state)
    keys = jax.random.split(jax.random.fold_in(state.key, PICTURES), TASKS)
    steps, losses = losses_by_step(algorithm, eta, tasks, keys)
    figure, (ax,) = row_of_panels(1)
    ax.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8)
    ax.plot(steps, losses.mean(1), color="C0", marker="o", label=f"mean of {TASKS} tasks")
    ax.set(xlabel="inner step", ylabel="loss on the query set", xticks=steps)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    drawn = {"adaptation.png": figure}
    episode = jax.eval_shape(lambda: tasks.sample(keys[0]))
    inputs = jax.tree.leaves(episode.query)[0]
    if inputs.ndim == 2 and inputs.shape[1] == 1 and len(jax.tree.leaves(episode.query)) == 2:
        drawn["functions.png"] = _functions(algorithm, eta, tasks, keys[:FUNCTIONS])
    return drawn


def losses_by_step(
    algorithm: Algorithm, eta: Any, tasks: Tasks, keys: jax.Array
) -> tuple[list[int], np.ndarray]:
    """Return (numbers of inner steps, ascending from 0; outer losses [numbers, tasks])."""

    def before(key: jax.Array) -> jax.Array:
        unroll = draw_task(algorithm, tasks, key).unroll
        return unroll.loss(eta, unroll.init(eta))[0]

    drawn = draw_task(algorithm, tasks, keys[0])
    most = horizon(jax.eval_shape(drawn.batches))
    steps = sorted({round(n) for n in np.geomspace(1, most, POINTS)})
    losses = [jax.jit(jax.vmap(before))(keys)]
    for step in steps:

        def after(key: jax.Array, step: int = step) -> jax.Array:
            return task_metrics(algorithm, eta, tasks, key, step)["loss"]

        losses.append(jax.jit(jax.vmap(after))(keys))
    return [0, *steps], np.asarray(jnp.stack(losses))


def _functions(algorithm: Algorithm, eta: Any, tasks: Tasks, keys: jax.Array) -> Any:
    """Draw regressions of one number on one number, before and after adaptation."""
    figure, axes = row_of_panels(len(keys))
    for ax, key in zip(axes, keys, strict=True):
        (x, y), (inputs, targets) = tasks.sample(key)
        learner = algorithm.adapt(eta, (x, y), key)
        grid = np.linspace(float(inputs.min()), float(inputs.max()), 100)[:, None]
        unroll = draw_task(algorithm, tasks, key).unroll
        start = algorithm.trained(eta, unroll.init(eta))
        before = algorithm.predict(*start, jnp.asarray(grid, inputs.dtype), learner.key)
        after = learner.predict(jnp.asarray(grid, inputs.dtype))
        ax.plot(inputs, targets, "o", color="gray", markersize=4, label="query set")
        ax.plot(grid, before, color="C1", linestyle="--", label="before")
        ax.plot(grid, after, color="C0", label=f"after {learner.steps} inner steps")
        ax.plot(x, y, "k^", label="support set")
        ax.set(xlabel="input", ylabel="output")
    axes[0].legend(fontsize="small")
    return figure


def rates(
    trainer: Trainer, state: TrainState, tasks: Tasks, workdir: pathlib.Path
) -> dict[str, Any]:
    """Draw the learned rates of every parameter of the model."""
    del tasks, workdir
    log_rates = trainer.learned(state)
    values = [np.exp(np.asarray(leaf, float)).ravel() for leaf in jax.tree.leaves(log_rates)]
    figure, (ax,) = row_of_panels(1, height=1 + 0.3 * len(values))
    ax.boxplot(values[::-1], orientation="horizontal", showfliers=False, whis=(5, 95))
    ax.set(xscale=scale(np.concatenate(values)))
    ax.set(xlabel="learned rate: median, quartiles, 5% and 95%")
    ax.set_yticks(range(1, len(values) + 1), paths(log_rates)[::-1], fontsize="small")
    ax.grid(alpha=0.3, axis="x")
    return {"rates.png": figure}


def weights(
    trainer: Trainer, state: TrainState, tasks: Tasks, workdir: pathlib.Path
) -> dict[str, Any]:
    """Draw the weights that examples or tokens have once the model of a task is trained.

    Of the query set, clean and corrupted, where the tasks flag which is which; else of the
    support set, by source.
    """
    del workdir
    algorithm: Any = trainer.algorithm
    eta, key = trainer.learned(state), jax.random.fold_in(state.key, PICTURES)
    episode: Any = tasks.sample(key)
    support, query = algorithm.support_set(episode.support), episode.query
    learner = algorithm.adapt(eta, support, key)

    @jax.jit
    @jax.vmap
    def of_batch(batch: Any) -> jax.Array:
        losses = algorithm.losses_of(learner.predict(batch.inputs), batch)
        return jnp.broadcast_to(algorithm.weights(eta, losses, batch), losses.shape)

    if len(query) > 2 and query.corrupted is not None:  # (inputs, targets) have no flags
        values = np.asarray(of_batch(jax.tree.map(lambda leaf: leaf[None], query)))[0]
        flags = np.asarray(query.corrupted)
        groups = {"clean": values[~flags], "corrupted": values[flags]}
    else:
        groups = by_source(np.asarray(of_batch(support)), support.source)
    figure, (ax,) = row_of_panels(1)
    low = min(group.min() for group in groups.values())
    high = max(group.max() for group in groups.values())
    bins = np.linspace(low, max(high, low + 1e-6), 40)
    for name, group in groups.items():
        ax.hist(group.ravel(), bins, alpha=0.6, density=True, label=name)
    ax.set(xlabel="weight", ylabel="density")
    ax.legend(fontsize="small")
    return {"weights.png": figure}


def data_weights(
    trainer: Trainer, state: TrainState, tasks: Tasks, workdir: pathlib.Path
) -> dict[str, Any]:
    """Draw how many examples have which weight."""
    del tasks, workdir
    values = np.asarray(trainer.learned(state), float).ravel()
    figure, (ax,) = row_of_panels(1)
    ax.hist(values, 40)
    ax.set(xlabel="weight", ylabel="examples")
    return {"weights.png": figure}


def by_source(values: np.ndarray, source: Any) -> dict[str, np.ndarray]:
    """Return the weights of each source, or the mean of each where there are many.

    Args:
      values: [T, batch, S].
      source: [T, batch] int; None: there is one.
    """
    if source is None:
        return {"all examples": values}
    sources = np.asarray(source)
    groups = {f"source {n}": values[sources == n] for n in np.unique(sources)}
    if len(groups) <= SOURCES:
        return groups
    means = np.array([group.mean() for group in groups.values()])
    return {f"means of {len(groups)} sources": means}


def updates(
    trainer: Trainer, state: TrainState, tasks: Tasks, workdir: pathlib.Path
) -> dict[str, Any]:
    """Draw the update of a parameter at 0 by its gradient, when the same gradient comes again."""
    del tasks, workdir
    algorithm: Any = trainer.algorithm
    optimizer = algorithm.rule.optimizer(trainer.learned(state))
    grads = jnp.linspace(-1.0, 1.0, 101)
    params = jnp.zeros_like(grads)
    slots = optimizer.init(params)
    figure, (ax,) = row_of_panels(1)
    for step in range(1, 31):
        update, slots = optimizer.update(grads, slots, params)
        if step in (1, 3, 10, 30):
            ax.plot(grads, update, label=f"step {step}")
    ax.set(xlabel="gradient", ylabel="update")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    return {"updates.png": figure}


def scale(values: Any) -> str:
    """Return "log" if the finite values are positive and span orders of magnitude."""
    finite = np.asarray(values, float)[np.isfinite(values)]
    wide = finite.size and finite.min() > 0 and finite.max() > LOG_RATIO * finite.min()
    return "log" if wide else "linear"


def row_of_panels(columns: int, height: float = 4.0) -> tuple[Any, Any]:
    """Return (a figure, its panels side by side)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]
