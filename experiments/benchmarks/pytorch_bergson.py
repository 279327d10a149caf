"""The scores of `attribution.py` by `bergson`: its MAGIC trainer on a GPT-2, on CPUs.

Reads the files that `attribution.py` writes (the initial decoder, tokens.npz, adamw.json), trains,
and differentiates through the training with respect to a weight on each example, as `bergson magic`
does: states at every sqrt(T)-th step on disk (`save_mode="sqrt"`), the steps between two of them
taken again, one step at a time differentiated with a graph. Prints one JSON line, and writes the
scores to scores.npy.

This file imports nothing of the package, so that it can have an environment of its own:

    python -m venv .venv-bergson
    .venv-bergson/bin/pip install -r experiments/benchmarks/pytorch_bergson.lock
    python -m metalearn.experiments.benchmarks.attribution --bergson-python=.venv-bergson/bin/python

Reference: Ilyas and Engstrom 2025, arXiv:2504.16430 (MAGIC).
"""

import argparse
import functools
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torchopt
import transformers
from bergson.magic.cli import compute_query_gradients
from bergson.magic.data_stream import Dataset, DataStream  # Dataset: of Hugging Face
from bergson.magic.trainer import BackwardState, Trainer
from bergson.utils.math import weighted_causal_lm_ce
from torchopt.pytree import tree_iter

BATCH = 8
Times = tuple[float, float]  # wall-clock, and CPU time in all threads


def streams(folder: pathlib.Path) -> tuple[DataStream, DataStream]:
    """Return the training and the query examples."""
    tokens = np.load(folder / "tokens.npz")
    return tuple(
        DataStream(Dataset.from_dict({"input_ids": tokens[name].tolist()}), BATCH)
        for name in ("train", "query")
    )


def fresh(folder: pathlib.Path, adamw: dict[str, float]) -> tuple[Trainer, Any, Any]:
    """Return (trainer, state, model) before the first step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    model.loss_function = functools.partial(weighted_causal_lm_ce, reduction="mean")
    model.eval()
    model.requires_grad_(True)
    optimizer = torchopt.adamw(
        adamw["lr"],
        betas=(adamw["beta1"], adamw["beta2"]),
        eps=adamw["eps"],
        eps_root=adamw["eps_root"],
        weight_decay=adamw["decay"],
    )
    return *Trainer.initialize(model, optimizer), model


class Clock:
    """Times a block: `times` are its wall-clock and its CPU time in all threads."""

    def __enter__(self) -> "Clock":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        now = time.perf_counter(), time.process_time()
        self.times = now[0] - self._began[0], now[1] - self._began[1]


def train(folder: pathlib.Path, adamw: dict[str, float]) -> Times:
    """Return the time of the training alone."""
    stream, _ = streams(folder)
    trainer, state, _ = fresh(folder, adamw)
    with Clock() as clock:
        trainer.train(state, stream, inplace=True)
    return clock.times


def score(folder: pathlib.Path, adamw: dict[str, float]) -> tuple[Times, np.ndarray]:
    """Return the time of training and scores, and the scores [T * batch]."""
    stream, query = streams(folder)
    trainer, state, model = fresh(folder, adamw)
    with tempfile.TemporaryDirectory() as checkpoints, Clock() as clock:
        state = trainer.train(state, stream, inplace=True, save_dir=checkpoints, save_mode="sqrt")
        grads, _ = compute_query_gradients(state, model, query)
        stream.requires_grad = True
        zeros = [
            torch.zeros_like(leaf)
            for leaf in tree_iter(state.opt_state)
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        ]
        after = BackwardState(grads, zeros, torch.zeros_like(stream.weights))
        before = trainer.backward(checkpoints, stream, after, state, inplace=True, save_mode="sqrt")
    return clock.times, before.weight_grads.detach().numpy()


def peak_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch; its default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    adamw = json.loads((options.folder / "adamw.json").read_text())
    first, scores = score(options.folder, adamw)
    times, plains = [score(options.folder, adamw)[0]], []
    peak = peak_mib()
    train(options.folder, adamw)
    plains.append(train(options.folder, adamw))
    for _ in range(options.rounds - 1):
        times.append(score(options.folder, adamw)[0])
        plains.append(train(options.folder, adamw))
    np.save(options.folder / "scores.npy", scores)
    wall, cpu = (
        statistics.median(a[i] / b[i] for a, b in zip(times, plains, strict=True)) for i in (0, 1)
    )
    median = statistics.median(wall for wall, _ in times)
    numbers = {
        "plain": statistics.median(wall for wall, _ in plains),
        "seconds": median,
        "ratio": wall,
        "cpu_ratio": cpu,
        "compile": first[0] - median,
        "compile_cpu": first[1] - statistics.median(cpu for _, cpu in times),
        "peak_mib": peak,
        "torch": torch.__version__,
    }
    print(json.dumps(numbers, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
