"""The norm of the tangents along a trajectory: whether a hypergradient explodes, and where.

The hypergradient of the next outer step is taken once more, by forward mode. Coordinates are
those of eta, so that the tangent of a learning rate in log space is of a relative change.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from metalearn import Forward, Tasks, Trainer
from metalearn.algorithms import FDS
from metalearn.train_state import TrainState


def norms(trainer: Trainer, state: TrainState, tasks: Tasks) -> dict[str, np.ndarray]:
    """Return the norms along the trajectory, {"name/window": [T]}, zero before a window begins."""
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
    seen = forward.look(state.eta, tasks, forward.task_keys(state)[0]).inner.tangent_norm
    in_order = sorted(names, key=lambda pair: pair[0])  # as they come into play; stable
    return {
        name: line for (_, name), line in zip(in_order, np.asarray(seen, float).T, strict=False)
    }


def figure(lines: dict[str, np.ndarray], step: int) -> Any:
    """Draw a panel for each hyperparameter, a line for each window, of an outer step."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(line.rpartition("/")[0] for line in sorted(lines)))
    found = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    found.suptitle(f"outer step {step}")
    places = found.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for place, name in zip(places, names, strict=True):
        for line, values in sorted(lines.items()):
            if line.rpartition("/")[0] == name:
                shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
                place.plot(np.arange(1, len(shown) + 1), shown, label=line.rpartition("/")[2])
        place.set(xlabel="inner step", yscale="log", title=name)
        place.legend(title="window", fontsize="small")
    places[0].set_ylabel("norm of the tangent")
    return found


def table(lines: dict[str, Any], step: int) -> list[str]:
    """Return a Markdown table: the largest norm of each line, where it is, and the last."""
    rows = [f"Outer step {step}:", ""]
    rows += ["| tangent of | largest norm | at inner step | last norm |", "|---" * 4 + "|"]
    for name, values in sorted(lines.items()):
        at = int(np.argmax(np.where(np.isnan(values), np.inf, values)))
        rows.append(f"| {name} | {values[at]:.3g} | {at + 1} | {values[-1]:.3g} |")
    return rows
