"""A reader who knows the field finds the file of a feature by the names of folders and modules."""

import ast
import dataclasses
import itertools
import pathlib
import textwrap
import traceback

import jax
import pytest

import metalearn
from metalearn import MixedFlow, Reverse, Trainer
from metalearn.algorithms import MAML, squared_error
from tests.cases import MODELS, TASKS

ROOT = pathlib.Path(metalearn.__file__).parent.parent
TESTS = pathlib.Path(__file__).parent

# What a reader looks for: the file it is in, and a name that is defined there.
FEATURES = {
    "the interface between algorithms and engines": ("metalearn/unroll.py", "Unroll"),
    "the base class of algorithms": ("metalearn/algorithm.py", "Algorithm"),
    "drawing a task": ("metalearn/tasks.py", "draw_task"),
    "applying what was learned to a new task": ("metalearn/learner.py", "Learner"),
    "the trainer": ("metalearn/trainer.py", "Trainer"),
    "confidence intervals of an evaluation": ("metalearn/_utils/intervals.py", "Estimate"),
    "reverse mode": ("metalearn/engines/reverse.py", "Reverse"),
    "forward mode": ("metalearn/engines/forward/engine.py", "Forward"),
    "mixed flow": ("metalearn/engines/mixed_flow/engine.py", "MixedFlow"),
    "Hessian products in micro-batches": (
        "metalearn/engines/mixed_flow/micro_batches.py",
        "value_and_grad",
    ),
    "evolution strategies": ("metalearn/engines/estimators/es.py", "ES"),
    "persistent evolution strategies": ("metalearn/engines/estimators/pes.py", "PES"),
    "implicit differentiation": ("metalearn/engines/approximate/implicit.py", "Implicit"),
    "solvers of the implicit system": ("metalearn/engines/approximate/solvers.py", "gmres"),
    "hypergradients of the last steps": ("metalearn/engines/approximate/truncated.py", "Truncated"),
    "SAMA": ("metalearn/engines/approximate/sama.py", "SAMA"),
    "the error of each engine": ("metalearn/diagnostics/comparison.py", "compare"),
    "whether a meta-gradient predicts anything": (
        "metalearn/diagnostics/smoothness.py",
        "smoothness",
    ),
    "metasmoothness": ("metalearn/diagnostics/perturbed_runs.py", "metasmoothness"),
    "the smoothness of an inner run in segments": (
        "metalearn/training/segmented_runs.py",
        "SegmentedRuns",
    ),
    "settings that make a meta-gradient predict more": (
        "experiments/commands/smooth.py",
        "search",
    ),
    "rematerialisation of the inner loop": ("metalearn/engines/inner_loop.py", "Remat"),
    "inner runs of any length, in segments": ("metalearn/training/segment_run.py", "SegmentRun"),
    "the programs of an outer step in segments": (
        "metalearn/training/segment_programs.py",
        "Programs",
    ),
    "what an outer step in segments costs": ("metalearn/training/segment_plan.py", "SegmentPlan"),
    "a checkpoint inside an outer step": ("metalearn/training/segment_checkpoints.py", "record"),
    "which states a replay keeps": ("metalearn/training/replay_schedule.py", "Position"),
    "where kept states are": ("metalearn/training/kept_states.py", "KeptStates"),
    "how much memory kept states may take": ("metalearn/training/replay.py", "Replay"),
    "copies of sharded arrays on the host": ("metalearn/sharding/host_copies.py", "Shards"),
    "truncated unrolls": ("metalearn/training/truncated_unroll.py", "Truncation"),
    "what happens on a non-finite step": ("metalearn/training/faults.py", "Faults"),
    "stopping on a signal": ("metalearn/training/signals.py", "asked_to_stop"),
    "saving and restoring a run": ("metalearn/checkpoints/manager.py", "Checkpoints"),
    "the health check": ("metalearn/diagnostics/health.py", "check"),
    "the memory and FLOPs of each engine": ("metalearn/planning/plan.py", "plan"),
    "optimizers whose derivative is finite at zero": (
        "metalearn/optimizers/differentiable.py",
        "differentiable_at_zero",
    ),
    "reversible Adam": ("metalearn/optimizers/reversible.py", "adam"),
    "a learning rate that falls by itself": (
        "metalearn/optimizers/meta_regularized.py",
        "meta_regularized",
    ),
    "adapting to held-out tasks": ("metalearn/training/evaluation.py", "task_metrics"),
    "logging to W&B": ("metalearn/loggers/wandb.py", "WandbLogger"),
    "refusing what cannot fit the memory": ("metalearn/diagnostics/memory.py", "check_tasks"),
    "labels beyond the network's outputs": ("metalearn/_utils/labels.py", "known"),
    "a mesh of devices": ("metalearn/sharding/mesh.py", "make_mesh"),
    "one inner run over several devices": ("metalearn/sharding/inner_run.py", "constrain"),
    "MAML": ("algorithms/maml.py", "MAML"),
    "what batch normalisation does in MAML's inner loop": (
        "algorithms/maml.py",
        "batch_norm_policy",
    ),
    "MAML++": ("algorithms/maml_plus_plus.py", "MAMLPlusPlus"),
    "Reptile": ("algorithms/reptile.py", "Reptile"),
    "Meta-Curvature": ("algorithms/meta_curvature.py", "MetaCurvature"),
    "CAVIA": ("algorithms/cavia.py", "CAVIA"),
    "a learned inner loss": ("algorithms/learned_loss.py", "LearnedLoss"),
    "adaptation by a neural tangent kernel": ("algorithms/meta_ntk.py", "MetaNTK"),
    "adaptation by a gradient flow": ("algorithms/comln.py", "COMLN"),
    "prototypical networks": ("algorithms/protonet.py", "ProtoNet"),
    "R2-D2": ("algorithms/r2d2.py", "R2D2"),
    "heads in closed form": ("algorithms/closed_form.py", "ClosedFormHead"),
    "hyperparameter schedules by FDS": ("algorithms/fds/algorithm.py", "FDS"),
    "a network that rates training examples": ("algorithms/data_rater/algorithm.py", "DataRater"),
    "a rater of texts": ("algorithms/data_rater/networks.py", "text_rater"),
    "the best of a dataset": ("algorithms/data_rater/selection.py", "top_fraction"),
    "training on weighted losses": (
        "algorithms/loss_weights/weighted_training.py",
        "WeightedTraining",
    ),
    "a weight for each training example": ("algorithms/data_weights/algorithm.py", "DataWeights"),
    "scores of training examples": ("algorithms/data_weights/attribution.py", "attribute"),
    "training without some examples": ("algorithms/data_weights/validation.py", "leave_k_out"),
    "several query sets of one inner loop": (
        "metalearn/training/query_sets.py",
        "QueryGradients",
    ),
    "three levels, and more": ("algorithms/learned_optimizer/meta_training.py", "MetaTraining"),
    "tasks of a level above": ("datasets/meta_training_runs.py", "MetaTrainingRuns"),
    "exporting a learned optimizer": (
        "algorithms/learned_optimizer/export.py",
        "save_optimizer",
    ),
    "what was learned, in a file": ("metalearn/eta_file.py", "load_eta"),
    "reading back a run": ("experiments/runs.py", "load_run"),
    "reading back a run without its data": ("experiments/run_data.py", "read"),
    "which names a config may use": ("experiments/build/registry.py", "check_call"),
    "a class of one's own, named in a config": ("experiments/cli/import_paths.py", "load"),
    "from a config to an algorithm": ("experiments/build/algorithms.py", "algorithm"),
    "from a config to the trainer": ("experiments/build/trainers.py", "trainer"),
    "a module of Equinox as a model": ("models/equinox.py", "Equinox"),
    "predicting with a finished run": ("experiments/commands/adapt.py", "adapt"),
    "pretrained parameters by name": ("models/pretrained.py", "with_params"),
    "arrays that nobody learns, as arguments of programs": (
        "metalearn/training/program.py",
        "Program",
    ),
    "decoders of Hugging Face": ("models/hugging_face.py", "load_hugging_face"),
    "low-rank adaptation": ("models/lora.py", "LoRA"),
    "bfloat16": ("models/precision.py", "Precision"),
    "master weights": ("metalearn/optimizers/master_weights.py", "master_weights"),
    "few-shot tasks": ("datasets/few_shot.py", "FewShot"),
    "data that stay on the host": ("datasets/host_few_shot.py", "HostFewShot"),
    "training runs on data of the host": (
        "datasets/host_training_runs.py",
        "HostTrainingRuns",
    ),
    "reading rows of a dataset, wherever it is": ("metalearn/rows.py", "take"),
    "texts that stay on the host": ("datasets/host_text.py", "HostText"),
    "reading the tasks of the next steps": ("metalearn/training/prefetch.py", "Prefetch"),
    "lists and streams of episodes": ("datasets/given.py", "GivenTasks"),
    "tasks of unequal size": ("datasets/unequal.py", "UnequalFewShot"),
    "folders of images": ("datasets/folders.py", "read_folder"),
    "sweeps": ("experiments/commands/sweep.py", "sweep"),
    "what is searched by a sweep": ("experiments/sweep/space.py", "space"),
    "names and keys of configs": ("experiments/build/reference.py", "described"),
    "whether this machine works": ("experiments/commands/doctor.py", "diagnose"),
}

