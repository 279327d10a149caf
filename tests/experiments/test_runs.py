"""A run is read back in one call, and what it learned goes out as a file."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import safe_open

import metalearn
from metalearn.models import Linen
from metalearn.models.linen_networks import MLP
from tests.helpers.checkpoints import bits
from tests.helpers.command_line import SINUSOID, call

pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "use_what_was_learned.md"
FREE = """
from metalearn.experiments.configs import maml_sinusoid


def get_config():
    config = maml_sinusoid.get_config()
    config.optimizer.name = "optax.contrib.schedule_free_sgd"
    config.optimizer.learning_rate, config.optimizer.schedule = 0.5, "constant"
    config.model.hidden = (3,)
    return config
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a run whose outer optimizer evaluates at another point than it trains at."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "free.py").write_text(FREE)
    options = [word for word in SINUSOID if not word.startswith(("train", "--config="))]
    words = ("train", f"--config={folder / 'free.py'}", *options, "--noprogress")
    assert call(*words, "--config.eval_every=0", f"--workdir={folder / 'run'}") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(workdir):
    return metalearn.load_run(workdir)


def test_a_run_is_read_back_in_one_call(run, workdir):
    assert int(run.state.step) == 2 and run.config["model"]["hidden"] == [3]
    assert run.algorithm is run.trainer.algorithm and type(run.algorithm).__name__ == "MAML"
    score = json.loads((workdir / "test.json").read_text())["loss"]
    key = jax.random.fold_in(jax.random.key(0), 2**31)  # that of `metalearn train`
    again = run.trainer.evaluate(run.eta, run.splits.test, key, 4)["loss"]
    np.testing.assert_allclose(again.mean, score["mean"], rtol=1e-6)


def test_the_workdir_has_the_config_and_the_versions_in_readable_files(run, workdir):
    text = (workdir / "config.json").read_text()
    assert json.loads(text) == run.config and '\n  "seed": 0,\n' in text
    versions = json.loads((workdir / "versions.json").read_text())
    assert versions["jax"] == jax.__version__ and versions["metalearn"] == metalearn.__version__


def test_another_config_that_is_refused_does_not_replace_that_of_the_run(workdir):
    before = (workdir / "config.json").read_bytes()
    words = ("train", "--config=maml_sinusoid", "--config.wandb.mode=disabled")
    assert call(*words, f"--workdir={workdir}") == 2
    assert (workdir / "config.json").read_bytes() == before


def test_the_eta_of_a_run_is_the_one_to_evaluate_whatever_the_outer_optimizer(run):
    assert bits(run.eta) == bits(run.trainer.learned(run.state))
    assert bits(run.eta) != bits(run.state.eta)  # schedule-free: another point


def test_a_run_is_resumed_from_what_was_read_back(run):
    state = run.trainer.fit(run.splits.train, 3, state=run.state, progress=False)
    assert int(state.step) == 3


def test_a_trainer_reads_the_state_of_a_run_by_itself(run, workdir, tmp_path):
    assert bits(run.trainer.restore(workdir)) == bits(run.state)
    assert bits(run.trainer.restore(workdir / "checkpoints")) == bits(run.state)
    with pytest.raises(ValueError, match="^`Trainer.restore` found no checkpoints in .*nowhere.$"):
        run.trainer.restore(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="^There is no checkpoint in"):
        run.trainer.restore(tmp_path)
    other = dataclasses.replace(run.trainer, optimizer=optax.adam(1e-3))
    with pytest.raises(ValueError, match="holds other arrays than"):
        other.restore(workdir)


@pytest.fixture(scope="module")
def exported(workdir):
    assert call("export", f"--workdir={workdir}") == 0
    return workdir / "eta.safetensors"


def test_an_exported_eta_has_the_names_of_the_model_and_comes_back_by_itself(run, exported):
    eta = metalearn.load_eta(exported)
    assert list(eta) == ["params"]  # and no rates
    assert bits(eta["params"]) == bits(run.eta.params)
    with safe_open(exported, framework="np") as file:
        assert {"params/head/kernel", "params/hidden_0/bias"} < {*file.keys()}
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == run.config
    assert json.loads(metadata["versions"])["jax"] == jax.__version__
    assert json.loads(metadata["algorithm"]) == "MAML" and json.loads(metadata["step"]) == 2


def test_an_exported_eta_goes_into_the_parameters_of_the_network(run, exported):
    network = Linen(MLP(1, hidden=(3,)), jax.ShapeDtypeStruct((1, 1), jnp.float32))
    params, _ = network.init(jax.random.key(5))
    assert bits(metalearn.load_eta(exported, like=params)) == bits(run.eta.params)


def test_an_export_names_its_file_and_what_it_is(workdir, tmp_path, capsys):
    out = tmp_path / "new" / "mine.safetensors"
    assert call("export", f"--workdir={workdir}", f"--out={out}") == 0
    assert capsys.readouterr().out == f"{out}: the eta of outer step 2.\n"
    assert out.is_file()


def test_the_code_of_the_page_runs_on_a_run(workdir, exported, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sinusoid").symlink_to(workdir)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), "page", "exec"), {})  # noqa: S102


@pytest.mark.slow
def test_importing_metalearn_imports_neither_experiments_nor_safetensors():
    program = (
        "from metalearn import *; import sys; load_eta, save_eta, load_run; "
        "print([name for name in ('safetensors', 'metalearn.experiments') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_metalearn_has_no_other_names_than_its_own():
    with pytest.raises(AttributeError, match="module 'metalearn' has no attribute 'load_rum'"):
        metalearn.load_rum  # noqa: B018
    assert "load_run" in metalearn.__all__
