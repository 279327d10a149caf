"""Classes and functions of the user's own, named in a config by their import path."""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Reverse, load_eta
from metalearn.experiments import build
from metalearn.experiments.cli import import_paths
from metalearn.experiments.commands import plan
from metalearn.experiments.runs import load_run
from metalearn.models import NNX, Functions, Haiku, Linen
from tests.helpers.command_line import SINUSOID, call
from tests.helpers.small_configs import small

# ml-collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own_classes.md"
QUICK = tuple(word for word in SINUSOID if word.startswith(("--config.", "--no"))) + (
    "--noprogress",
    "--config.eval_every=0",
)


@pytest.fixture(autouse=True)
def own_imports(monkeypatch, tmp_path):
    """Give back `sys.path` and `sys.modules`, and begin without runs of one's own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a module into the current directory."""
    monkeypatch.chdir(tmp_path)

    def written(name, source):
        (tmp_path / f"{name}.py").write_text(source)

    return written


def page():
    """The file of the documentation: a dataset, a network, an algorithm and a config."""
    source, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return source


@pytest.mark.slow
def test_the_file_of_the_page_trains_resumes_evaluates_and_exports(write, tmp_path, capsys):
    write("mine", page())
    words = ("train", "--config=mine.py", f"--workdir={tmp_path / 'run'}", *QUICK)
    assert call(*words) == 0
    restored = load_run(tmp_path / "run")
    learner, data = restored.trainer.algorithm, restored.splits.train
    assert type(learner).__name__ == "Adaptation" and learner.rate == 0.2
    assert type(data).__name__ == "Lines" and data.points == 5
    assert restored.state.eta["layers_0"]["kernel"].shape == (1, 8)
    capsys.readouterr()
    assert call(*words) == 0
    assert "has taken its 2 outer steps" in capsys.readouterr().out
    assert call("eval", f"--workdir={tmp_path / 'run'}", "--tasks=4") == 0
    assert "outer step 2, on test tasks" in capsys.readouterr().out
    assert call("export", f"--workdir={tmp_path / 'run'}") == 0
    eta = load_eta(tmp_path / "run" / "eta.safetensors")
    assert (eta["layers_0"]["kernel"] == restored.eta["layers_0"]["kernel"]).all()


@pytest.mark.slow
def test_a_run_of_ones_own_classes_is_read_from_another_folder(
    write, tmp_path, monkeypatch, capsys
):
    write("mine", page())
    assert call("train", "--config=mine.py", f"--workdir={tmp_path / 'run'}", *QUICK) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    forget(monkeypatch, tmp_path)
    assert call("export", f"--workdir={tmp_path / 'run'}") == 0
    assert type(load_run(tmp_path / "run").splits.train).__name__ == "Lines"
    described = json.loads((tmp_path / "run" / "data.json").read_text())
    other = tmp_path / "other"  # where this user has trained nothing
    other.mkdir()
    (tmp_path / "mine.py").rename(other / "mine.py")
    described["folder"] = str(other)
    (tmp_path / "run" / "data.json").write_text(json.dumps(described))
    forget(monkeypatch, tmp_path)
    capsys.readouterr()
    assert call("export", f"--workdir={tmp_path / 'run'}") == 2
    assert "there is no module 'mine'" in capsys.readouterr().err
    assert call("export", f"--workdir={tmp_path / 'run'}", "--allow-imports") == 0


def forget(monkeypatch, folder):
    """Import the modules of a folder anew, and do not look for them there."""
    kept = [path for path in sys.path if not path.startswith(str(folder))]
    monkeypatch.setattr(sys, "path", [path or "/nowhere" for path in kept])
    for name, module in list(sys.modules.items()):
        if str(folder) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def test_an_algorithm_of_the_page_takes_the_place_of_a_packaged_one(write, tmp_path):
    write("mine", page())
    words = ("--config.algorithm.name=mine:Adaptation", "--config.algorithm.rate=0.001")
    words = (*SINUSOID, *words, "--noprogress", "--config.eval_every=0")
    assert call(*words, f"--workdir={tmp_path / 'run'}") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["algorithm"] == {"name": "mine:Adaptation", "rate": 0.001}


