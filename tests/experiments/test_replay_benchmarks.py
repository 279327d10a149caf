"""The benchmarks of replay compute what they say, at small sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import MixedFlow, Replay, Trainer
from metalearn.datasets.text import Text
from metalearn.experiments.benchmarks import attribution, host_fed, shakespeare
from metalearn.models.transformer import Architecture

pytestmark = pytest.mark.slow
KEY = jax.random.key(0)


@pytest.fixture
def small(monkeypatch):
    sizes = {"VOCABULARY": 32, "WIDTH": 8, "LAYERS": 2, "HEADS": 2, "LENGTH": 6, "BATCH": 3}
    for name, size in sizes.items():
        monkeypatch.setattr(attribution, name, size)


def test_every_contender_scores_the_examples_alike(small, tmp_path):
    steps = 4
    attribution.write_workload(tmp_path, steps)
    algorithm, tasks = attribution.workload(tmp_path, steps, "none")
    scores = {
        name: attribution.scoring(contender, algorithm, tasks)()
        for name, contender in attribution.contenders(2).items()
    }
    expected = scores.popitem()[1]
    assert expected.shape == (steps, 3) and (expected != 0).all()
    for others in scores.values():
        np.testing.assert_allclose(others, expected, rtol=1e-4, atol=1e-8)


def test_the_initial_decoder_and_the_tokens_come_back_from_their_files(small, tmp_path):
    attribution.write_workload(tmp_path, 4)
    algorithm, tasks = attribution.workload(tmp_path, 4, "none")
    inputs, targets, rows = tasks.episode.support
    assert inputs.shape == targets.shape == (12, 6) and tasks.episode.query[0].shape == (3, 6)
    order = attribution.rows_in_order(algorithm)
    assert sorted(order.reshape(-1).tolist()) == rows.tolist() == [*range(12)]
    read = np.load(tmp_path / "tokens.npz")["train"]
    np.testing.assert_array_equal(inputs[order].reshape(12, 6), read)  # as bergson reads them
    logits, _ = algorithm.model.apply(*algorithm.model.init(KEY), inputs[:3], train=False)
    assert logits.shape == (3, 6, 32) and jnp.isfinite(logits).all()


def test_a_contender_is_measured_in_one_line_of_json(small, tmp_path, capsys):
    attribution.write_workload(tmp_path, 2)
    attribution.measure("segments", tmp_path, steps=2, segment=1, rounds=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert set(attribution.strict_json.loads(line)) == {
        *("plain", "seconds", "ratio", "cpu_ratio", "compile", "compile_cpu", "peak_mib")
    }
    assert np.load(tmp_path / "scores.npy").shape == (2, 3)


def test_schedules_and_decays_have_the_derivative_of_central_differences(monkeypatch, tmp_path):
    monkeypatch.setattr(shakespeare, "DECAY", 10.0)  # in six steps a usual one does little
    steps, text = 6, "To be, or not to be, that is the question. " * 4
    sizes = {"length": 8, "inner_steps": steps, "batch": 2, "queries": 4}
    episode = Text.create(text, text, **sizes).sample(KEY)
    algorithm = shakespeare.Schedules(Architecture(256, 8, 2, heads=2), steps)
    tasks = attribution.OneTask(episode)
    replay = Replay(host=0, disk="1MiB", states=1, folder=tmp_path)
    trainer = Trainer(
        algorithm, MixedFlow(), optax.trace(0.0), tasks_per_step=1, segment=2, replay=replay
    )
    grads = trainer.step(trainer.init(KEY, tasks), tasks)[0].optimizer.trace
    loss = shakespeare.training(algorithm, tasks)
    v = shakespeare.direction(grads, 0)
    coarse, expected = (shakespeare.central_difference(loss, v, h) for h in (0.2, 0.05))
    assert abs((coarse - expected) / 15 / expected) < 0.02
    assert expected == pytest.approx(float(optax.tree.vdot(grads, v)), rel=0.02)
    for part in ("rate", "decay"):  # each of them counts
        other = {**v, part: jax.tree.map(jnp.zeros_like, v[part])}
        assert abs(float(optax.tree.vdot(grads, other)) / expected - 1) > 0.05


def test_a_replayed_run_on_a_file_is_that_of_one_program(monkeypatch, tmp_path):
    for name, size in {"INNER_STEPS": 20, "SEGMENT": 4, "BATCH": 8, "STATES": 1}.items():
        monkeypatch.setattr(host_fed, name, size)
    _, peak, difference = host_fed.replayed(tmp_path, 0.004)
    assert peak > 0 and difference < 1e-4
