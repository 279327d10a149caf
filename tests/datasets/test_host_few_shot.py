"""Few-shot tasks of data on the host: the same bits as on the device, and clear refusals."""

import contextlib
import os
import signal
import sys
import threading

import jax
import numpy as np
import pytest

from metalearn import Forward, Layout, Truncation, make_mesh
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets import FewShot, HostFewShot
from metalearn.tasks import draw_episode, fetched
from tests.helpers.checkpoints import bits
from tests.helpers.few_shot_data import SIZES, Pairs, Records, differences, images, trainer
from tests.helpers.processes import program
from tests.helpers.selection import quick

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 4)
PIXELS, LABELS = images()


def mapped(path, values=PIXELS):
    """A memory-mapped file that holds values."""
    file = np.memmap(path, values.dtype, "w+", shape=values.shape)
    file[:] = values
    file.flush()
    return np.memmap(path, values.dtype, "r", shape=values.shape)


def both(inputs=PIXELS, **options):
    """The same tasks on the device and on the host."""
    sizes = {**SIZES, **options}
    device = FewShot.from_arrays(inputs, LABELS, **sizes)
    return device, HostFewShot.create(inputs, LABELS, **sizes)


def host(source, labels=None, **options):
    return HostFewShot.create(source, labels, **{**SIZES, "progress": False, **options})


SOURCES = {
    "array": lambda path: host(PIXELS, LABELS),
    "names": lambda path: host(PIXELS, [f"class {label}" for label in LABELS]),
    "memmap": lambda path: host(mapped(path), LABELS),
    "pairs": lambda path: host(Pairs(PIXELS, LABELS)),
    "threads": lambda path: host(Pairs(PIXELS, LABELS), threads=3),
    "records": lambda path: host(Records(PIXELS, LABELS), inputs="image"),
    "function": lambda path: host(Records(PIXELS, LABELS), inputs=lambda item: item["image"]),
    "list": lambda path: host([*zip(PIXELS, LABELS, strict=True)]),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_key_draws_the_same_bits_as_on_the_device(source, tmp_path):
    device, _ = both()
    tasks = SOURCES[source](tmp_path / "data")
    expected = bits(jax.vmap(device.sample)(KEYS))
    assert bits(jax.vmap(tasks.fetch(KEYS).sample)(KEYS)) == expected
    if source in ("memmap", "pairs"):
        assert bits(jax.jit(jax.vmap(tasks.sample))(KEYS)) == expected
        assert bits(tasks.sample(KEYS[1])) == bits(device.sample(KEYS[1]))


@pytest.mark.parametrize(
    ("inputs", "scale"),
    [
        (np.linspace(-300, 300, 180, dtype=np.float32).reshape(60, 3), None),
        (np.linspace(-300, 300, 180).reshape(60, 3), 0.5),  # float64
        (np.arange(60, dtype=np.int64), None),
        ({"image": PIXELS, "tokens": np.arange(120).reshape(60, 2)}, {"image": 1, "tokens": None}),
        ((PIXELS, PIXELS[:, 0, 0, 0] > 9), None),
    ],
)
@pytest.mark.parametrize("wide", quick([False, True], lambda wide: not wide))
def test_inputs_of_any_type_and_structure_are_the_same_bits(inputs, scale, wide):
    with jax.enable_x64(wide):
        device, tasks = both(inputs, scale=scale)
        expected = bits(device.sample(KEY))
        assert bits(tasks.fetch(KEY[None]).sample(KEY)) == expected == bits(tasks.sample(KEY))


def test_what_was_fetched_for_other_keys_is_no_data():
    _, tasks = both()
    support, _ = tasks.fetch(KEYS).sample(jax.random.key(9))
    assert np.isnan(support[0]).all() and (support[1] == 2**31 - 1).all()


def test_fetched_tasks_have_the_episodes_of_the_tasks_of_a_step():
    device, tasks = both()
    assert fetched(device, KEYS, 0, trainer().algorithm) is device
    small = fetched(tasks, KEYS, 0, trainer().algorithm)
    for key in KEYS:
        assert bits(draw_episode(small, key)) == bits(draw_episode(device, key))


def test_keys_whose_numbers_depend_on_vmap_are_refused():
    _, tasks = both()
    with pytest.raises(ValueError, match="The keys of this run are 'rbg', .* default implementat"):
        trainer().fit(tasks, 1, key=jax.random.key(0, impl="rbg"), progress=False)


def test_host_fed_training_gives_the_eta_of_training_on_the_device():
    device, tasks = both()
    options = {"key": KEY, "eval_every": 10, "eval_tasks": 3, "progress": False}
    etas = [trainer().fit(t, 20, held_out=t, **options).eta for t in (device, tasks)]
    assert differences(*etas) < 1e-6
    assert differences(etas[0], trainer().init(KEY).eta) > 1e-3


@pytest.mark.slow
def test_evaluations_and_a_single_step_read_from_the_host_too():
    device, tasks = both()
    learner = trainer()
    state = learner.init(KEY, tasks)
    means = [learner.evaluate(state.eta, t, KEY, 5)["loss"].mean for t in (device, tasks)]
    assert means[0] == pytest.approx(means[1], rel=1e-6)
    ours, _ = learner.step(state, learner.fetch(tasks, state))
    theirs, _ = learner.step(state, device)
    called_back, _ = learner.step(state, tasks)
    assert differences(ours.eta, theirs.eta) < 1e-6 > differences(called_back.eta, theirs.eta)
    grads = [learner.task_gradient(state.eta, t, KEY)[0] for t in (device, tasks)]
    assert differences(*grads) < 1e-6
    learner.check_memory(tasks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"truncation": Truncation(1), "inner_steps": 2},
        {"segment": 1, "engine": Forward(), "inner_steps": 2},
        {"layout": Layout(make_mesh())},
    ],
    ids=["truncated", "segmented", "mesh"],
)
def test_every_kind_of_outer_step_may_be_fed_by_the_host(options):
    device, tasks = both()
    etas = [trainer(**options).fit(t, 2, key=KEY, progress=False).eta for t in (device, tasks)]
    assert differences(*etas) < 1e-6


