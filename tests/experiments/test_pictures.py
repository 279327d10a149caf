"""Pictures of a run of FDS: drawn at its end, logged, and drawn again by a command."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from metalearn import Forward
from metalearn.algorithms import FDS, Hyperparameter, load_schedules, sgd
from metalearn.algorithms.fds import pictures as drawing
from metalearn.experiments.commands import pictures, run
from metalearn.experiments.configs import fds_digits
from metalearn.experiments.runs import load_run
from metalearn.loggers import Logger
from tests.helpers.command_line import call
from tests.helpers.wandb_runs import records_of

# ml-collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

PNG = b"\x89PNG"
HORIZON = 21
DRAWN = ["curves", "learning_rate", "loss", "momentum", "tangents", "weight_decay"]


def config():
    """Two outer steps of three windows of seven steps, logged by W&B on disk."""
    config = fds_digits.get_config()
    config.algorithm.inner_steps, config.model.hidden = HORIZON, (4,)
    config.algorithm.hyperparameters.learning_rate.windows = 3
    config.engine, config.engine_options.remat = "forward", ""  # five directions
    config.health, config.wandb.mode = False, "offline"
    config.steps, config.test_tasks = 2, 1
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that has ended."""
    workdir = tmp_path_factory.mktemp("fds") / "run"
    run.train(config(), workdir, progress=False)
    return workdir


@pytest.fixture(scope="module")
def found(workdir):
    return load_run(workdir)


@pytest.mark.slow
def test_a_run_draws_what_its_config_names_and_logs_it(workdir):
    drawn = sorted(workdir.glob("pictures/*.png"))
    assert [path.stem for path in drawn] == DRAWN
    assert all(path.read_bytes().startswith(PNG) for path in drawn)
    (logged,) = workdir.glob("wandb/offline-run-*")
    images = logged.glob("files/media/images/pictures/*.png")
    assert sorted(re.sub(r"_\d+_[0-9a-f]+$", "", path.stem) for path in images) == DRAWN
    *_, last = (record["history"] for record in records_of(logged) if record["type"] == "history")
    row = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"]["num"] == row.pop("step") == 2
    assert row.items() <= last["item"].items()  # no picture has taken the place of a number
    assert last["item"]["pictures/loss._type"] == "image-file"


@pytest.mark.slow
def test_tangents_are_those_of_the_hypergradient_of_the_next_outer_step(workdir, found):
    _, metrics = found.trainer.step(found.state, found.splits.train)
    begins = {name: found.trainer.algorithm.edges(name)[:-1] for name in found.state.eta}
    lines = drawing.tangent_norms(found.trainer, found.state, found.splits.train, begins)
    rates = [f"learning_rate/{window}" for window in range(3)]
    assert sorted(lines) == sorted([*rates, "momentum/0", "weight_decay/0"])
    for window, name in enumerate(rates):
        assert (lines[name] > 0).tolist() == [t >= 7 * window for t in range(HORIZON)]
    largest = max(line[-1] for line in lines.values())
    np.testing.assert_allclose(largest, metrics["inner_tangent_norm"], rtol=1e-5)
    table = (workdir / "pictures" / "tangents.md").read_text()
    assert table.startswith("Outer step 3:\n\n| tangent of |")
    assert table.splitlines() == drawing.tangent_table(lines, 3)
    assert drawing.tangent_figure(lines, 3).get_suptitle() == "outer step 3"


@pytest.mark.slow
def test_a_command_draws_a_run_again(workdir, capsys):
    before = {path: path.read_bytes() for path in (workdir / "pictures").iterdir()}
    for path in before:
        path.unlink()
    assert call("draw", f"--workdir={workdir}") == 0
    assert sorted(capsys.readouterr().out.split()) == sorted(map(str, before))
    assert (workdir / "pictures" / "tangents.md") in before
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_a_run_that_had_ended_is_not_drawn_again(workdir):
    (workdir / "pictures").rename(workdir / "drawn")
    plain = config()
    plain.pictures = ("schedules",)  # what is drawn may change
    run.train(plain, workdir, progress=False)
    assert not (workdir / "pictures").exists()
    (workdir / "drawn").rename(workdir / "pictures")


@pytest.mark.slow
def test_schedules_are_exported_as_they_were_learned(workdir, found, capsys):
    run.export(workdir)
    assert str(workdir / "schedules.json") in capsys.readouterr().out
    learned = load_schedules(workdir / "schedules.json")
    assert learned == found.trainer.algorithm.schedules(found.state.eta)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["tangent"], r"No picture of FDS is called 'tangent'\. Did you mean 'tangents'\?"),
        ([[1, 2]], r"No picture of FDS is called '\[1, 2\]'"),
    ],
)
def test_a_picture_that_there_is_not_is_refused(found, kinds, message):
    with pytest.raises(ValueError, match=message):
        pictures.check(kinds, found.trainer.algorithm)