def test_the_file_of_the_page_is_planned_for_shapes_alone(write):
    write("mine", page())
    import_paths.make_current_directory_importable()
    config = build.to_json(import_paths.load("mine:get_config", "config")())
    trainer, tasks = plan.abstract(config)
    state = jax.eval_shape(trainer.init, jax.random.key(0), tasks)
    assert state.eta["layers_0"]["kernel"].shape == (1, 8)


@pytest.mark.slow
def test_the_file_of_the_page_is_planned_with_every_engine(write, capsys):
    write("mine", page())
    assert call("plan", "--config=mine.py", "--json", "--budget=1GiB") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) > 5


def test_what_is_ones_own_on_the_page_takes_thirty_lines_of_code():
    lines = [line for line in page().splitlines() if line.strip()]
    code = [line for line in lines if not line.startswith(("#", "import ", "from "))]
    assert len(code) <= 30


def test_the_code_of_the_page_runs():
    _, *blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, "page", "exec"), {})  # noqa: S102


@pytest.mark.slow
def test_the_example_of_an_own_algorithm_is_launched_from_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "docs")  # a config elsewhere, the class in the current directory
    (tmp_path / "tuned.py").write_text(
        "from metalearn.experiments.configs import maml_sinusoid\n\n\n"
        "def get_config():\n"
        "    config = maml_sinusoid.get_config()\n"
        "    config.model.hidden = (4,)\n"
        '    config.algorithm = {"name": "own_algorithm:TunedAdaptation", "inner_steps": 2}\n'
        "    return config\n"
    )
    words = ("train", f"--config={tmp_path / 'tuned.py'}", f"--workdir={tmp_path / 'run'}", *QUICK)
    assert call(*words) == 0
    restored = load_run(tmp_path / "run")
    assert type(restored.trainer.algorithm).__name__ == "TunedAdaptation"
    assert float(restored.state.eta["log_rate"]) != pytest.approx(np.log(0.01), abs=1e-6)


