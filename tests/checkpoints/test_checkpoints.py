"""Checkpoints: all of a run comes back, bit for bit, or a message says why it cannot."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import metalearn
from metalearn import Trainer
from metalearn.algorithms import MAML, squared_error
from metalearn.checkpoints import record as run_record
from metalearn.checkpoints.manager import ChangedConfigError, Checkpoints, DamagedError
from metalearn.checkpoints.record import difference, same_config
from metalearn.models import Functions
from tests.helpers.checkpoints import a_state, bits, flip_a_bit, largest_file
from tests.helpers.selection import quick


@pytest.fixture
def opened(tmp_path):
    """A function that opens the checkpoints of one run; all are closed at the end."""
    made = []

    def open_(config=None, **options):
        made.append(Checkpoints(tmp_path / "run", config, **options))
        return made[-1]

    yield open_
    for checkpoints in made:
        checkpoints.close()


def saved(opened, config=None, state=None, loggers=None):
    checkpoints = opened(config)
    state = a_state() if state is None else state
    checkpoints.save(state, int(state.step), loggers or {})
    checkpoints.close()
    return state


def test_the_whole_train_state_comes_back_bit_for_bit(opened):
    state = saved(opened)
    other = a_state(seed=1, step=0)
    assert bits(other) != bits(state)
    restored, _ = opened().restore(other)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    drawn = [jax.random.bits(s.key, (4,)).tolist() for s in (restored, state)]
    assert drawn[0] == drawn[1]


def test_a_state_is_restored_from_shapes_alone(opened):
    state = saved(opened)
    assert bits(opened().restore_state(jax.eval_shape(lambda: state))) == bits(state)


def test_the_record_holds_the_config_the_versions_the_step_and_what_loggers_said(opened):
    config = {"seed": 3, "model": {"hidden": (40, 40)}}
    saved(opened, config, loggers={"WandbLogger": {"wandb_id": "abc"}})
    record = opened(config).record()
    assert record["config"] == {"seed": 3, "model": {"hidden": [40, 40]}}
    assert record["step"] == 3 and record["schema"] == 1
    libraries = ("jax", "jaxlib", "optax", "flax", "dm-haiku", "orbax-checkpoint")
    assert record["versions"] == {
        "metalearn": metalearn.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }
    _, loggers = opened(config).restore(a_state())
    assert loggers == {"WandbLogger": {"wandb_id": "abc"}}


def test_a_run_with_another_config_is_refused_with_the_difference(opened, tmp_path):
    old = {"seed": 0, "gone": 1.5, "model": {"name": "mlp", "hidden": (40, 40)}}
    new = {"seed": 0, "model": {"name": "mlp", "hidden": (40, 20)}, "chunk": 4}
    saved(opened, old)
    expected = (
        f"The run in {tmp_path / 'run'} was started with another config:\n"
        "  config.chunk: '(absent)' -> 4\n"
        "  config.gone: 1.5 -> '(absent)'\n"
        "  config.model.hidden: [40, 40] -> [40, 20]\n"
        "Give it the config it had, or train the new one in another workdir; "
        "--allow-config-change goes on all the same."
    )
    with pytest.raises(ChangedConfigError, match=f"^{re.escape(expected)}$"):
        opened(new).restore(a_state())


def test_a_key_of_a_later_version_that_is_not_set_is_no_other_config():
    found = {"config": {"engine_options": {"remat": "step"}, "seed": 0}}
    assert same_config(found, {"engine_options": {"remat": "step", "true_rules": None}, "seed": 0})
    named = {"remat": "step", "true_rules": ["attention"]}
    assert not same_config(found, {"engine_options": named, "seed": 0})
    assert not same_config(found, {"engine_options": {"remat": None}, "seed": 0})


def test_keys_that_a_later_version_brings_change_nothing_while_they_are_unset(opened):
    saved(opened, {"seed": 0})
    opened({"seed": 0, "segment": None, "within": 0}).check_config()
    with pytest.raises(ChangedConfigError, match=r"config.within: '\(absent\)' -> 1"):
        opened({"seed": 0, "within": 1}).check_config()


def test_the_same_config_is_the_same_whether_it_has_tuples_or_lists(opened):
    state = saved(opened, {"hidden": (40, 40)})
    restored, _ = opened({"hidden": [40, 40]}).restore(a_state(seed=1))
    assert bits(restored) == bits(state)


def test_differences_are_found_at_any_depth_and_in_the_order_of_keys():
    old = {"b": {"c": {"d": 1}}, "a": 1, "same": {"x": [1]}}
    assert difference(old, {"b": 2, "a": "1", "same": {"x": [1]}}) == [
        "config.a: 1 -> '1'",
        "config.b: {'c': {'d': 1}} -> 2",
    ]


def test_a_checkpoint_of_a_newer_schema_is_refused_by_name(opened, tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr("metalearn.checkpoints.record.SCHEMA", 2)
        newer.setattr("metalearn.checkpoints.record.__version__", "99.1")
        saved(opened)
    expected = (
        f"The checkpoint in {tmp_path / 'run'} has schema 2, and this version of metalearn reads "
        "schemas up to 1. Resume it with metalearn 99.1, which wrote it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        opened().restore(a_state())


def test_the_last_few_checkpoints_are_kept_and_the_newest_is_restored(opened, tmp_path):
    checkpoints = opened(keep=2)
    for step in range(1, 6):
        checkpoints.save(a_state(step=step), step, {})
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["4", "5"]
    assert opened().latest() == 5
    assert int(opened().restore(a_state())[0].step) == 5


def test_an_empty_directory_returns_the_state_it_was_given(opened):
    state, checkpoints = a_state(), opened({"seed": 0})
    restored, loggers = checkpoints.restore(state)
    assert restored is state and loggers == {}
    assert checkpoints.latest() is None and checkpoints.record() is None


def several(opened, tmp_path, steps=(1, 2, 3), **options):
    """Save a checkpoint at each step; return the directory."""
    checkpoints = opened(keep=len(steps), **options)
    for step in steps:
        checkpoints.save(a_state(seed=step, step=step), step, {"step": step})
    checkpoints.close()
    return tmp_path / "run"


def cut(directory):
    path = largest_file(directory)
    path.write_bytes(path.read_bytes()[:-7])


def cut_unnoticed(directory):
    (directory / "digests.json").unlink()
    for path in (directory / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_the_record(directory):
    shutil.rmtree(directory / "record")


def garble_the_record(directory):
    (directory / "digests.json").unlink()
    for path in (directory / "record").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x00 not JSON")


def garble_the_digests(directory):
    (directory / "digests.json").write_text("[1")


DAMAGE = [flip_a_bit, cut, cut_unnoticed, lose_the_record, garble_the_record, garble_the_digests]


@pytest.mark.parametrize(
    "damage",
    quick(DAMAGE, lambda damage: damage in (cut_unnoticed, lose_the_record)),
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, opened, tmp_path, capsys):
    directory = several(opened, tmp_path)
    damage(directory / "3")
    checkpoints = opened()
    restored, loggers = checkpoints.restore(a_state(seed=9))
    assert bits(restored) == bits(a_state(seed=2, step=2)) and loggers == {"step": 2}
    assert checkpoints.latest() == 2
    said = capsys.readouterr().out
    assert said.count("The checkpoint of outer step 3 in") == 1 and "falling back" in said

    checkpoints.save(a_state(seed=7, step=3), 3, {})  # its place is free again
    checkpoints.wait()
    assert checkpoints.latest() == 3
    checkpoints.save(a_state(seed=8, step=4), 4, {})
    checkpoints.close()
    for step, seed in ((3, 7), (4, 8)):
        assert bits(opened().restore_state(a_state(), step)) == bits(a_state(seed=seed, step=step))
    assert len(list(directory.glob("damaged-3-*"))) == 1


def test_where_all_checkpoints_are_damaged_no_run_begins_anew_in_silence(opened, tmp_path):
    directory = several(opened, tmp_path, steps=(1, 2))
    for step in ("1", "2"):
        flip_a_bit(directory / step)
    name = largest_file(directory / "1").relative_to(directory / "1").parts[0]
    message = rf"^No checkpoint in {re.escape(str(directory))} can be read \(1: {name}/.* is not"
    with pytest.raises(DamagedError, match=message):
        opened().restore(a_state())


def test_the_digests_of_a_checkpoint_name_all_its_files(opened, tmp_path):
    directory = several(opened, tmp_path, steps=(1,)) / "1"
    files = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    assert set(json.loads((directory / "digests.json").read_text())) == files - {"digests.json"}


def test_the_best_checkpoint_is_kept_beside_the_newest(opened, tmp_path):
    for best, expected in (("max eval/accuracy", 2), ("min eval/accuracy", 1)):
        checkpoints = Checkpoints(tmp_path / best[:3], keep=1, best=best)
        for step, accuracy in enumerate((0.5, 0.9, None, math.nan, 0.6), 1):
            metrics = {} if accuracy is None else {"eval/accuracy": accuracy, "eval/loss": 1.0}
            checkpoints.save(a_state(step=step), step, {}, metrics)
        checkpoints.wait()
        assert checkpoints.best_step() == expected and checkpoints.latest() == 5
        restored = checkpoints.restore_state(a_state(), checkpoints.best_step())
        assert int(restored.step) == expected
        checkpoints.close()
        kept = {p.name for p in (tmp_path / best[:3]).iterdir() if p.is_dir()}
        assert kept == {str(expected), "5"}


def test_a_best_that_no_evaluation_has_is_refused_at_the_first(tmp_path):
    checkpoints = Checkpoints(tmp_path, best="max eval/acuracy")
    message = "has no 'eval/acuracy'. Did you mean 'eval/accuracy'? It has: eval/accuracy, eval/lo"
    checkpoints.save(a_state(step=1), 1, {}, {})
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoints.save(a_state(step=2), 2, {}, {"eval/loss": 1.0, "eval/accuracy": 0.5})
    checkpoints.close()


def test_the_best_checkpoint_is_read_without_its_rule(tmp_path):
    trainer = Trainer(
        MAML(Functions(lambda key: jnp.ones(()), lambda a, x: a * x), squared_error),
        tasks_per_step=1,
    )
    first = trainer.init(jax.random.key(0))
    with contextlib.closing(Checkpoints(tmp_path, best="min eval/loss")) as checkpoints:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
            state = dataclasses.replace(first, step=jnp.int32(step))
            checkpoints.save(state, step, {}, {"eval/loss": loss})
    assert int(trainer.restore(tmp_path, best=True).step) == 2
    assert int(trainer.restore(tmp_path).step) == 3


def test_a_best_by_another_metric_than_before_is_found_among_the_new_ones(tmp_path):
    for step, best in ((1, "max eval/accuracy"), (2, "min eval/loss"), (3, "min eval/loss")):
        checkpoints = Checkpoints(tmp_path, {"best": best}, keep=3, best=best, allow_change=True)
        checkpoints.save(a_state(step=step), step, {}, {best[4:]: 1.0 / step})
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=3, best="min eval/loss")
    assert checkpoints.best_step() == 3
    checkpoints.close()


def test_a_step_that_another_run_has_passed_is_refused(opened, tmp_path):
    several(opened, tmp_path)
    message = "^A checkpoint of outer step 2 cannot be written to .*, which has one of step 3"
    with pytest.raises(ValueError, match=message):
        opened().save(a_state(step=2), 2, {})


def test_a_run_that_keeps_no_best_says_so(opened, tmp_path):
    saved(opened)
    expected = f"The run in {tmp_path / 'run'} has no best checkpoint: its config sets no"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        opened().best_step()


@pytest.mark.parametrize("best", ["eval/accuracy", "most eval/accuracy", "max accuracy", "max"])
def test_a_best_that_does_not_say_what_is_refused(best, tmp_path):
    message = f"^checkpoint_best='{best}' says which evaluated metric is best, such as 'max eval"
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, best=best)


def test_a_run_keeps_at_least_one_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="^A run keeps at least its newest checkpoint, not 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_changed_config_can_be_allowed(opened, tmp_path):
    state = saved(opened, {"steps": 10})
    longer = Checkpoints(tmp_path / "run", {"steps": 20}, allow_change=True)
    restored, _ = longer.restore(a_state(seed=1))
    longer.close()
    assert bits(restored) == bits(state)


def test_a_state_of_other_shapes_is_refused_with_the_first_that_differ(opened, tmp_path):
    saved(opened)
    other = dataclasses.replace(a_state(), eta={"w": jnp.zeros(3), "other": jnp.zeros(())})
    message = r"(?s)^The checkpoint of outer step 3 in .* other arrays.*\n  eta/other: '.absent"
    with pytest.raises(ValueError, match=message):
        opened(allow_change=True).restore(other)
    assert opened().latest() == 3  # it is whole


@pytest.mark.parametrize("without", [("pace",), ("inner", "pace")])
def test_a_checkpoint_of_an_older_schema_is_read(without, opened, tmp_path, monkeypatch):
    """Of a pretend schema: written without fields that came later."""
    now = run_record.FIELDS[run_record.SCHEMA]
    before = tuple(name for name in now if name not in without)
    state = a_state()
    fields = {name: state.__dict__[name] for name in before}
    record = run_record.record(3, {}, {}, fields)
    monkeypatch.setattr(run_record, "FIELDS", {record["schema"]: before, 2: now})
    monkeypatch.setattr(run_record, "SCHEMA", 2)
    manager = ocp.CheckpointManager(tmp_path / "run", item_names=("state", "record"))
    items = {"state": ocp.args.StandardSave(fields), "record": ocp.args.JsonSave(record)}
    manager.save(3, args=ocp.args.Composite(**items))
    manager.wait_until_finished()
    manager.close()
    restored, _ = opened().restore(a_state(seed=1))
    assert bits(restored) == bits(state)
    assert restored.pace == 1


FULL = """
import resource, signal, sys
from tests.helpers.checkpoints import a_state
from metalearn.checkpoints.manager import Checkpoints
checkpoints = Checkpoints(sys.argv[1], every=1, keep=5)
checkpoints.save(a_state(step=1), 1, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))  # bytes: as on a disk that is full
for step in (2, 3):
    checkpoints.save(a_state(step=step), step, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
checkpoints.save(a_state(step=4), 4, {})
checkpoints.close()
print("latest", checkpoints.latest())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limits to the size of a file")
def test_a_disk_that_is_full_does_not_end_the_run(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "could not be written" in line]
    assert len(said) == 2 and "the newest one is of outer step 1. Training goes on" in said[0]
    assert done.stdout.splitlines()[-1] == "latest 4"
    kept = sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir())
    assert kept == ["1", "4"]