# Folders inside metalearn, from those that import to those that are imported.
FLOORS = (
    ("planning",),
    ("trainer", "eta_file"),
    ("training",),
    ("diagnostics", "checkpoints", "loggers"),
    ("tasks", "train_state"),
    ("algorithm",),
    ("engines", "sharding", "optimizers"),
    ("learner",),
    ("unroll", "rows"),
    ("cost", "_utils"),
    ("model",),
)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_in_the_file_that_its_name_says(feature):
    path, name = FEATURES[feature]
    tree = ast.parse((ROOT / path).read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert name in defined, f"{name} is no longer in {path}: keep the map true."


def folder_of(module):
    return module.split(".")[1]


def imports_of(path):
    """Return the modules of metalearn that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metalearn"):
            if node.module == "metalearn":
                yield from (f"metalearn.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_imports_inside_metalearn_run_one_way():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upwards = []
    for path in sorted((ROOT / "metalearn").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = parts[1]
        if own in ("__init__", "__main__", "algorithms", "models", "datasets", "experiments"):
            continue
        for module in imports_of(path):
            other = folder_of(module)
            if other in floor and floor[other] < floor[own]:
                upwards.append(f"{path.relative_to(ROOT)} imports {module}")
    assert {p.stem for p in (ROOT / "metalearn").glob("*.py")} - {"__init__", "__main__"} <= set(
        floor
    )
    assert not upwards, upwards


@dataclasses.dataclass(frozen=True)
class Traced(MAML):
    """MAML that notes which files call its inner step."""

    callers: list = dataclasses.field(default_factory=list)

    def unroll(self, episode, key):
        unroll = super().unroll(episode, key)

        def step(*args):
            self.callers.append([frame.filename for frame in traceback.extract_stack()])
            return unroll.step(*args)

        return unroll._replace(step=step)


# The mean over tasks: it maps a function as `jax.vmap` does, over devices and in chunks.
MAP = ("metalearn/training/task_batch.py", "metalearn/sharding/batched_means.py")


@pytest.mark.parametrize(
    ("engine", "file"), [(MixedFlow(), "mixed_flow/engine.py"), (Reverse(), "reverse.py")]
)
def test_an_outer_step_reads_from_the_trainer_to_the_inner_step_in_files_passed_once(engine, file):
    algorithm = Traced(MODELS["linen-MLP"], squared_error, inner_steps=2)
    trainer, tasks = Trainer(algorithm, engine, tasks_per_step=2), TASKS["Sinusoid"]
    trainer.step.lower(trainer.init(jax.random.key(0)), tasks)
    assert algorithm.callers
    for callers in algorithm.callers:
        paths = [pathlib.Path(name) for name in callers if str(ROOT / "metalearn") in name]
        files = [str(path.relative_to(ROOT)) for path in paths]
        files = [name for name in files if name not in MAP]
        passed = [name for name, _ in itertools.groupby(files)]
        assert passed == [
            "metalearn/trainer.py",
            "metalearn/training/full_unroll.py",
            f"metalearn/engines/{file}",
            "metalearn/engines/inner_loop.py",
        ]


def imported_test_files(source):
    """Return the test files that a source imports, in programs inside its strings too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = f"tests.{node.module}" if node.level else node.module
            names.update(f"{package}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and "import" in str(node.value):
            try:
                names |= imported_test_files(textwrap.dedent(node.value))
            except (SyntaxError, TypeError):  # prose, or bytes
                continue
    return {name for name in names if name.startswith("tests.") and ".test_" in name}


@pytest.mark.parametrize(
    "source",
    [
        "import tests.training.test_fit",
        "from tests.training import (\n    test_fit,\n)",
        "def late():\n    from tests.training.test_fit import clock",
        "from .test_fit import clock",
        "from . import test_fit",
        "PROGRAM = '''\n    import sys\n    from tests.training.test_fit import clock\n'''",
    ],
)
def test_an_import_of_a_test_file_is_seen(source):
    assert imported_test_files(source)


def test_no_test_file_is_imported():
    files = sorted(
        set(TESTS.rglob("*.py")) - {pathlib.Path(__file__)}
    )  # it holds the samples above
    assert len(files) > 50
    imports = [
        f"{file.relative_to(TESTS)} imports {name}"
        for file in files
        for name in sorted(imported_test_files(file.read_text()))
    ]
    assert not imports, "Move what tests share to tests/helpers, and fixtures to a conftest.py."


def folders_without_source(tests):
    """Return the folders of tests, except the helpers, that are no folder of metalearn."""
    folders = {file.parent.relative_to(tests) for file in tests.rglob("*.py")}
    there = ROOT / "metalearn"
    return sorted(str(f) for f in folders - {pathlib.Path("helpers")} if not (there / f).is_dir())


def test_folders_of_tests_mirror_the_source():
    assert folders_without_source(TESTS) == [], "Name folders of tests as the source does."


def test_a_folder_of_tests_without_a_source_is_seen(tmp_path):
    for folder in ("engines", "engines/forward", "algorithms/fds", "helpers", "motors", "fds"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "test_x.py").touch()
    assert folders_without_source(tmp_path) == ["fds", "motors"]
