"""The norms of the tangents along a trajectory, which show whether and where they explode.

The hypergradient of the next outer step is computed by forward mode. Tangents are with respect to
the coordinates of eta, so that of a learning rate in log space is for a relative change.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from metalearn import Forward, Tasks, Trainer
from metalearn.algorithms import FDS
from metalearn.train_state import TrainState


def norms(trainer: Trainer, state: TrainState, tasks: Tasks) -> dict[str, np.ndarray]:
    """Return the norm after each inner step, {"name/window": [T]}; zero before a window begins."""
    algorithm = trainer.algorithm
    assert isinstance(algorithm, FDS)
    names = [
        (begin, f"{name}/{window}")
        for name in sorted(state.eta)  # the order of its leaves
        for window, begin in enumerate(algorithm.edges(name)[:-1])
        for _ in range(state.eta[name][window].size)
    ]
    engine = trainer.engine if isinstance(trainer.engine, Forward) else Forward()
    exact = dataclasses.replace(engine, directions=None, inexact_decay=1.0)
    forward = dataclasses.replace(trainer, engine=exact)
    tangent_norms = forward.look(state.eta, tasks, forward.task_keys(state)[0]).inner.tangent_norm
    in_order = sorted(names, key=lambda pair: pair[0])  # by first step; stable
    return {
        name: line
        for (_, name), line in zip(in_order, np.asarray(tangent_norms, float).T, strict=False)
    }


def figure(lines: dict[str, np.ndarray], step: int) -> Any:
    """Return a figure with a panel per hyperparameter and a line per window."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(line.rpartition("/")[0] for line in sorted(lines)))
    drawn = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    drawn.suptitle(f"outer step {step}")
    axes = drawn.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for ax, name in zip(axes, names, strict=True):
        for line, values in sorted(lines.items()):
            if line.rpartition("/")[0] == name:
                positive = np.where(np.isfinite(values) & (values > 0), values, np.nan)
                ax.plot(np.arange(1, len(positive) + 1), positive, label=line.rpartition("/")[2])
        ax.set(xlabel="inner step", yscale="log", title=name)
        ax.legend(title="window", fontsize="small")
    axes[0].set_ylabel("norm of the tangent")
    return drawn


def table(lines: dict[str, Any], step: int) -> list[str]:
    """Return a Markdown table: the largest norm of each line, its inner step, and the last norm."""
    rows = [f"Outer step {step}:", ""]
    rows += ["| tangent of | largest norm | at inner step | last norm |", "|---" * 4 + "|"]
    for name, values in sorted(lines.items()):
        at = int(np.argmax(np.where(np.isnan(values), np.inf, values)))
        rows.append(f"| {name} | {values[at]:.3g} | {at + 1} | {values[-1]:.3g} |")
    return rows