def test_the_current_directory_is_importable_as_for_python_m(write, tmp_path, monkeypatch):
    write("here", "VALUE = 3\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    assert import_paths.load("here:VALUE", "value") == 3
    assert sys.path[0] == str(tmp_path)


# What an algorithm brings beyond training.

EXTRAS = '''
import dataclasses

import jax.numpy as jnp

from metalearn import Algorithm, Unroll


@dataclasses.dataclass(frozen=True)
class Constant(Algorithm):
    """Learn the mean of the targets: no model, and no inner step that does anything."""

    scale: float = 1.0
    export_name = "constant.txt"

    def init(self, key):
        return {"mean": jnp.zeros(())}

    def batches(self, episode, key):
        return jnp.arange(1)

    def unroll(self, episode, key):
        def loss(eta, state):
            return jnp.mean((eta["mean"] - episode.query[1]) ** 2), {"scale": self.scale}

        return Unroll(lambda eta: (), lambda eta, state, batch, grad: state, loss)

    def evaluation(self):
        return dataclasses.replace(self, scale=7.0)

    def export(self, eta, path):
        path.write_text(f"{float(eta['mean'])}")
        return "the mean"

    def pictures(self):
        return {"words": lambda trainer, state, tasks, workdir: {"words.txt": "drawn"}}


def get_config():
    from metalearn.experiments.configs import maml_sinusoid

    config = maml_sinusoid.get_config()
    config.algorithm = {"name": "extras:Constant"}
    config.pictures = ("words",)
    del config.model
    return config
'''


def test_an_own_class_has_its_evaluation_export_and_pictures_called(write, tmp_path, capsys):
    write("extras", EXTRAS)
    words = ("train", "--config=extras.py", f"--workdir={tmp_path / 'run'}", *QUICK)
    assert call(*words) == 0
    assert json.loads((tmp_path / "run" / "test.json").read_text())["scale"]["mean"] == 7.0
    assert (tmp_path / "run" / "pictures" / "words.txt").read_text() == "drawn"
    (tmp_path / "run" / "pictures" / "words.txt").unlink()
    assert call("draw", f"--workdir={tmp_path / 'run'}") == 0
    assert (tmp_path / "run" / "pictures" / "words.txt").exists()
    assert call("export", f"--workdir={tmp_path / 'run'}") == 0
    assert "the mean of outer step 2." in capsys.readouterr().out
    assert (tmp_path / "run" / "constant.txt").exists()


def test_a_config_without_a_model_is_refused_where_the_algorithm_takes_one():
    config = build.to_json(small("maml_sinusoid"))
    del config["model"]
    with pytest.raises(ValueError, match="^The algorithm 'maml' takes a model, and this conf"):
        build.trainer(config, build.splits(config["dataset"]))


# Every kind of name.

PARTS = """
import dataclasses

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from metalearn import Algorithm, Reverse, Tasks
from metalearn.datasets import ClassIndex, Sinusoid
from metalearn.experiments.build import Splits
from metalearn.models import Functions, Linen, Model


@dataclasses.dataclass(frozen=True)
class Bare(Algorithm):
    model: object
    inner_optimizer: object
    objective: object
    step_optimizer: "optax.GradientTransformation | None" = None

    def init(self, key): ...
    def unroll(self, episode, key): ...


class Unfinished(Algorithm):
    def init(self, key): ...


class Dense(nn.Module):
    outputs: int
    bias: bool = True

    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dense(self.outputs, use_bias=self.bias)(nn.Dropout(0.5)(x, deterministic))


class Linear(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.linear = nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


class Layer(hk.Module):
    def __init__(self, outputs, name=None):
        super().__init__(name)
        self.outputs = outputs

    def __call__(self, x, is_training):
        return hk.Linear(self.outputs)(x)


def layer(outputs):
    return hk.Linear(outputs)


def linear(inputs, outputs, rngs):
    return nnx.Linear(inputs, outputs, rngs=rngs)


def functions(outputs):
    return Functions(lambda key: jnp.ones((1, outputs)), lambda params, x: x @ params)


def adapted(outputs, example):
    return Linen(Dense(outputs), example)


def nothing(outputs):
    return 3


def waves(split: str, shots: int):
    return Sinusoid(shots, {"train": 2, "validation": 3, "test": 4}[split])


def classes(split: str, sides: int = 3) -> ClassIndex:
    images = np.full((6, 8, sides, sides, 1), len(split), np.uint8)
    return ClassIndex(images, np.full(6, 8, np.int32))


def unsaid(split: str):
    return classes(split)


def stated() -> Splits:
    tasks = Sinusoid()
    return Splits(tasks, None, tasks, jax.ShapeDtypeStruct((1, 5), jnp.float32), 9)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dicts(Tasks):
    def sample(self, key):
        from metalearn import Episode

        return Episode({"x": jnp.ones(2)}, {"x": jnp.ones(2)})


def momentum(learning_rate, decay):
    return optax.sgd(learning_rate, decay)


def an_engine(remat="step"):
    return Reverse(remat)


def absolute(outputs, targets):
    return jnp.abs(outputs - targets).mean(), {}


NUMBER = 3
"""


@pytest.fixture
def parts(write):
    write("own_parts", PARTS)


def splits(inputs=2, outputs=3):
    return build.Splits(None, None, None, jax.ShapeDtypeStruct((1, inputs), jnp.float32), outputs)


def test_an_own_algorithm_gets_what_its_arguments_name(parts):
    inner = {"name": "own_parts:momentum", "learning_rate": 0.1, "decay": 0.9}
    config = {"name": "own_parts:Bare", "inner_optimizer": inner}
    config |= {"objective": "own_parts:absolute", "step_optimizer": {"name": "optax.identity"}}
    learner = build.algorithm(config, "the model")
    assert learner.model == "the model" and learner.objective.__name__ == "absolute"
    assert isinstance(learner.inner_optimizer, optax.GradientTransformation)
    assert isinstance(learner.step_optimizer, optax.GradientTransformation)
    assert build.algorithm({**config, "objective": "squared_error"}, None).objective.__name__ == (
        "squared_error"
    )


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"name": "own_parts:Dense", "bias": False}, Linen),
        ({"name": "own_parts:Linear", "library": "linen"}, NNX),  # the class says better
        ({"name": "own_parts:Layer"}, Haiku),
        ({"name": "own_parts:layer", "library": "haiku"}, Haiku),
        ({"name": "own_parts:linear"}, NNX),
        ({"name": "own_parts:adapted"}, Linen),
        ({"name": "own_parts:functions"}, Functions),
    ],
    ids=lambda part: part["name"] if isinstance(part, dict) else "",
)
def test_an_own_network_of_any_library_is_sized_by_the_dataset(parts, config, kind):
    data = splits(1 if "functions" in config["name"] else 2)
    network = build.model(config, data)
    assert isinstance(network, kind)
    params, state = network.init(jax.random.key(0))
    inputs = jnp.ones((4, data.inputs.shape[1]))
    outputs, _ = network.apply(params, state, inputs, train=False, key=jax.random.key(1))
    assert outputs.shape == (4, 3)
    assert not (config.get("bias") is False and "bias" in str(params))


