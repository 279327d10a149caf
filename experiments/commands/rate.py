"""`metalearn attribute --workdir=RUN`: the score of every training example, by a trained DataRater.

The files are those of `metalearn.experiments.commands.attribute`, with one row of scores, those for
all queries together: what the rater has learned is what helps all of them.

    attribution.npz    scores [1, windows], `losses` NaN and `reads` -1, as no run is scored; with
                       --fraction `kept` [k] and `threshold`
    attribution.html   the examples with the highest and the lowest scores
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from metalearn._utils import disk
from metalearn.algorithms import Attribution, DataRater, rate_examples, top_fraction
from metalearn.algorithms.loss_weights.features import auc
from metalearn.datasets import HostText, Text
from metalearn.experiments.commands.attribute import (
    MOST,
    NAME,
    TOGETHER,
    cards_of,
    said,
    write,
)
from metalearn.experiments.report import examples as shown
from metalearn.experiments.report.page import document, escaped, table
from metalearn.experiments.runs import load_run

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def run(
    workdir: pathlib.Path, fraction: float | None = None, allow_imports: bool = False
) -> Attribution:
    """Score the training data of a run, and write the scores and their page beside it.

    Args:
      workdir: of a run of a `data_rater`.
      fraction: the share of the examples to keep; None: all.
      allow_imports: import what the run's config names by import path.

    Raises:
      ValueError: for a run of another algorithm, or whose data are no text.
    """
    trained = load_run(workdir, allow_imports=allow_imports)
    algorithm = trained.algorithm
    if not isinstance(algorithm, DataRater):
        raise ValueError(
            "`metalearn attribute` without --config scores the training data of a run by the "
            f"network of its 'data_rater', and the run in {workdir} is of "
            f"{trained.config['algorithm']['name']!r}. Pass a config with 'data_weights' for the "
            "scores of one training run, such as --config=data_weights_digits."
        )
    tasks = trained.splits.train
    if not isinstance(tasks, Text | HostText):
        raise ValueError(
            f"`metalearn attribute` scores the windows of a text, and the data of {workdir} are "
            f"{type(tasks).__name__}. In Python: `metalearn.algorithms.rate_examples(algorithm, "
            "eta, (inputs, targets))`."
        )
    windows: Any = tasks.windows()
    began = time.perf_counter()
    scores = rate_examples(algorithm, trained.eta, windows)
    seconds = time.perf_counter() - began
    # Losses and reads are of one training run, and a rater is learned from many.
    found = Attribution(scores[None], np.full(1, np.nan), np.full(len(scores), -1))
    selection = None if fraction is None else top_fraction(scores, fraction)
    none = windows.inputs[:0], windows.targets[:0]
    write(workdir, found, np.array([TOGETHER]), none, selection)
    order = np.argsort(-scores, kind="stable")
    levels = np.quantile(scores, QUANTILES)
    parts = [
        "<h1>What training examples are worth</h1>",
        '<p class="note">The score of an example by a DataRater: inner steps weighted the examples '
        "of a batch by a softmax of their scores.</p>",
        table([[f"{q:.0%}" for q in QUANTILES], [f"{level:.3g}" for level in levels]]),
        f"<p>{escaped(said(selection, len(scores)))}{_separation(scores, windows.corrupted)}</p>",
        "<h3>Highest scores</h3>",
        shown.cards(cards_of(windows, order[:MOST].tolist(), scores)),
        "<h3>Lowest scores</h3>",
        shown.cards(cards_of(windows, order[::-1][:MOST].tolist(), scores)),
    ]
    disk.write(workdir / f"{NAME}.html", document("What training examples are worth", parts))
    print(
        f"{workdir / NAME}.npz: scores of {len(scores):,} windows in {seconds:.1f} s, compilation "
        f"included; {workdir / NAME}.html shows them.{said(selection, len(scores))}"
    )
    return found


def _separation(scores: np.ndarray, corrupted: np.ndarray) -> str:
    """Return a sentence: how well scores tell clean from corrupted, where that is known."""
    if not corrupted.any() or corrupted.all():
        return ""
    area = float(auc(jnp.asarray(scores), jnp.asarray(~corrupted)))
    return (
        f" {corrupted.sum():,} of the windows are corrupted: the AUC of the scores is {area:.3f}."
    )
