"""A finished run is read without its data, and from another folder than it was started in."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import metalearn
from metalearn.experiments import build, run_data
from metalearn.experiments.build import Sizes
from metalearn.experiments.cli.arguments import packaged
from metalearn.experiments.commands import run as commands
from tests.helpers.checkpoints import bits
from tests.helpers.command_line import call
from tests.helpers.config_cases import base
from tests.helpers.selection import quick
from tests.helpers.small_configs import skip_without, small

FOLDERS = ("train", "validation", "test")
DATASET = {
    "name": "image_folder",
    **{split: f"letters/{split}" for split in FOLDERS},
    **{"channels": 1, "ways": 2, "shots": 1, "queries": 2, "eval_queries": 2},
}


def draw(folder, seed):
    """Write two classes of four images, 8 x 8."""
    rng = np.random.default_rng(seed)
    for name in ("alpha", "beta"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with data, `letters`, and a run that was started in it, `runs/letters`."""
    folder = tmp_path_factory.mktemp("project")
    for seed, split in enumerate(FOLDERS):
        draw(folder / "letters" / split, seed)
    config = small("maml_digits", steps=1, eval_every=0, test_tasks=2, health=False)
    config.wandb.mode, config.engine = "disabled", "reverse"
    config.dataset = DATASET
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        commands.train(config, folder / "runs" / "letters", progress=False)
    return folder


@pytest.fixture
def workdir(project):
    return project / "runs" / "letters"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def without_data(project, elsewhere):
    """The data are renamed, and another folder is the current one."""
    (project / "letters").rename(project / "renamed")
    yield
    (project / "renamed").rename(project / "letters")


@pytest.mark.usefixtures("without_data")
@pytest.mark.slow
def test_a_run_is_exported_without_its_data(workdir):
    assert call("export", f"--workdir={workdir}", "--out=eta.safetensors") == 0
    run = metalearn.load_run(workdir)
    assert bits(metalearn.load_eta("eta.safetensors")["params"]) == bits(run.eta.params)


@pytest.mark.usefixtures("without_data")
def test_a_run_adapts_without_its_data(project, workdir, capsys):
    support, query = project / "renamed" / "test", project / "renamed" / "validation"
    words = (f"--support={support}", f"--query={query}", "--out=read.npz")
    assert call("adapt", f"--workdir={workdir}", *words) == 0
    assert "on the 8 labelled queries" in capsys.readouterr().out
    assert np.load("read.npz")["outputs"].shape == (8, 2)


@pytest.mark.usefixtures("without_data")
def test_a_run_is_read_in_python_without_its_data(workdir):
    run = metalearn.load_run(workdir)
    assert type(run.algorithm).__name__ == "MAML" and run.step == 1
    assert run.sizes.inputs.shape == (1, 8, 8, 1) and run.sizes.outputs == 2
    assert bits(run.trainer.restore(workdir).eta) == bits(run.state.eta)
    support = np.zeros((2, 8, 8, 1), np.float32), np.arange(2)
    learner = run.algorithm.adapt(run.eta, support, jax.random.key(0))
    assert learner.predict(support[0]).shape == (2, 2)


@pytest.mark.usefixtures("without_data")
def test_an_evaluation_names_the_data_that_are_missing(project, workdir, elsewhere, refused):
    message = refused("eval", f"--workdir={workdir}")
    names = ", ".join(f"{split}='letters/{split}'" for split in FOLDERS)
    assert message.startswith(
        f"The data of the run in {workdir} cannot be read: dataset 'image_folder' ({names}), from "
        f"the folder {project} or {elsewhere}. Evaluating and training need them; `run.eta`, "
        "`metalearn export` and `metalearn adapt` do not.\nThere is no folder"
    )


@pytest.mark.slow
def test_the_data_of_a_run_are_found_from_another_folder(workdir, elsewhere, capsys):
    assert call("eval", f"--workdir={workdir}", "--tasks=2") == 0
    assert "outer step 1, on test tasks" in capsys.readouterr().out
    run = metalearn.load_run(workdir)
    state = run.trainer.fit(run.splits.train, 2, state=run.state, progress=False)
    assert int(state.step) == 2 and os.getcwd() == str(elsewhere)