def test_pictures_of_a_run_that_learns_no_schedules_are_refused_before_it_starts(tmp_path, capsys):
    words = "train", "--config=maml_sinusoid", "--config.wandb.mode=disabled"
    assert call(*words, "--config.pictures=('schedules',)", f"--workdir={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert "No picture of MAML is called 'schedules'. There are: adaptation" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class Shown(Logger):
    """Remembers what it was shown."""

    def __init__(self):
        self.names = []

    def log(self, step, metrics):
        raise AssertionError("no step is taken")

    def show(self, pictures):
        self.names += pictures


@pytest.mark.slow
def test_what_cannot_be_drawn_fails_no_run_and_says_why(workdir, found, monkeypatch, capsys):
    logger, kinds = Shown(), ["tangents", "schedules"]
    trainer = dataclasses.replace(found.trainer, engine=Forward(max_directions=4))  # there are 5
    run._show(kinds, workdir, trainer, found.state, found.splits, [logger])
    said = capsys.readouterr().out
    assert "The tangents are not drawn: `Forward()` pushes one" in said
    assert f"Pictures in {workdir / 'pictures'}: loss.png, learning_rate.png, " in said
    names = [f"pictures/{name}" for name in DRAWN if name not in ("tangents", "curves")]
    assert sorted(logger.names) == names

    monkeypatch.setattr(FDS, "pictures", lambda self: {"schedules": lambda *_: 1 / 0})
    run._show(["schedules"], workdir, trainer, found.state, found.splits, [logger])
    assert "The schedules are not drawn: division by zero" in capsys.readouterr().out


@pytest.mark.slow
def test_tangents_of_outer_steps_in_segments_wait_for_the_command(workdir, found, capsys):
    cut = dataclasses.replace(found.trainer, engine=Forward(), segment=5)
    run._show(["tangents"], workdir, cut, found.state, found.splits, [])
    assert f"in one program of one process: `metalearn draw --workdir={workdir}`" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_the_command_draws_tangents_of_outer_steps_in_segments(workdir, found, monkeypatch, capsys):
    cut = dataclasses.replace(found.trainer, engine=Forward(), segment=5)
    monkeypatch.setattr(
        run, "load_run", lambda workdir, **options: dataclasses.replace(found, trainer=cut)
    )
    run.draw(workdir)
    assert str(workdir / "pictures" / "tangents.png") in capsys.readouterr().out


# Of what was logged.


def fds(**windows):
    """An algorithm that learns these hyperparameters, of twenty inner steps."""
    learned = {name: Hyperparameter(0.1, 1.0, 0.5, windows=n) for name, n in windows.items()}
    return FDS(None, learned, inner_steps=20, batch=2, optimizer=sgd)


def spaces(learner):
    return {name: chosen.space for name, chosen in learner.hyperparameters.items()}


LEARNER = fds(momentum=1, learning_rate=(0, 4, 20), weight_decay=12)


def write_run(workdir, **extra):
    rows = [
        {"step": i, "loss": 1 / i, "momentum/0": 0.5, "learning_rate/mean": 0.1, **extra}
        | {f"weight_decay/{w}": 10.0 ** (-i - w) for w in range(12)}
        for i in (1, 2, 3)
    ]
    rows.append({"step": 3, "eval/loss": 1.0, "eval/momentum/0": 0.5})
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


def test_windows_are_drawn_in_their_order_and_evaluations_are_left_out(tmp_path):
    rows = write_run(tmp_path)
    values = drawing.logged_values(drawing.read_steps(tmp_path), LEARNER.hyperparameters)
    assert {name: x.shape for name, x in values.items()} == {
        "momentum": (3, 1),
        "learning_rate": (3, 1),
        "weight_decay": (3, 12),
    }
    np.testing.assert_array_equal(
        values["weight_decay"][:, 10], [r["weight_decay/10"] for r in rows[:3]]
    )


@pytest.mark.parametrize("windows", [12, 10])  # 12 were logged
def test_infinite_values_means_and_what_another_config_logged_are_drawn(tmp_path, windows):
    write_run(tmp_path, inner_tangent_norm=float("inf"))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.2, "momentum/0": 0.4}\n')
    learner = fds(momentum=1, learning_rate=2, weight_decay=windows)
    learned = learner.schedules(learner.init(jax.random.key(0)))
    figures = drawing.schedule_figures(drawing.read_steps(tmp_path), spaces(learner), learned)
    assert list(figures) == ["loss", "momentum", "learning_rate", "weight_decay"]
    for figure in figures.values():
        figure.savefig(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


def test_the_learned_schedule_is_drawn_over_those_that_were_tried(tmp_path):
    write_run(tmp_path)
    rows, learned = drawing.read_steps(tmp_path), LEARNER.schedules(LEARNER.init(jax.random.key(0)))
    changed = dataclasses.replace(learned["weight_decay"], values=tuple(range(1, 13)))
    both = learned | {"weight_decay": changed}
    figure = drawing.schedule_figures(rows, spaces(LEARNER), both)["weight_decay"]
    *tried, last = figure.axes[0].patches
    logged = [[row[f"weight_decay/{w}"] for w in range(12)] for row in rows[:3]]
    np.testing.assert_array_equal([line.get_data().values for line in tried], logged)
    assert last.get_label() == "learned"
    np.testing.assert_array_equal(last.get_data().values, changed.values)
    np.testing.assert_allclose(last.get_data().edges, np.asarray(changed.edges) / 20)


def test_of_a_schedule_logged_as_its_mean_the_learned_one_is_drawn(tmp_path):
    write_run(tmp_path)
    learned = LEARNER.schedules(LEARNER.init(jax.random.key(0)))
    figure = drawing.schedule_figures(drawing.read_steps(tmp_path), spaces(LEARNER), learned)[
        "learning_rate"
    ]
    (line,) = figure.axes[0].patches
    assert line.get_label() == "learned"
    np.testing.assert_allclose(line.get_data().edges, [0, 0.2, 1])


def test_windows_lie_where_the_algorithm_has_them():
    learned = LEARNER.schedules(LEARNER.init(jax.random.key(0)))
    cuts = drawing.ends(learned, {"learning_rate": np.ones((1, 2)), "momentum": np.ones((1, 1))})
    np.testing.assert_allclose(cuts["learning_rate"], [0, 0.2, 1])
    np.testing.assert_allclose(cuts["momentum"], [0, 1])


def test_a_workdir_without_a_run_is_refused_and_says_how_to_get_one(tmp_path):
    with pytest.raises(ValueError, match="no outer steps in .*metrics.jsonl.*metalearn train"):
        drawing.read_steps(tmp_path)