class Breaking(Pairs):
    """A source that breaks once a number of items is read."""

    def __init__(self, most, how):
        super().__init__(PIXELS, LABELS)
        self.most, self.how = most, how

    def __len__(self):
        gone = len(self.reads) > self.most and self.how == "shrinks"
        return 7 if gone else super().__len__()

    def __getitem__(self, row):
        item = super().__getitem__(row)
        if len(self.reads) > self.most:
            if self.how == "raises":
                raise OSError("the disk is gone")
            if self.how == "misses":
                raise IndexError(f"no row {row}")
            if self.how == "reshapes":
                return item[0][:2], item[1]
        return item


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "the disk is gone"),
        (
            "shrinks",
            "The source `Breaking` had 60 examples when the tasks were made, and now it has 7: it "
            "has shrunk while it is read. .* write new data elsewhere, and begin again",
        ),
        ("misses", r"and now a row of it is missing \(no row \d+\): it has shrunk"),
        (
            "reshapes",
            r"Item \d+ of the source `Breaking` is uint8\[2, 4, 1\], but item 0 is "
            r"uint8\[4, 4, 1\], and the inputs of a task become one array",
        ),
    ],
)
def test_a_source_that_breaks_ends_the_run_with_its_error_and_the_thread(how, message):
    tasks = host(Breaking(100, how), LABELS)
    with pytest.raises((OSError, ValueError), match=message):
        trainer().fit(tasks, 20, key=KEY, progress=False)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_a_file_that_is_cut_while_it_is_read_is_refused_before_it_ends_the_process(tmp_path):
    tasks = host({"a": mapped(tmp_path / "data")}, LABELS)
    tasks.fetch(KEYS)
    os.truncate(tmp_path / "data", 100)
    with pytest.raises(ValueError, match=r"its file .*data has 100 bytes of 960: it has shrunk"):
        tasks.fetch(KEYS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: host(iter([])), "has no rows. A task reads rows from anywhere"),
        (lambda: host(i for i in range(3)), "got a generator, which has no rows"),
        (lambda: host(PIXELS), "got arrays and no labels. Pass `labels`, an array"),
        (lambda: host(PIXELS, LABELS[:5]), r"a source of 60 rows and labels of shape \[5\]"),
        (lambda: host(PIXELS, LABELS * 1.0), "`HostFewShot` got labels of float64"),
        (lambda: host(PIXELS, LABELS * 0), "got examples of one class: every label is 0"),
        (lambda: host(PIXELS, LABELS, ways=11), "got ways=11, but the index has 10 classes"),
        (lambda: host(PIXELS, LABELS, shots=1.0), r"`FewShot\(shots=1.0\)`: it is an integer"),
        (lambda: host(PIXELS.reshape(60, 16), LABELS), "uint8 inputs, an example of which has"),
        (lambda: host([]), "The source `list` is empty: its length is 0"),
        (lambda: host(Records(PIXELS, LABELS)), r"items of .*inputs=\"image\", or with a function"),
        (
            lambda: host(Records(PIXELS, LABELS), inputs="picture"),
            "a dict with the keys 'image', 'label', 'id', of which inputs='picture' is no part",
        ),
        (lambda: host([*PIXELS]), r"has a label of uint8\[4, 1\], but a label says which class"),
        (lambda: host([1.0, 2.0]), "items that are a float, of which label=1 is no part"),
        (lambda: host(Pairs(PIXELS, LABELS), threads=0), r"`HostFewShot\(threads=0\)`: it is"),
    ],
)
def test_a_source_that_makes_no_tasks_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_reading_the_labels_shows_its_progress(capfd):
    host(Pairs(PIXELS, LABELS), progress=True)
    assert "reading labels: 100%" in capfd.readouterr().err