@pytest.mark.slow
def test_a_workdir_that_was_moved_with_its_data_reads_those_beside_it(
    project, workdir, elsewhere, monkeypatch
):
    copy = elsewhere / "copy"
    shutil.copytree(project, copy)
    shutil.rmtree(copy / "letters" / "test")
    draw(copy / "letters" / "test", seed=9)
    monkeypatch.chdir(copy)
    tests = [metalearn.load_run(at).splits.test for at in ("runs/letters", workdir)]
    (copied, original) = (tasks.sample(jax.random.key(0)).query[0] for tasks in tests)
    assert (copied != original).any()


def test_a_run_whose_workdir_says_nothing_of_its_data_reads_them(workdir, elsewhere, monkeypatch):
    old = elsewhere / "old"
    shutil.copytree(workdir, old)
    (old / run_data.FILE).unlink()
    with pytest.raises(ValueError, match=r"The workdir has no data.json that describes them, so"):
        metalearn.load_run(old)
    monkeypatch.chdir(workdir.parents[1])
    run = metalearn.load_run(old)
    assert run.sizes == metalearn.load_run(workdir).sizes and run.splits is run.tasks


@pytest.mark.parametrize("name", quick(packaged(), lambda name: name == "fds_digits"))
def test_a_packaged_config_is_built_from_what_its_workdir_says_of_the_data(name, tmp_path):
    config = build.to_json(base(name))
    skip_without(config["dataset"]["name"], config["dataset"].get("tfds"))
    splits = build.splits(config["dataset"])
    run_data.write(tmp_path, config["dataset"], splits.sizes)
    sizes = run_data.read(tmp_path, config["dataset"]).sizes
    assert sizes == splits.sizes
    shapes = build.trainer(config, sizes).shapes(carried=False)
    expected = build.trainer(config, splits).shapes(splits.train)
    assert shapes == dataclasses.replace(expected, inner=())


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"dataset": {"name": "another"}}',
        '{"inputs": {"shape": [-1], "dtype": "float32"}, "outputs": 2}',
        '{"inputs": {"shape": [1], "dtype": "no type"}, "outputs": 2}',
        '{"inputs": {"set": []}, "outputs": 2}',
        '{"inputs": 3, "outputs": 2}',
        '{"inputs": {"shape": [1], "dtype": "float32"}, "outputs": "2"}',
        '{"folder": "relative"}',
    ],
)
def test_a_damaged_description_of_the_data_counts_as_none(damage, tmp_path):
    values = {"dataset": {}, **json.loads(damage)} if damage[1:2] == '"' else damage
    (tmp_path / run_data.FILE).write_text(values if values is damage else json.dumps(values))
    known = run_data.read(tmp_path, {})
    assert known.sizes is None and known.folder is None


def test_sizes_of_nested_inputs_are_read_as_they_were_written(tmp_path):
    shape = jax.ShapeDtypeStruct((1, 3), "bfloat16")
    for inputs in (shape, {"a": (shape, [shape])}, ()):
        run_data.write(tmp_path, {}, Sizes(inputs, np.int64(4)))
        assert run_data.read(tmp_path, {}).sizes == Sizes(inputs, 4)
    run_data.write(tmp_path, {}, Sizes(np.ones(3), 4))  # values, which may matter
    assert run_data.read(tmp_path, {}).sizes is None


def test_the_workdir_describes_its_data_in_a_readable_file(project, workdir):
    assert json.loads((workdir / "data.json").read_text()) == {
        "dataset": json.loads((workdir / "config.json").read_text())["dataset"],
        "inputs": {"shape": [1, 8, 8, 1], "dtype": "float32"},
        "outputs": 2,
        "folder": str(project),
        "workdir": str(workdir),
    }
