"""Loading runs no code: no pickle, no process, from a checkpoint, an optimizer or a cache.

An audit hook hears of every pickle that looks up a class or function, whoever asks for it. It
cannot be removed again, so it listens in a process of its own, once all is imported.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.selection import quick

LISTENING = """
import json, os, pathlib, pickle, sys, tempfile
import jax, jax.numpy as jnp, numpy as np, optax
from metalearn.algorithms import Hyperparameter, TunedRule, load_optimizer, save_optimizer
from metalearn import load_eta, save_eta
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets.reading import cached
from metalearn.experiments.cli import json_config
from metalearn.train_state import TrainState

work = pathlib.Path(tempfile.mkdtemp())
os.environ["METALEARN_CACHE"] = str(work)
RUNS = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
heard = {}
what = None  # is loaded now


def hook(event, arguments):
    if what is not None and event in RUNS:
        heard[what].append(event)


sys.addaudithook(hook)

optimizer = optax.adam(1e-3)
eta = {"w": jnp.arange(3.0)}
state = TrainState(jnp.zeros((), jnp.int32), eta, optimizer.init(eta), jax.random.key(0))
written = Checkpoints(work / "run", {"seed": 0})
written.save(state, 1, {"WandbLogger": {"wandb_id": "x"}})
written.close()
rate = Hyperparameter(1e-5, 1.0, start=0.01, space="log")
rule = TunedRule(optax.adam, {"learning_rate": rate})
save_optimizer(work / "mine.safetensors", rule, rule.init(jax.random.key(0)))
save_eta(work / "eta.safetensors", eta)
(work / "mine.json").write_text('{"config": "maml_digits", "seed": 3}')


def checkpoint():
    opened = Checkpoints(work / "run", {"seed": 0})
    found, record = opened.restore(state)
    opened.close()
    assert (found.eta["w"] == eta["w"]).all() and record["WandbLogger"] == {"wandb_id": "x"}


def exported_eta():
    assert (load_eta(work / "eta.safetensors")["w"] == eta["w"]).all()


def exported_optimizer():
    load_optimizer(work / "mine.safetensors").init({"w": np.zeros(3)})


def dataset_cache():
    assert cached("zeros", lambda: np.zeros(3)).shape == (3,)


def config():
    assert json_config.get_config(str(work / "mine.json")).seed == 3


def a_pickle():
    pickle.loads(pickle.dumps(pathlib.Path("x")))


for load in (checkpoint, exported_eta, exported_optimizer, dataset_cache, config, a_pickle):
    load()  # whatever is imported late is imported now
    heard[load.__name__] = []
    what = load.__name__
    load()
    what = None
print(json.dumps(heard))
"""


@pytest.fixture(scope="module")
def heard():
    """What was heard while each kind of file was loaded: {kind: [event]}."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LISTENING]
    return json.loads(subprocess.check_output(command, env=environment, text=True))


@pytest.mark.parametrize(
    "kind",
    quick(
        ["checkpoint", "exported_eta", "exported_optimizer", "dataset_cache", "config"],
        lambda kind: kind != "checkpoint",
    ),
)
def test_loading_runs_no_code(heard, kind):
    assert heard[kind] == []


def test_the_hook_hears_a_pickle(heard):
    assert set(heard["a_pickle"]) == {"pickle.find_class"}
