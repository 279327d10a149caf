"""Few-shot learning on Omniglot: the packaged methods, each by the protocol of its paper.

    python -m metalearn.experiments.benchmarks.few_shot --list
    python -m metalearn.experiments.benchmarks.few_shot --methods=protonet --tasks=5w1s --seeds=0

Tasks are 5-way and 20-way, with 1 and 5 shots. A method has the network, the inner loop, the outer
optimizer, the number of steps and the tasks of its paper where they differ (`METHODS`); the split
too, "maml" (1,100 + 100 characters, 423 to test) or "vinyals". Every quarter turn of a character is
a class of its own; tasks of 20 ways of MAML and the methods built on it have one turn at most of
each. The score is the accuracy on 1,000 test tasks, with its 95% interval over tasks; over seeds it
is Student's interval of their means.

A test task of MAML has as many queries a class as shots, as in its published code; so have, without
a look at theirs, the methods after it. The others have 15. It matters where queries are normalised
by statistics of their own: MAML that was trained on five queries is better at five than at 75.
`--queries=15` tests the same trained runs on such tasks, and `--split=validation` on classes of
validation, which are what to look at as long as a run or a setting may change. `--eval_steps=5`
adapts by as many inner steps, and `--last` judges the last iterate where a protocol averages them.

`--steps` cuts the runs short: the score then stands beside the share of the paper's steps that was
taken, and is no reproduction. A run is saved as it goes, and gone on from by the same command, or
by one with more steps: no schedule depends on `--steps`. A finished one is a row in
WORKDIR/rows.jsonl and is not run again. The table has the published number beside ours; `--list`
prints it and runs nothing. The papers' lengths are for a GPU, or for days.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn import Algorithm, MetaGradient, MixedFlow, Reverse, Trainer
from metalearn._utils import strict_json
from metalearn._utils.checks import pick
from metalearn.algorithms import MAML, R2D2, MAMLPlusPlus, ProtoNet, Reptile
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets import FewShot, omniglot
from metalearn.experiments.benchmarks.reporting import interval
from metalearn.experiments.build import key_of
from metalearn.models import Linen, Model, train_flag
from metalearn.models.linen_networks import ConvNet
from metalearn.optimizers import averaged

TASKS = {"5w1s": (5, 1), "5w5s": (5, 5), "20w1s": (20, 1), "20w5s": (20, 5)}  # ways, shots
QUERIES = 15  # a class, of test tasks; see `Protocol.test_queries`
TEST_TASKS = 1000
SPLITS = ("test", "validation")
DEFAULTS = {"split": "test", "eval_steps": None, "last": False}  # of a row; the table marks others
IMAGE = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)


class Protocol(NamedTuple):
    """How a paper trains a method on tasks of some ways and shots.

    Args:
      algorithm: that is trained.
      optimizer: of the outer loop.
      steps: outer steps.
      tasks_per_step: tasks of an outer step.
      ways: classes of a task to train on.
      shots: support examples per class of a task to train on.
      queries: query examples per class of a task to train on.
      partition: of Omniglot's characters: "maml" or "vinyals".
      engine: an exact one.
      test_queries: query examples per class of a test task.
      variants: 4: a task has one quarter turn at most of a character, as in MAML's published code;
        1: the turns are classes like others.
    """

    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    steps: int
    tasks_per_step: int
    ways: int
    shots: int
    queries: int
    partition: str = "maml"
    engine: MetaGradient = Reverse()
    test_queries: int = QUERIES
    variants: int = 1

    def omniglot(self, split: str, ways: int, shots: int, queries: int) -> FewShot:
        """Return tasks of a split, "train", "validation" or "test"."""
        return FewShot.create(
            omniglot(split, partition=self.partition),
            ways=ways,
            shots=shots,
            queries=queries,
            variants=self.variants,
        )


class Method(NamedTuple):
    """A method of the literature.

    Args:
      paper: arXiv number.
      protocol: ways, shots -> how it is trained.
      published: accuracies in per cent of "5w1s", "5w5s", "20w1s" and "20w5s"; None: not in it.
      note: what differs from the paper.
    """

    paper: str
    protocol: Callable[[int, int], Protocol]
    published: tuple[float | None, ...]
    note: str = ""


def network(outputs: int | None, pool: bool = False, convolution: str = "auto") -> Model:
    """Return four blocks of 64 filters; without outputs an embedding."""
    return Linen(ConvNet(outputs, pool=pool, convolution=convolution), IMAGE, train_flag)


def _embedding() -> Model:
    """Return the network of metric learners, whose kernels no task adapts: "lax" is faster."""
    return network(None, pool=True, convolution="lax")


def _maml(ways: int, shots: int) -> Protocol:
    """MAML; with 20 ways judged at the average of the last 2,000 iterates, after ten inner steps.

    The published code evaluates ten, at the last iterate; the paper says five.
    """
    if ways == 5:
        return _maml_with(ways, shots)
    protocol = _maml_with(ways, shots, eval_steps=10)
    return protocol._replace(optimizer=averaged(protocol.optimizer, 1 - 1 / 2000))


def _maml_with(ways: int, shots: int, **options: Any) -> Protocol:
    """MAML: one step of 0.4 and three in evaluation; with 20 ways five steps of 0.1.

    The inner loss of the published code is a sum over the classes: 0.1 of it is 2.0 of the mean,
    which the tasks of 20 ways have, with one turn of a character a task. Those of 5 ways are as
    they were run: 0.4 of the mean, and all turns are classes.
    """
    few = ways == 5
    inner = {"inner_steps": 1, "eval_steps": 3} if few else {"inner_steps": 5}
    rate = 0.4 if few else 0.1 * ways
    defaults = {"optimizer": optax.sgd(rate), **inner}
    algorithm = MAML(network(ways), **{**defaults, **options})
    sizes = 60_000, 32 if few else 16, ways, shots, shots
    engine = Reverse() if algorithm.inner_steps == 1 else MixedFlow()  # the faster one
    variants = 1 if few else 4
    return Protocol(
        *(algorithm, optax.adam(1e-3), *sizes),
        engine=engine,
        test_queries=shots,
        variants=variants,
    )


def _first_order(ways: int, shots: int) -> Protocol:
    return _maml_with(ways, shots, first_order=True)


def _anil(ways: int, shots: int) -> Protocol:
    rate = optax.sgd(0.4 if ways == 5 else 0.1)
    return _maml_with(ways, shots, adapted="head", optimizer=rate, inner_steps=5, eval_steps=5)


def _meta_sgd(ways: int, shots: int) -> Protocol:
    rates = {"optimizer": optax.sgd(1.0), "learned_rates": 0.1}
    return _maml_with(ways, shots, **rates, inner_steps=1, eval_steps=1)


def _imaml(ways: int, shots: int) -> Protocol:
    steps = 16 if ways == 5 else 25
    inner = {"optimizer": optax.sgd(0.1), "inner_steps": steps, "eval_steps": steps}
    return _maml_with(ways, shots, proximal=2.0, **inner)


def _maml_plus_plus(ways: int, shots: int) -> Protocol:
    """MAML++: five steps, 150 epochs of 500 outer steps, the loss of all steps in the first ten."""
    epoch, steps = 500, 75_000
    algorithm = MAMLPlusPlus(
        network(ways), rate=0.1, inner_steps=5, multi_step=10 * epoch, per_step="norm"
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps, 0.01))
    tasks = 16 if ways == 5 else 8
    sizes = steps, tasks, ways, shots, shots
    return Protocol(algorithm, optimizer, *sizes, engine=MixedFlow(), test_queries=shots)


def _reptile(ways: int, shots: int) -> Protocol:
    """Reptile: Adam without momentum on mini-batches of ten shots, SGD from 1 to 0 outside."""
    few = ways == 5
    inner_steps, batch, steps = (5, 10, 100_000) if few else (10, 20, 200_000)
    algorithm = Reptile(
        network(ways),
        optimizer=optax.adam(1e-3 if few else 5e-4, b1=0.0),
        inner_steps=inner_steps,
        eval_steps=50,
        batch=batch,
        eval_batch=5 if few else 10,
    )
    optimizer = optax.sgd(optax.linear_schedule(1.0, 0.0, steps))
    return Protocol(algorithm, optimizer, steps, 5, ways, 10, 5)


def _protonet(ways: int, shots: int) -> Protocol:
    """ProtoNet: 60 classes a task to train on, Adam whose rate halves every 2,000 tasks."""
    rate = optax.exponential_decay(1e-3, 2000, 0.5, staircase=True)
    algorithm = ProtoNet(_embedding(), 60)
    return Protocol(algorithm, optax.adam(rate), 20_000, 1, 60, shots, 5, "vinyals")


def _r2d2(ways: int, shots: int) -> Protocol:
    rate = optax.exponential_decay(5e-3, 2000, 0.5, staircase=True)
    algorithm = R2D2(_embedding(), 60)
    return Protocol(algorithm, optax.adam(rate), 20_000, 1, 60, shots, 5, "vinyals")


METHODS = {
    "maml": Method(
        "1703.03400",
        _maml,
        (98.7, 99.9, 95.8, 98.9),
        "5-way: 0.4 of the mean loss, turns are classes; the paper's code: of the sum, one turn; "
        "20-way: ten inner steps in evaluation, as in that code (the paper: five), and the average "
        "of the last 2,000 iterates (the paper: the last)",
    ),
    "first_order_maml": Method(
        "1703.03400", _first_order, (98.3, 99.2, 89.4, 97.9), "published in 1803.02999"
    ),
    "anil": Method("1909.09157", _anil, (None, None, 96.2, 98.0)),
    "meta_sgd": Method("1707.09835", _meta_sgd, (99.53, 99.93, 95.93, 98.97)),
    "maml_plus_plus": Method(
        "1810.09502",
        _maml_plus_plus,
        (99.47, 99.85, 97.65, 99.33),
        "the paper has another split of characters",
    ),
    "imaml": Method(
        "1909.04630",
        _imaml,
        (99.16, 99.67, 94.46, 98.69),
        "the exact derivative of the loop; the paper: implicit, and another inner rate",
    ),
    "reptile": Method("1803.02999", _reptile, (97.68, 99.48, 89.43, 97.12), "transduction"),
    "protonet": Method(
        "1703.05175",
        _protonet,
        (98.8, 99.7, 96.0, 98.9),
        "batch statistics of support and query set apart; the paper: of both together, and running "
        "ones in the end",
    ),
    "r2d2": Method(
        "1805.08136",
        _r2d2,
        (None, None, None, None),
        "four blocks of 64 filters; the paper: 96, 192, 384 and 512, of two blocks",
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the benchmark: a method on tasks of one kind, with one seed.

    Args:
      method: a name of `METHODS`.
      tasks: a name of `TASKS`.
      seed: of the initial eta, of all tasks and of the test tasks.
      steps: outer steps; None: those of the paper.
      queries: query examples per class of a test task; None: those of the protocol.
      split: whose classes the test tasks have: "test" or "validation".
      eval_steps: inner steps in evaluation; None: those of the protocol.
      last: judge the last iterate, whatever the protocol averages.
    """

    method: str
    tasks: str
    seed: int
    steps: int | None = None
    queries: int | None = None
    split: str = "test"
    eval_steps: int | None = None
    last: bool = False

    def __post_init__(self) -> None:
        pick(METHODS, self.method, "method")
        pick(TASKS, self.tasks, "kind of task")
        pick(dict.fromkeys(SPLITS), self.split, "split")
        if self.eval_steps is not None and not hasattr(self.protocol.algorithm, "eval_steps"):
            raise ValueError(
                f"{self.method} adapts without inner steps, so it has no --eval_steps to set."
            )

    @property
    def protocol(self) -> Protocol:
        """How the paper trains it, with the network and the algorithm."""
        return METHODS[self.method].protocol(*TASKS[self.tasks])

    @property
    def test_queries(self) -> int:
        """Query examples per class of a test task."""
        return self.protocol.test_queries if self.queries is None else self.queries

    @property
    def outer_steps(self) -> int:
        """Outer steps to train."""
        return self.protocol.steps if self.steps is None else self.steps

    def identity(self) -> dict[str, Any]:
        """Return what distinguishes the row."""
        settings = {"steps": self.outer_steps, "queries": self.test_queries}
        judged = {name: getattr(self, name) for name in DEFAULTS}
        return {**self.training(), **settings, **judged}

    def training(self) -> dict[str, Any]:
        """Return what distinguishes the training; a run may be gone on from with more steps."""
        return {"method": self.method, "tasks": self.tasks, "seed": self.seed}

    def row(self, folder: pathlib.Path) -> dict[str, Any]:
        """Train, or go on training, and return the test accuracy with its half-interval."""
        protocol = self.protocol
        trainer = Trainer(
            protocol.algorithm,
            protocol.engine,
            protocol.optimizer,
            tasks_per_step=protocol.tasks_per_step,
        )
        tasks = protocol.omniglot("train", protocol.ways, protocol.shots, protocol.queries)
        name = "-".join(str(value) for value in self.training().values())
        checkpoints = Checkpoints(folder / name, self.training(), every=500)
        try:
            state = trainer.fit(
                tasks, self.outer_steps, key=key_of(self.seed), checkpoints=checkpoints
            )
        finally:
            checkpoints.close()
        if (taken := int(state.step)) != self.outer_steps:
            raise ValueError(
                f"The run in {folder / name} has already taken {taken:,} outer steps, and --steps "
                f"asks for {self.outer_steps:,}. Choose as many at least, or another --workdir."
            )
        accuracy = self.test(trainer, state.eta if self.last else trainer.learned(state))
        return {**self.identity(), "accuracy": accuracy.mean, "half_width": accuracy.ci95}

    def test(self, trainer: Trainer, eta: Any) -> Any:
        """Return the accuracy on test tasks, an `Estimate`."""
        ways, shots = TASKS[self.tasks]
        tasks = self.protocol.omniglot(self.split, ways, shots, self.test_queries)
        algorithm: Any = trainer.algorithm
        if algorithm.own_head:  # it may be trained on tasks of more classes
            algorithm = dataclasses.replace(algorithm, ways=ways)
        if self.eval_steps is not None:
            algorithm = dataclasses.replace(algorithm, eval_steps=self.eval_steps)
        trainer = dataclasses.replace(trainer, algorithm=algorithm, tasks_per_step=20)
        key = jax.random.fold_in(key_of(self.seed), 1)
        return trainer.evaluate(eta, tasks, key, TEST_TASKS)["accuracy"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of results beside the published ones, in per cent."""
    lines = [
        "| method | tasks | queries | published | ours | seeds | steps, of the paper's | differs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, method), kind in ((m, k) for m in METHODS.items() for k in TASKS):
        protocol = method.protocol(*TASKS[kind])
        published = method.published[list(TASKS).index(kind)]
        found = [row for row in rows if (row["method"], row["tasks"]) == (name, kind)]
        settings: list[Any] = sorted({_settings(row) for row in found})
        for steps, queries, judged in settings or [(None, protocol.test_queries, "")]:
            same = [row for row in found if _settings(row) == (steps, queries, judged)]
            taken = "-" if steps is None else f"{steps:,} of {protocol.steps:,}"
            ours = _accuracy(same) + judged if same else "not run"
            paper = "-" if published is None else f"{published}"
            cells = f"{name} ({method.paper})", kind, str(queries), paper
            row = [*cells, ours, str(len(same)), taken, method.note]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _settings(row: dict[str, Any]) -> tuple[int, int, str]:
    """Return what rows of one method and kind of task may differ in, but for the seed."""
    words = {
        "split": str(row["split"]),
        "eval_steps": f"{row['eval_steps']} steps",
        "last": "last iterate",
    }
    marks = [word for name, word in words.items() if row[name] != DEFAULTS[name]]
    return row["steps"], row["queries"], f" ({', '.join(marks)})" if marks else ""


def _accuracy(rows: Sequence[dict[str, Any]]) -> str:
    """Return the mean over seeds; of one seed the interval is that over its test tasks."""
    if len(rows) > 1:
        return interval([100 * row["accuracy"] for row in rows], 2)
    return f"{100 * rows[0]['accuracy']:.2f} +- {100 * rows[0]['half_width']:.2f}"


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the finished runs of a file of rows."""
    if not path.exists():
        return []
    rows = [strict_json.loads(line) for line in path.read_text().splitlines() if line]
    return [{**DEFAULTS, **_before(row), **row} for row in rows]


def _before(row: dict[str, Any]) -> dict[str, Any]:
    """Return how a row was judged that was written before rows said it."""
    of_20_ways = row.get("method") == "maml" and row.get("tasks") in ("20w1s", "20w5s")
    return {"eval_steps": 5, "last": True} if of_20_ways else {}


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs that the command line asks for."""
    for method in arguments.methods.split(","):
        for kind in arguments.tasks.split(","):
            for seed in arguments.seeds.split(","):
                options = {name: getattr(arguments, name) for name in DEFAULTS}
                yield Run(method, kind, int(seed), arguments.steps, arguments.queries, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for and not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, help="outer steps; by default those of the paper")
    parser.add_argument("--queries", type=int, help="a class, of test tasks; see above")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--eval_steps", type=int, help="inner steps of the adaptation; see above")
    parser.add_argument("--last", action="store_true", help="judge the last iterate; see above")
    parser.add_argument("--workdir", default="runs/few_shot", type=pathlib.Path)
    parser.add_argument("--list", action="store_true", help="print the table, and run nothing")
    arguments = parser.parse_args(argv)
    path = arguments.workdir / "rows.jsonl"
    rows, wanted = read_rows(path), list(runs(arguments))
    for run in () if arguments.list else wanted:
        identity = run.identity()
        if any(identity.items() <= row.items() for row in rows):
            continue
        print(", ".join(f"{name} {value}" for name, value in identity.items()))
        rows.append(run.row(arguments.workdir))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(strict_json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
