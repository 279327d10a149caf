"""A score for every training example, through a whole training run: beside `bergson`.

    python -m metalearn.experiments.benchmarks.attribution [--T 16 64] [--bergson-python=PYTHON]

A decoder (GPT-2's architecture: 4 layers, width 128, 4 heads, sequences of 64, a vocabulary of
4,096) is trained for T steps of AdamW on batches of 8, every example once. The derivative of its
mean loss on 8 held-out sequences with respect to a weight on each training example is the score of
the example, for all T * 8 at once (MAGIC, arXiv:2504.16430). `bergson` (EleutherAI, PyTorch) and
this package train the same model, whose initial weights and tokens are files that both read, and
compute the same scores; the largest difference is printed as a correlation.

Each contender has a process of its own. Its numbers are

    plain         seconds of the same training alone, in the same process
    seconds       training and scores, compiled or warm: the median, and in times of `plain`
    compile       what the first call takes longer, and that in CPU time
    peak          the largest resident memory of the process, imports and compilation included

Ratios are medians of the ratios within rounds, in which both programs run in turn; those in CPU
time tell as much on a machine that is busy with other things. bergson runs in an environment of its
own, with its defaults (states every sqrt(T) steps, on disk), set up by

    python -m venv .venv-bergson
    .venv-bergson/bin/pip install -r experiments/benchmarks/pytorch_bergson.lock

and is left out without `--bergson-python` ($METALEARN_BERGSON_PYTHON). Where PyTorch is a build for
CPUs, remove torchvision and torchaudio from it, which bergson asks for and does not import.

On jaxlib before 0.11 our contenders, and the plain training beside them, are compiled without XLA's
fusion emitters (`XLA_FLAGS`, unless it is set): the programs are as fast, and compiling them takes
three quarters of the time and 300 MiB less. `XLA_FLAGS= ` leaves them on.
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
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import safetensors.numpy

from metalearn import Episode, MetaGradient, MixedFlow, Replay, Reverse, Tasks, Trainer
from metalearn._utils import strict_json
from metalearn.algorithms import DataWeights
from metalearn.engines.inner_loop import inner_loop
from metalearn.models import Functions, load_hugging_face, with_params
from metalearn.tasks import draw_task
from metalearn.unroll import task_keys

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH, BATCH = 4096, 128, 4, 4, 64, 8
# eps_root: without it the derivative of Adam's square root at a gradient of zero is infinite.
ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "eps_root": 1e-8, "decay": 0.01}
KEY = 0


def config() -> dict[str, Any]:
    """Return the config.json of the decoder."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": LENGTH,
        "tie_word_embeddings": False,  # bergson trains the two ends of a tied embedding apart
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def write_workload(folder: pathlib.Path, steps: int, seed: int = 0) -> None:
    """Write the initial decoder as `save_pretrained` does, and tokens.npz.

    Tokens are those of a Markov chain in which 8 tokens may follow each: train [T * batch, S], and
    query [batch, S].
    """
    draw = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 0.02) -> np.ndarray:
        return (scale * draw.standard_normal(shape)).astype(np.float32)

    tensors = {
        "transformer.wte.weight": normal(VOCABULARY, WIDTH),
        "transformer.wpe.weight": normal(LENGTH, WIDTH),
        "lm_head.weight": normal(VOCABULARY, WIDTH),
    }
    norms = ["transformer.ln_f"]
    shrunk = 0.02 / (2 * LAYERS) ** 0.5
    for block in (f"transformer.h.{layer}" for layer in range(LAYERS)):
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        for name, rows, columns, scale in (
            ("attn.c_attn", WIDTH, 3 * WIDTH, 0.02),
            ("attn.c_proj", WIDTH, WIDTH, shrunk),
            ("mlp.c_fc", WIDTH, 4 * WIDTH, 0.02),
            ("mlp.c_proj", 4 * WIDTH, WIDTH, shrunk),
        ):
            tensors[f"{block}.{name}.weight"] = normal(rows, columns, scale=scale)
            tensors[f"{block}.{name}.bias"] = np.zeros(columns, np.float32)
    for norm in norms:
        tensors[f"{norm}.weight"] = np.ones(WIDTH, np.float32)
        tensors[f"{norm}.bias"] = np.zeros(WIDTH, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(strict_json.dumps(config()))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    followers = draw.integers(0, VOCABULARY, (VOCABULARY, 8))
    sequences = (steps + 1) * BATCH
    tokens = np.empty((sequences, LENGTH), np.int64)
    tokens[:, 0] = draw.integers(0, VOCABULARY, sequences)
    for i in range(1, LENGTH):
        tokens[:, i] = followers[tokens[:, i - 1], draw.integers(0, 8, sequences)]
    np.savez(folder / "tokens.npz", train=tokens[BATCH:], query=tokens[:BATCH])
    (folder / "adamw.json").write_text(strict_json.dumps(ADAMW))


def next_token(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (the mean loss of the tokens after the first (), no metrics)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean(), {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class OneTask(Tasks):
    """The same episode for every key."""

    episode: Episode

    def sample(self, key: jax.Array) -> Episode:
        """Return the episode."""
        return self.episode


class Contender(NamedTuple):
    """A way to compute the scores.

    engine: of the meta-gradient.
    options: of the `Trainer`.
    block: `Architecture.remat`.
    """

    engine: MetaGradient
    options: Mapping[str, Any] = {}
    block: str = "none"


def contenders(segment: int) -> dict[str, Contender]:
    """Return our contenders by name; `segment` is that of those that are cut."""

    def cut(**options: Any) -> Mapping[str, Any]:
        return {"segment": segment, "replay": Replay(host="2GiB", **options)}

    return {
        "one program, `MixedFlow('nested')`": Contender(MixedFlow("nested", peel=False)),
        "one program, `Reverse('segments')`": Contender(Reverse("segments")),
        "segments": Contender(MixedFlow(), cut()),
        "segments, inner gradients kept": Contender(MixedFlow(), cut(gradients="1GiB")),
    }


def workload(folder: pathlib.Path, steps: int, block: str) -> tuple[DataWeights, OneTask]:
    """Return the algorithm and its task from the files of `write_workload`.

    The sequences are stored in the order in which the run of `KEY` reads those of the files.
    """
    architecture, params = load_hugging_face(folder, remat=block)
    tokens = np.load(folder / "tokens.npz")
    train, query = (jnp.asarray(tokens[name], jnp.int32) for name in ("train", "query"))
    optimizer = optax.adamw(
        ADAMW["lr"],
        *(ADAMW["beta1"], ADAMW["beta2"], ADAMW["eps"], ADAMW["eps_root"]),
        weight_decay=ADAMW["decay"],
    )
    model = with_params(Functions(architecture.init, architecture.apply), params)
    algorithm = DataWeights(model, steps * BATCH, steps, BATCH, optimizer, next_token)
    rows = jnp.arange(steps * BATCH, dtype=jnp.int32)
    order = rows_in_order(algorithm)
    stored = jnp.zeros_like(train).at[order.reshape(-1)].set(train)
    support, query_rows = (stored, stored, rows), jnp.arange(BATCH, dtype=jnp.int32)
    return algorithm, OneTask(Episode(support, (query, query, query_rows)))


def rows_in_order(algorithm: DataWeights) -> jax.Array:
    """Return the rows that each step of the run reads, [T, batch]."""
    rows = jnp.arange(algorithm.examples, dtype=jnp.int32)
    steps = jnp.arange(algorithm.inner_steps, dtype=jnp.int32)
    key = task_keys(jax.random.key(KEY)).batches
    return algorithm.rows_at(Episode((None, None, rows), None), key, steps)


def plain_training(algorithm: DataWeights, tasks: OneTask) -> Callable[[], Any]:
    """Return a call of the training run alone, in one program."""
    key, constants = jax.random.key(KEY), algorithm.constants()

    def train(tasks: OneTask, constants: Any) -> Any:
        task = draw_task(algorithm.bind(constants), tasks, key)
        return inner_loop(task.unroll, algorithm.init(key), task.batches())[0]

    compiled = jax.jit(train)
    return lambda: jax.block_until_ready(compiled(tasks, constants))


def scoring(contender: Contender, algorithm: DataWeights, tasks: OneTask) -> Callable[[], Any]:
    """Return a call that trains and returns the scores [T, batch], in the order of the files."""
    trainer = Trainer(algorithm, contender.engine, tasks_per_step=1, **contender.options)
    key, eta, order = (
        jax.random.key(KEY),
        algorithm.init(jax.random.key(KEY)),
        rows_in_order(algorithm),
    )
    queries = jax.tree.map(lambda leaf: leaf[None], tasks.episode.query)
    return lambda: np.asarray(trainer.query_gradients(eta, tasks, key, queries)[0][0][order])


def seconds(call: Callable[[], Any]) -> float:
    """Return the time of a call."""
    return timed(call)[0]


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the time of a call, and its CPU time in all threads."""
    began = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def peak_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def measure(name: str, folder: pathlib.Path, steps: int, segment: int, rounds: int) -> None:
    """Print one JSON line of a contender, and write its scores to scores.npy."""
    contender = contenders(segment)[name]
    algorithm, tasks = workload(folder, steps, contender.block)
    call = scoring(contender, algorithm, tasks)
    first = timed(call)
    times = [timed(call)]
    peak = peak_mib()
    plain = plain_training(algorithm, tasks)
    plain()
    plains = [timed(plain)]
    for _ in range(rounds - 1):
        times.append(timed(call))
        plains.append(timed(plain))
    np.save(folder / "scores.npy", call())
    print(strict_json.dumps({**row(first, times, plains), "peak_mib": peak}))


Times = tuple[float, float]  # wall-clock, and CPU time in all threads


def row(first: Times, times: list[Times], plains: list[Times]) -> dict[str, float]:
    """Return the numbers of a contender."""
    wall, cpu = (
        statistics.median(a[i] / b[i] for a, b in zip(times, plains, strict=True)) for i in (0, 1)
    )
    median = statistics.median(wall for wall, _ in times)
    return {
        "plain": statistics.median(wall for wall, _ in plains),
        "seconds": median,
        "ratio": wall,
        "cpu_ratio": cpu,
        "compile": first[0] - median,
        "compile_cpu": first[1] - statistics.median(cpu for _, cpu in times),
    }


def run(
    command: list[Any], folder: pathlib.Path, **options: Any
) -> tuple[dict[str, float], np.ndarray]:
    """Return what a contender in a process of its own measures, and its scores [T * batch]."""
    command = [*map(str, command)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options)
    return strict_json.loads(done.stdout.splitlines()[-1]), np.load(folder / "scores.npy").reshape(
        -1
    )


def xla_flags() -> str:
    """Return XLA's flags for our contenders."""
    old = jaxlib.version.__version_info__ < (0, 11)  # later ones have no other emitters
    return "--xla_cpu_use_fusion_emitters=false" if old else ""


def compare(steps: int, segment: int, rounds: int, python: str | None) -> None:
    """Print a table of all contenders at one T."""
    rows, scores = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write_workload(folder, steps)
        options = [f"--folder={folder}", f"--rounds={rounds}"]
        if python is not None:
            script = pathlib.Path(__file__).with_name("pytorch_bergson.py")
            # Not this package's folders: `datasets` is Hugging Face's there.
            others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            outcome = run([python, script, *options], folder, env=others)
            rows["bergson"], scores["bergson"] = outcome
        own = [sys.executable, "-m", "metalearn.experiments.benchmarks.attribution", *options]
        environment = {"XLA_FLAGS": xla_flags(), **os.environ}
        for name in contenders(segment):
            one = [*own, f"--T={steps}", f"--segment={segment}", f"--measure={name}"]
            rows[name], scores[name] = run(one, folder, env=environment)
    print(f"\nT={steps}, segments of {segment}\n")
    columns = "/ plain", "in CPU time", "seconds", "plain", "compile", "in CPU time", "peak MiB"
    print(f"| | {' | '.join(columns)} | correlation |\n|{'---|' * (len(columns) + 2)}")
    reference = next(iter(scores))
    for name, got in rows.items():
        agreement = np.corrcoef(scores[name], scores[reference])[0, 1]
        print(
            f"| {name} | {got['ratio']:.2f} | {got['cpu_ratio']:.2f} | {got['seconds']:.2f} | "
            f"{got['plain']:.2f} | {got['compile']:.1f} | {got['compile_cpu']:.1f} | "
            f"{got['peak_mib']:.0f} | {agreement:.6f} |",
            flush=True,
        )


def main() -> None:
    """Compare, or measure one contender."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--T", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--segment", type=int, default=0, help="K; 0: T / 4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bergson-python", default=os.environ.get("METALEARN_BERGSON_PYTHON"))
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for steps in options.T:
        segment = options.segment or steps // 4
        if options.measure:
            measure(options.measure, options.folder, steps, segment, options.rounds)
        else:
            compare(steps, segment, options.rounds, options.bergson_python)
    if not options.measure:
        print(f"\n{os.cpu_count()} cores, jax {jax.__version__}")


if __name__ == "__main__":
    main()
