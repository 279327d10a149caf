"""A learned optimizer from the command line: trained, exported, compared, its curves logged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Truncation
from metalearn.algorithms import PerParameter, PointwiseGRU, Streamed, load_optimizer
from metalearn.experiments import build, main
from metalearn.experiments.benchmarks import learned_optimizer as benchmark
from metalearn.experiments.commands import run
from metalearn.experiments.configs import learned_optimizer_digits, learned_optimizer_shakespeare
from metalearn.experiments.runs import load_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two outer steps: a network of two hidden units for an MLP of three."""
    workdir = tmp_path_factory.mktemp("learned") / "run"
    config = learned_optimizer_digits.get_config()
    config.model.hidden = (3,)
    config.algorithm.inner_steps, config.algorithm.batch, config.truncation.steps = 4, 8, 2
    config.algorithm.rule.hidden = (2,)
    config.dataset.most, config.dataset.validation = 40, 10
    config.steps, config.tasks_per_step, config.test_tasks = 2, 2, 2
    config.wandb.mode, config.health = "offline", False
    run.train(config, workdir, progress=False)
    return workdir


@pytest.mark.slow
def test_a_run_of_the_config_carries_inner_runs_and_reports_on_images_it_never_saw(workdir):
    restored = load_run(workdir)
    assert restored.trainer.truncation == Truncation(2)
    assert restored.state.inner.step.tolist() == [2, 4]  # the first began with half a horizon
    seen, unseen = (
        np.asarray(tasks.inputs) for tasks in (restored.splits.train, restored.splits.test)
    )
    assert len(seen) == len(unseen) == 40 and not (seen == unseen).all()
    report = json.loads((workdir / "test.json").read_text())
    assert {"loss", "training_loss_last", "validation_loss", "accuracy"} == report.keys()


def missing(config):
    raise FileNotFoundError("There is no such file.")


@pytest.mark.slow
def test_the_optimizer_of_a_run_is_exported_and_is_the_one_it_learned(workdir, capsys, monkeypatch):
    monkeypatch.setattr(build, "splits", missing)
    assert main.main(["metalearn", "export", f"--workdir={workdir}"]) == 0
    path = workdir / "optimizer.safetensors"
    assert capsys.readouterr().out == f"{path}: the optimizer of outer step 2.\n"
    restored = load_run(workdir)
    with pytest.raises(ValueError, match=r"dataset 'optimizer_runs' \(.*tfds='digits'"):
        restored.state  # noqa: B018 (its carried inner states have the shapes of the data)
    ours = restored.trainer.algorithm.rule.optimizer(restored.eta)
    params, grads = {"w": jnp.ones((3, 2))}, {"w": jnp.linspace(-1, 1, 6).reshape(3, 2)}
    expected, _ = ours.update(grads, ours.init(params), params)
    theirs = load_optimizer(path)
    updates, _ = theirs.update(grads, theirs.init(params), params)
    assert (updates["w"] == expected["w"]).all() and (updates["w"] != 0).all()
    optax.apply_updates(params, updates)


@pytest.mark.slow
def test_the_benchmark_writes_curves_a_picture_and_tables(workdir, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "RATES", (0.01, 0.1, 1e9))
    shown = []
    show = benchmark.WandbLogger.show
    monkeypatch.setattr(
        benchmark.WandbLogger, "show", lambda self, p: (shown.append(p), show(self, p))
    )
    arguments = [str(workdir), str(workdir), "--runs=2", "--setting", "as trained", "longer"]
    found = benchmark.main(arguments)
    assert [(c.setting, c.optimizer) for c in found[0]] == [
        (setting, name)
        for setting in ("as trained", "longer")
        for name in ("learned", "Adam", "SGD, momentum 0.9")
    ]
    assert [c.losses.shape for c in found[0]] == [(2, 4)] * 3 + [(2, 20)] * 3
    # The same starts and batches: before the first update all have the same loss.
    first = [c.losses[:, 0] for c in found[0][:3]]
    np.testing.assert_allclose(first[0], first[1])
    np.testing.assert_allclose(first[0], first[2])
    assert all(c.rate in (0.01, 0.1) for c in found[0] if c.optimizer != "learned")
    printed = capsys.readouterr().out
    assert "| as trained | Adam | 0." in printed and "Over 2 seeds:" in printed
    assert len((workdir / "curves.csv").read_text().splitlines()) == 1 + 3 * 2 * (4 + 20)
    assert (workdir / "curves.png").stat().st_size > 10_000
    assert shown == [{"curves": workdir / "curves.png"}] * 2
    logged = list(workdir.glob("wandb/offline-run-*/files/media/images/curves*.png"))
    assert len(logged) >= 1 and logged[0].stat().st_size > 10_000


def test_the_text_config_builds_a_streamed_problem_and_a_gru_if_asked():
    config = build.to_json(learned_optimizer_shakespeare.get_config())
    config["algorithm"]["rule"] |= {"network": "gru", "hidden": [4], "preconditioned": True}
    splits = build.Splits(None, None, None, jax.ShapeDtypeStruct((1, 64), jnp.int32), 256)
    learner = build.algorithm(config["algorithm"], build.model(config["model"], splits))
    assert isinstance(learner.problem, Streamed) and isinstance(learner.rule, PerParameter)
    assert learner.rule.network == PointwiseGRU(4) and len(learner.rule.factors) == 1
    assert learner.inner_steps == config["dataset"]["inner_steps"]
