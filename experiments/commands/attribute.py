"""`metalearn attribute`: what each training example is worth to the predictions of a trained model.

The config's training run (`data_weights`) is taken once, and the scores of all training examples
are computed for some of its query examples, each alone, and for all of them together
(`metalearn.algorithms.attribute`). In the workdir are then

    attribution.npz    scores [Q, examples], and of which query: rows of `queries`; what was read;
                       with --fraction the best examples, `kept` [k], and the lowest score among
                       them, `threshold`
    attribution.html   each query beside the examples that help and that harm it most
    attribution.json   with --validate: how well scores predict training without examples

Without a config the workdir is that of a trained `data_rater`, whose network scores every example
of the run's training data (`metalearn.experiments.commands.rate`): the same files, of one row.

--validate trains again without random examples, and prints the linear datamodelling score of the
scores, of gradient cosines and of losses.
"""

from __future__ import annotations

import io
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn import Tasks, Trainer
from metalearn._utils import disk, strict_json
from metalearn._utils.checks import at_least, pick
from metalearn._utils.readable import aligned
from metalearn.algorithms import (
    Attribution,
    DataRater,
    DataWeights,
    Selection,
    attribute,
    attribution_baselines,
    lds,
    leave_k_out,
    predicted_changes,
    top_fraction,
)
from metalearn.algorithms.data_weights.attribution import query_of
from metalearn.experiments import build
from metalearn.experiments.cli import import_paths
from metalearn.experiments.report import examples as shown
from metalearn.experiments.report.page import document, table
from metalearn.rows import take
from metalearn.tasks import draw_episode

NAME = "attribution"
MOST = 8  # examples of each kind beside a query
SHARE = 100  # of the examples are left out: one in so many
TOGETHER = -1  # the number of the query set of all queries


class Options(NamedTuple):
    """What is computed.

    Args:
      queries: query examples that have scores of their own, the first so many.
      split: whose run: "train", "validation" or "test".
      validate: whether to train again without examples.
      leave_out: how many examples each of these trainings is without; None: one in a hundred.
      trainings: how many.
      fraction: the share of the examples to keep, the best for all queries together; None: all.
    """

    queries: int = 8
    split: str = "train"
    validate: bool = False
    leave_out: int | None = None
    trainings: int = 100
    fraction: float | None = None