def test_an_own_dataset_is_a_function_of_a_split_or_one_distribution(parts):
    data = build.splits({"name": "own_parts:waves", "shots": 2})
    assert [tasks.queries for tasks in data[:3]] == [2, 3, 4] and data.outputs == 1
    few = {"ways": 5, "shots": 1, "queries": 2, "eval_queries": 3}
    data = build.splits({"name": "own_parts:classes", **few, "sides": 4})
    assert data.inputs.shape == (1, 4, 4, 1) and data.outputs == 5
    data = build.splits({"name": "own_parts:stated"})
    assert data.validation is None and data.outputs == 9
    data = build.splits({"name": "metalearn.datasets:Sinusoid", "shots": 3})
    assert data.train is data.test and data.train.shots == 3


def test_an_own_engine_is_a_class_or_a_function(parts):
    assert build.engine("own_parts:an_engine") == Reverse("step")
    assert build.engine("metalearn:Reverse", {"remat": "nested"}) == Reverse("nested")


@pytest.mark.parametrize("name", ["optax.lamb", "optax.contrib.muon", "optax.nadam", "optax.sgd"])
def test_any_optimizer_of_optax_goes_by_its_own_name(name):
    config = {"name": name, "learning_rate": 0.5, "schedule": "linear", "clip": 1.0}
    optimizer = build.outer_optimizer(config, steps=10)
    params = {"w": jnp.ones((2, 2))}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert (updates["w"] < 0).all()


def test_an_optimizer_within_an_optimizer_is_a_config():
    base = {"name": "optax.sgd", "learning_rate": 1e-3}
    config = {"name": "optax.contrib.schedule_free", "base_optimizer": base}
    optimizer = build.outer_optimizer({**config, "learning_rate": 0.1, "schedule": "constant"}, 10)
    state = optimizer.init(jnp.ones(2))
    assert type(state).__name__ == "ScheduleFreeState"


# What cannot be.