STEPS = 12
RUN = """
import pathlib, sys, jax
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets import HostFewShot
from tests.helpers.few_shot_data import SIZES, images, trainer

tasks, directory = HostFewShot.create(*images(), **SIZES), pathlib.Path(sys.argv[1])

def kill(step):
    if step == 7:
        import os, signal
        checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints = Checkpoints(directory, every=3)
trainer().fit(tasks, 12, key=jax.random.key(0), progress=False, checkpoints=checkpoints,
              asked_to_stop=kill)
"""


@pytest.mark.slow
def test_a_host_fed_run_that_is_killed_resumes_to_the_same_bits(tmp_path):
    process = program(RUN, str(tmp_path / "killed"))
    assert process.returncode == -signal.SIGKILL, process.stderr
    _, tasks = both()
    states = []
    for name in ("killed", "whole"):
        with contextlib.closing(Checkpoints(tmp_path / name, every=3)) as checkpoints:
            assert checkpoints.latest() == {"killed": 6, "whole": None}[name]
            options = {"key": KEY, "progress": False, "checkpoints": checkpoints}
            states.append(trainer().fit(tasks, STEPS, **options))
    assert bits(states[0]) == bits(states[1])


LARGE = """
import sys
import jax, numpy as np
from metalearn.datasets import HostFewShot
from tests.helpers.anonymous_memory import printed_peak
from tests.helpers.few_shot_data import SIZES, linear, trainer
from metalearn.algorithms import MAML
from metalearn import Trainer

with printed_peak():
    rows = 2 * 10**9 // 784
    file = np.memmap(sys.argv[1], np.uint8, "r", shape=(rows, 28, 28, 1))
    tasks = HostFewShot.create(file, np.arange(rows) % 10_000, **SIZES)
    learner = Trainer(MAML(linear(width=784)), tasks_per_step=32)
    state = learner.fit(tasks, 20, key=jax.random.key(0), progress=False)
    learner.evaluate(state.eta, tasks, jax.random.key(1), 100)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is in /proc")
def test_a_file_of_2_gb_is_trained_on_in_less_than_1_gb_of_anonymous_memory(tmp_path):
    (tmp_path / "data").touch()
    os.truncate(tmp_path / "data", 2 * 10**9)  # sparse
    process = program(LARGE, str(tmp_path / "data"))
    assert process.returncode == 0, process.stderr
    assert 10**8 < int(process.stdout) < 10**9