def run(config: Any, workdir: pathlib.Path, options: Options) -> dict[str, Any]:
    """Compute scores of a config, write them and their page, and return the validation.

    Raises:
      ValueError: for a config of another algorithm, or a split that the dataset has not.
    """
    plain = build.to_json(config)
    import_paths.remember(plain)
    at_least("attribute", 0, queries=options.queries)
    splits = build.splits(plain["dataset"])
    kinds = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    tasks = pick(kinds, options.split, "split")
    if tasks is None:
        raise ValueError(
            "This dataset has no validation split (dataset.held_out=0). Take --split=train, whose "
            "queries are examples that the run does not train on."
        )
    trainer = build.trainer(plain, splits, None)
    if isinstance(trainer.algorithm, DataRater):
        raise ValueError(
            "`metalearn attribute --config=` takes a training run of its own, and a 'data_rater' "
            "is trained first: `metalearn train --config=NAME --workdir=RUN`, and then `metalearn "
            "attribute --workdir=RUN`, without a config."
        )
    if not isinstance(trainer.algorithm, DataWeights):
        raise ValueError(
            f"`metalearn attribute` needs a config with the algorithm 'data_weights', which has a "
            f"weight for each training example, not {plain['algorithm']['name']!r}. Packaged: "
            "--config=data_weights_digits."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    key = build.key_of(plain["seed"])
    inputs, targets = (np.asarray(part) for part in query_of(tasks, key))
    count = min(options.queries, len(targets))
    sets = [(inputs[i : i + 1], targets[i : i + 1]) for i in range(count)] + [(inputs, targets)]
    numbers = np.array([*range(count), TOGETHER])
    began = time.perf_counter()
    scores = attribute(trainer, tasks, key, sets)
    seconds = time.perf_counter() - began
    selection = best_of(scores, options.fraction)
    write(workdir, scores, numbers, (inputs, targets), selection)
    validated = _validate(trainer, tasks, key, sets, scores, options) if options.validate else {}
    if validated:
        disk.write(workdir / f"{NAME}.json", strict_json.dumps(validated, indent=2) + "\n")
    page = _page(trainer.algorithm, tasks, key, (inputs, targets), scores, numbers, validated)
    disk.write(workdir / f"{NAME}.html", page)
    print(
        f"{workdir / NAME}.npz: scores {[*scores.scores.shape]} of {len(sets)} query sets in "
        f"{seconds:.1f} s, compilation included; {workdir / NAME}.html shows them."
        f"{said(selection, int((scores.reads > 0).sum()))}"
    )
    if validated:
        print("\n".join(_table(validated)))
    return validated


def best_of(found: Attribution, fraction: float | None) -> Selection | None:
    """Return the best share of the examples that were read, for all queries together."""
    if fraction is None:
        return None
    scores = found.scores[-1].reshape(found.scores.shape[1], -1).sum(-1)
    of_examples = len(scores) == len(found.reads)
    known = np.flatnonzero(found.reads) if of_examples else np.arange(len(scores))  # else groups
    selection = top_fraction(scores[known], fraction)
    return selection._replace(rows=known[selection.rows])


def said(selection: Selection | None, count: int) -> str:
    """Return a sentence: how many of `count` examples are kept, and from which score on."""
    if selection is None:
        return ""
    rows, threshold = selection
    return f" Kept: {len(rows):,} of {count:,} examples, of a score of {threshold:.3g} and above."


def write(
    workdir: pathlib.Path,
    found: Attribution,
    numbers: np.ndarray,
    queries: tuple[Any, Any],
    selection: Selection | None,
) -> None:
    """Write the scores into `attribution.npz`.

    Args:
      workdir: where.
      found: the scores.
      numbers: [Q], the query of each row of scores, or `TOGETHER`.
      queries: inputs and targets of the queries.
      selection: the examples that are kept; None: no choice was asked for.
    """
    inputs, targets = queries
    arrays = {
        "scores": found.scores,
        "losses": found.losses,
        "reads": found.reads,
        "rows": np.arange(found.scores.shape[1]),
        "queries": numbers,
        "query_inputs": inputs,
        "query_targets": targets,
    }
    if selection is not None:
        arrays |= {"kept": selection.rows, "threshold": np.asarray(selection.threshold)}
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    disk.write(workdir / f"{NAME}.npz", content.getvalue())


def _validate(
    trainer: Trainer,
    tasks: Tasks,
    key: jax.Array,
    sets: Sequence[Any],
    found: Attribution,
    options: Options,
) -> dict[str, Any]:
    """Return the linear datamodelling scores, of queries alone and of all together."""
    trained_on = int((found.reads > 0).sum())
    k = options.leave_out or max(trained_on // SHARE, 1)
    without = leave_k_out(trainer, tasks, key, sets, k=k, runs=options.trainings)
    cheap = attribution_baselines(trainer, tasks, key, sets)
    loss = np.broadcast_to(cheap.loss, (len(sets), len(cheap.loss)))
    rows = {}
    contenders = {"scores": found.scores, "gradient cosine": cheap.cosine, "final loss": loss}
    for name, values in contenders.items():
        predicted = predicted_changes(values, without.rows)
        parts = {"all queries": slice(-1, None)}
        if len(sets) > 1:
            parts = {"queries alone": slice(0, -1), **parts}
        rows[name] = {
            part: lds(predicted[:, which], without.changes[:, which])._asdict()
            for part, which in parts.items()
        }
    return {"left_out": k, "trainings": options.trainings, "of": trained_on, "lds": rows}


def _table(validated: Mapping[str, Any]) -> Sequence[str]:
    rows = validated["lds"]
    parts = list(next(iter(rows.values())))
    lines = [("linear datamodelling score", *parts)]
    for name, each in rows.items():
        lines.append((name, *(_interval(each[part]) for part in parts)))
    title = (
        f"Predicted and true change of the query loss, {validated['trainings']} trainings without "
        f"{validated['left_out']} of {validated['of']:,} examples each; 95% bootstrap intervals:"
    )
    return ["", title, *aligned(lines, left=1)]


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _page(
    algorithm: DataWeights,
    tasks: Tasks,
    key: jax.Array,
    queries: Any,
    found: Attribution,
    numbers: np.ndarray,
    validated: Mapping[str, Any],
) -> str:
    """Return the page: each query beside the examples that help and that harm it most."""
    support = draw_episode(tasks, key).support
    groups = None if algorithm.groups is None else np.asarray(algorithm.groups)
    parts = [
        "<h1>What training examples are worth</h1>",
        '<p class="note">The score of an example: by how much, to first order, the loss of the '
        "query rises if the run trains without it. Positive: it helps.</p>",
    ]
    if validated:
        header, *rows = [line.split("  ") for line in _table(validated)[2:]]
        parts.append(
            table([[cell.strip() for cell in row if cell.strip()] for row in (header, *rows)])
        )
    for place, number in enumerate(numbers.tolist()):
        scores = found.scores[place].reshape(len(found.scores[place]), -1).sum(-1)
        loss = f"loss {found.losses[place]:.3g}"
        if number == TOGETHER:
            parts.append(f"<h2>All {len(queries[1])} queries, {loss}</h2>")
        else:
            parts.append(f"<h2>Query {number}, {loss}</h2>")
            title = f"target {shown.label(queries[1][number])}"
            parts.append(shown.cards([(queries[0][number], title)]))
        order = np.argsort(scores, kind="stable")
        helpful = [row for row in order[::-1][:MOST] if scores[row] > 0]
        harmful = [row for row in order[:MOST] if scores[row] < 0]
        for words, units in (("Helps most", helpful), ("Harms most", harmful)):
            parts.append(f"<h3>{words}</h3>")
            if groups is not None:
                rows = [["group", "score"], *([str(u), f"{scores[u]:.3g}"] for u in units)]
                parts.append(table(rows))
                continue
            parts.append(shown.cards(cards_of(support, units, scores)))
    return document("What training examples are worth", parts)


def cards_of(support: Any, rows: Sequence[int], scores: np.ndarray) -> list[tuple[Any, str]]:
    """Return (input, caption) of some rows of a dataset."""
    if not len(rows):
        return []
    numbers = np.asarray(rows, np.int32)
    inputs, targets = (np.asarray(take(column, jnp.asarray(numbers))) for column in support[:2])
    return [
        (inputs[i], f"row {row}, target {shown.label(targets[i])}, {scores[row]:+.2g}")
        for i, row in enumerate(numbers.tolist())
    ]