@pytest.mark.parametrize(
    ("build_part", "expected"),
    [
        (
            lambda: build.algorithm({"name": "nowhere.mine:Mine"}, None),
            r"The algorithm 'nowhere.mine:Mine' cannot be imported: there is no module 'nowhere', "
            r"neither among what is installed nor in the current directory, .*\. An import path is "
            r"'package.module:Name'; begin in the folder that holds the package, or put the folder "
            r"on PYTHONPATH\.",
        ),
        (
            lambda: build.algorithm({"name": "docs/own_algorithm.py:TunedAdaptation"}, None),
            r"No algorithm is called 'docs/own_algorithm.py:TunedAdaptation', and it is no import "
            r"path: that is 'package.module:Name', such as 'my_file:MyClass' for a class in "
            r"my_file.py of the current directory\. The names of metalearn are: cavia, .*, maml, "
            r".*\.",
        ),
        (
            lambda: build.algorithm({"name": "broken:Mine"}, None),
            r"The algorithm 'broken:Mine' cannot be imported: the module 'broken' raises "
            r"ZeroDivisionError: division by zero",
        ),
        (
            lambda: build.algorithm({"name": "misspelled:Mine"}, None),
            r"The algorithm 'misspelled:Mine' cannot be imported: the module 'misspelled' raises "
            r"SyntaxError: .*",
        ),
        (
            lambda: build.algorithm({"name": "lacking:Mine"}, None),
            r"The algorithm 'lacking:Mine' cannot be imported: the module 'lacking' imports "
            r"'not_installed', which is not installed\.",
        ),
        (
            lambda: build.algorithm({"name": "own_parts:Bear"}, None),
            r"The algorithm 'own_parts:Bear' cannot be imported: .*own_parts.py has no 'Bear'\. "
            r"Did you mean 'Bare'\? It has: Bare, Dense, Dicts, .*\.",
        ),
        (
            lambda: build.algorithm({"name": "own_parts:Dense"}, None),
            r"'own_parts:Dense' is no algorithm: the class Dense is not a subclass of Algorithm\. "
            r"Derive it from that, or name a function that builds an algorithm\.",
        ),
        (
            lambda: build.algorithm({"name": "own_parts:Unfinished"}, None),
            r"'own_parts:Unfinished' is no complete algorithm: the class Unfinished does not "
            r"define unroll, which every Algorithm has\.",
        ),
        (
            lambda: build.algorithm({"name": "own_parts:NUMBER"}, None),
            r"'own_parts:NUMBER' is no algorithm, but the value 3\. Name a class, or a function "
            r"that builds one: the other keys of the config are its arguments\.",
        ),
        (
            lambda: build.algorithm({"name": "own_parts:nothing", "outputs": 1}, None),
            r"'own_parts:nothing' is no algorithm: it returned 3, which is no Algorithm\.",
        ),
        (
            lambda: build.algorithm({"name": "own_parts:Bare", "objective": "squared_error"}, None),
            r"The algorithm 'own_parts:Bare' needs inner_optimizer, which this config does not "
            r"set\. Set what has no default beside the name, or begin with a packaged config that "
            r"is made for it\.",
        ),
        (
            lambda: build.algorithm({"name": "own_parts:Bare", "inner_optimiser": 1}, None),
            r"The algorithm 'own_parts:Bare' has no option 'inner_optimiser'\. It has: "
            r"\['inner_optimizer', 'objective', 'step_optimizer'\]\.",
        ),
        (
            lambda: build.splits({"name": "own_parts:Bare"}),
            r"'own_parts:Bare' is no dataset: the class Bare is not a subclass of Tasks\. .*",
        ),
        (
            lambda: build.splits({"name": "own_parts:nothing", "outputs": 1}),
            r"'own_parts:nothing' is no dataset: it returned 3, which is no Tasks or Splits\.",
        ),
        (
            lambda: build.splits({"name": "own_parts:waves"}),
            r"The dataset 'own_parts:waves' needs shots, which this config does not set\. .*",
        ),
        (
            lambda: build.splits({"name": "own_parts:unsaid"}),
            r"The dataset 'own_parts:unsaid' returned a ClassIndex\. Say so in its annotation, "
            r"`def unsaid\(split, \.\.\.\) -> ClassIndex:`; .*",
        ),
        (
            lambda: build.splits({"name": "own_parts:Dicts"}),
            r"The dataset 'own_parts:Dicts' has tasks whose query is {'x': 'float32\[2\]'}\. A "
            r"network is sized by a query .*",
        ),
        (
            lambda: build.model({"name": "own_parts:Bare"}, splits()),
            r"'own_parts:Bare' is no network: <class 'own_parts.Bare'> is neither a class of Flax "
            r"linen, Flax NNX, Haiku, Equinox or .*Model`, nor a function that builds one\.",
        ),
        (
            lambda: build.model({"name": "own_parts:nothing"}, splits()),
            r"'own_parts:nothing' is no network: it returned 3\. A function returns a `Model` or a "
            r"linen module; .*",
        ),
        (
            lambda: build.model({"name": "own_parts:Dense", "depth": 3}, splits()),
            r"The network 'own_parts:Dense' has no option 'depth'\. It has: \['bias'\]\.",
        ),
        (
            lambda: build.engine("own_parts:Bare"),
            r"'own_parts:Bare' is no engine: the class Bare is not a subclass of MetaGradient\. .*",
        ),
        (
            lambda: build.engine("own_parts:momentum", {"learning_rate": 1, "decay": 1}),
            r"'own_parts:momentum' is no engine: it returned GradientTransformation.*, which is no "
            r"MetaGradient\.",
        ),
        (
            lambda: build.optimizer({"name": "own_parts:nothing", "outputs": 1}),
            r"'own_parts:nothing' is no optimizer: it returned 3, which is no "
            r"GradientTransformation\.",
        ),
        (
            lambda: build.optimizer({"name": "optax.contrib.moun", "learning_rate": 1}),
            r"optax has no optimizer 'optax.contrib.moun'\. Did you mean 'optax.contrib.muon'\? .*",
        ),
        (
            lambda: build.optimizer({"name": "optax.lamb", "learning_rate": 1, "mu": 2}),
            r"The optimizer 'optax.lamb' has no option 'mu'\. It has: \['learning_rate', 'b1', .*",
        ),
        (
            lambda: build.outer_optimizer({"name": "optax.lamb", "schedule": "linear"}, 3),
            r"The outer optimizer 'optax.lamb' needs a learning_rate\.",
        ),
        (
            lambda: build.outer_optimizer({"name": "optax.scale_by_adam", "schedule": "linear"}, 3),
            r"The outer optimizer 'optax.scale_by_adam' has no learning_rate, which the schedule "
            r"of config.optimizer changes\. Set schedule='constant', and any other in its own "
            r"arguments\.",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_paragraph(parts, write, build_part, expected):
    write("broken", "1 / 0\n")
    write("misspelled", "def mine(:\n")
    write("lacking", "import not_installed\n")
    with pytest.raises(ValueError) as caught:
        build_part()
    message = str(caught.value)
    assert re.fullmatch(expected, message), message
    assert len(message) < 700


# JSON, and runs of others.


@pytest.fixture
def json_config(parts, tmp_path):
    inner = {"optimizer": {"name": "own_parts:momentum"}}
    (tmp_path / "mine.json").write_text(json.dumps({"config": "maml_sinusoid", "algorithm": inner}))
    return "mine.json"


def test_a_json_config_that_names_an_import_path_is_refused(json_config, refused, tmp_path):
    words = ("train", f"--config={json_config}", f"--workdir={tmp_path / 'run'}")
    expected = (
        "mine.json sets config.algorithm.optimizer.name to the import path 'own_parts:momentum', "
        "and to import is to execute code, which a JSON config does not do by itself. If you trust "
        "that code, add --allow-imports; or set the key on the command line."
    )
    assert refused(*words) == expected
    assert refused(*words, "--allow-imports=false") == expected
    assert "own_parts" not in sys.modules


@pytest.mark.parametrize("flag", ["--allow-imports", "--allow_imports", "--allow-imports=true"])
def test_a_json_config_that_names_an_import_path_is_taken_where_allowed(
    json_config, refused, tmp_path, flag
):
    words = ("train", f"--config={json_config}", f"--workdir={tmp_path / 'run'}", *QUICK)
    message = refused(*words, flag)
    assert message.startswith("The optimizer 'own_parts:momentum' needs decay, which this config")


def test_a_name_of_wandb_is_no_import_path():
    assert import_paths.import_paths({"wandb": {"name": "a:b"}, "model": {"name": "a:b"}}) == {
        "model.name": "a:b"
    }


def test_a_chosen_engine_in_the_checkpoint_of_somebody_else_is_not_imported(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "_recorded", lambda _: {"auto": {"engine": "os:system", "why": ""}})
    config = build.to_json(small("maml_sinusoid", engine="auto"))
    with pytest.raises(
        ValueError, match=r"names code by the import path 'os:system' \(config.engine"
    ):
        plan.settled(config, tmp_path / "checkpoints")


def test_the_run_of_somebody_else_with_import_paths_is_refused(
    write, refused, tmp_path, monkeypatch, capsys
):
    write("extras", EXTRAS)
    workdir = tmp_path / "run"
    assert call("train", "--config=extras.py", f"--workdir={workdir}", *QUICK) == 0
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "another user"))
    capsys.readouterr()
    for command in ("eval", "export", "draw"):
        assert refused(command, f"--workdir={workdir}") == (
            f"The run in {workdir} names code by the import path 'extras:Constant' "
            "(config.algorithm.name), and to read the run is to execute it. No run on this machine "
            "has been trained with it yet. If you trust that code, add --allow-imports (in Python: "
            "allow_imports=True)."
        )
    assert call("eval", f"--workdir={workdir}", "--tasks=4", "--allow-imports") == 0
