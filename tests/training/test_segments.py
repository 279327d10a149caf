"""Outer steps in segments: the same step in several programs, saved and stopped between them."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import ES, Algorithm, Faults, Forward, Trainer, Truncation
from metalearn.algorithms.fds import schedule as windows
from metalearn.checkpoints.manager import ChangedConfigError, Checkpoints
from metalearn.cost import cost
from metalearn.experiments.runs import load_run
from metalearn.training.faults import NonFiniteError
from metalearn.training.outer_loop import Interrupted
from metalearn.training.progress import Bars, bars
from metalearn.training.replay_schedule import Position
from metalearn.training.segment_plan import Progress
from metalearn.unroll import Unroll
from tests.helpers.checkpoints import bits, flip_a_bit
from tests.helpers.selection import quick
from tests.helpers.walks import MIX, Aims

KEY = jax.random.key(0)
HORIZON, SEGMENT = 30, 8  # the last segment has 6 steps
STOPS = [8, 16, 24, 30]


@dataclasses.dataclass(frozen=True)
class Descent(Algorithm):
    """Gradient descent with noise, its rate in four windows, and one factor on where it starts."""

    horizon: int = HORIZON

    def init(self, key):
        del key
        return {"rate": jnp.full(4, 0.02), "scale": jnp.asarray(1.0)}

    def unroll(self, episode, key):
        edges = windows.edges(4, self.horizon)
        noise_key = jax.random.fold_in(key, 1)

        def step(eta, theta, batch, grad):
            noise = jax.random.normal(jax.random.fold_in(noise_key, batch), (3,))
            aim = episode.query + 0.1 * noise
            slope = grad(lambda x: jnp.sum(jnp.tanh(MIX @ (x - aim)) ** 2))(theta)
            return theta - eta["rate"][windows.window_of(batch, edges)] * slope

        return Unroll(
            lambda eta: eta["scale"] * jax.random.normal(key, (3,)),
            step,
            lambda eta, theta: (jnp.sum((theta - episode.query) ** 2), {}),
            begins={"rate": edges[:-1], "scale": np.zeros((), int)},
        )

    def batches(self, episode, key):
        del episode, key
        return jnp.arange(self.horizon)


def trainer(**options):
    return made_once(**{"engine": Forward(), "segment": SEGMENT, "tasks": 2, **options})


@functools.cache  # and with a trainer its compiled programs
def made_once(engine, segment, tasks, **options):
    given = {"engine": engine, "segment": segment, "tasks_per_step": tasks}
    return Trainer(Descent(), optimizer=optax.adam(0.01), **given, **options)


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


OPTIONS = {
    "plain": {},
    "one task": {"tasks": 1},
    "chunks": {"chunk": 1},
    "isolated": {"isolate": True},
    "random directions": {"engine": Forward(directions=3)},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_outer_step_in_segments_is_the_one_in_a_single_program(options, x64):
    whole, cut = trainer(**{**options, "segment": None}), trainer(**options)
    expected, found = (made.init(KEY, Aims()) for made in (whole, cut))
    for _ in range(2):
        expected, seen = whole.step(expected, Aims())
        found, metrics = cut.step(found, Aims())
        close((found.eta, found.optimizer), (expected.eta, expected.optimizer))
        close(metrics, seen)
    assert metrics.keys() == seen.keys() and int(found.step) == 2


def test_a_step_goes_on_from_where_its_state_stands(x64):
    made = trainer()
    segments, state = made.segments(Aims()), made.init(KEY, Aims())
    assert segments.programs_in_all == len(STOPS)
    expected, _ = made.step(state, Aims())
    for programs, stop in enumerate(STOPS[:2], 1):
        state, metrics = segments.take(state, Aims())
        place = segments.progress(state)
        assert metrics is None and int(state.step) == 0
        assert (place.programs, place.of, place.inner_step) == (programs, 4, stop)
    found, _ = made.step(state, Aims())
    assert bits(found) == bits(expected)


@pytest.mark.slow
def test_segments_of_the_same_length_and_tangents_share_a_program():
    made = trainer(segment=2)
    assert made.segments(Aims()).programs_in_all == 15
    state = made.init(KEY, Aims())
    for _ in range(2):
        state, _ = made.step(state, Aims())
    assert made._programs.advance._cache_size() <= 4  # one for each of four windows


@pytest.mark.slow
def test_windows_that_have_not_begun_cost_nothing():
    segments = trainer().segments(Aims())
    states = [segments._shapes(Position(4, live, 4)) for live in range(3)]
    flops = [cost(jax.jit(segments.take), state, Aims()).flops for state in states]
    assert flops[0] < flops[1] < flops[2]


@pytest.mark.slow
def test_between_outer_steps_nothing_is_kept_of_inner_runs():
    state, _ = trainer().step(trainer().init(KEY), Aims())
    assert state.inner == ()


@pytest.mark.slow
def test_the_programs_of_a_step_are_traced_once():
    made = trainer()
    assert made.segments(Aims()) is made.segments(Aims())
    assert made.step(made.init(KEY), Aims())[1]["loss"] > 0


# On the way.


class Asked:
    """Asks a run to stop after so many programs, once."""

    def __init__(self, at):
        self.at = at

    def __call__(self, number):
        return "SIGTERM" if number == self.at else None


def fit(made, steps, directory=None, config=None, **options):
    keeps = None
    if directory is not None:
        given = {name: options.pop(name) for name in ("within", "allow_change") if name in options}
        keeps = Checkpoints(directory, config or {}, every=1, **given)
    try:
        return made.fit(Aims(), steps, key=KEY, checkpoints=keeps, **{"progress": False, **options})
    finally:
        if keeps is not None:
            keeps.close()


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")], ids=str)
def test_a_run_goes_on_and_is_restored_whatever_its_key_is(key, tmp_path):
    whole = trainer().fit(Aims(), 2, key=key, progress=False)
    again = functools.partial(trainer().fit, Aims(), 2, key=key, progress=False)
    with contextlib.closing(Checkpoints(tmp_path, every=1)) as keeps, pytest.raises(Interrupted):
        again(checkpoints=keeps, asked_to_stop=Asked(2))
    asked = []
    with contextlib.closing(Checkpoints(tmp_path, every=1)) as keeps:
        state = again(checkpoints=keeps, asked_to_stop=lambda number: asked.append(number))
    assert asked[0] == 3 and bits(state) == bits(whole)
    assert bits(trainer().restore(tmp_path)) == bits(whole)


def stopped(made, directory, at, **options):
    with pytest.raises(Interrupted) as caught:
        fit(made, 3, directory, asked_to_stop=Asked(at), **options)
    return str(caught.value)


def test_a_run_that_is_stopped_inside_outer_steps_ends_with_the_same_bits(tmp_path):
    made = trainer()
    said = stopped(made, tmp_path, 2)
    assert said == (
        "SIGTERM after inner step 16 of 30 of outer step 1 of 3. It is saved, and the same "
        "command goes on."
    )
    assert "inner step 24 of 30 of outer step 2" in stopped(made, tmp_path, 4 + 3)
    assert "inner step 8 of 30 of outer step 3" in stopped(made, tmp_path, 8 + 1)
    found = fit(made, 3, tmp_path)
    expected = fit(made, 3)
    assert bits((found.eta, found.optimizer, found.step)) == bits(
        (expected.eta, expected.optimizer, expected.step)
    )


def test_a_run_stopped_inside_its_first_outer_step_has_no_eta_to_evaluate_yet(tmp_path):
    stopped(trainer(), tmp_path / "checkpoints", 2)
    with pytest.raises(ValueError, match="it is at inner step 16 of 30 of its first"):
        load_run(tmp_path)


def count_taken(made, directory, **options):
    """The programs that a run takes from where it goes on."""
    asked = []
    fit(made, 3, directory, asked_to_stop=lambda number: asked.append(number), **options)
    return asked


def test_a_run_is_saved_every_so_many_segments_and_the_newest_save_counts(tmp_path):
    made = trainer()
    stopped(made, tmp_path, 4 + 3, within=2)  # outer step 2 has saved after 2 and after 3
    assert count_taken(made, tmp_path)[0] == 4 + 4
    # Those inside are older than the newest whole step now.
    assert count_taken(made, tmp_path) == []


def test_a_damaged_save_inside_a_step_falls_back_to_the_last_whole_one(tmp_path, capfd):
    made = trainer()
    stopped(made, tmp_path, 4 + 3)
    flip_a_bit(next(tmp_path.glob("within/*")))
    taken = count_taken(made, tmp_path)
    assert taken[0] == 4 + 1
    said = capfd.readouterr().out
    assert re.search(r"inside an outer step, in .*, is damaged \(state/.* is not what was", said)


def test_another_config_is_refused_inside_a_step_too(tmp_path):
    stopped(trainer(), tmp_path, 2, config={"seed": 0})
    with pytest.raises(ChangedConfigError, match=r"config.seed: 0 -> 1"):
        fit(trainer(), 3, tmp_path, config={"seed": 1})


def test_another_segment_does_not_go_on_inside_a_step(tmp_path):
    stopped(trainer(), tmp_path, 1)
    with pytest.raises(ValueError, match="step 8 of an outer step that is cut into segments of 8"):
        fit(trainer(segment=5), 3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("segment", [2, SEGMENT, 15])
def test_a_run_that_saves_inside_steps_backs_off(segment, tmp_path):
    """While the last save inside the step that is taken back may still be on its way."""
    options = {"within": 1, "faults": Faults(nonfinite="back_off", most=2)}
    with pytest.raises(NonFiniteError, match="after 2 times of backing off"):
        fit(wild(segment), 3, tmp_path, **options)
    assert not list(tmp_path.glob("within/[0-9]*"))


@pytest.mark.slow
def test_nothing_is_kept_of_a_step_that_ends_the_run(tmp_path):
    with pytest.raises(NonFiniteError):
        fit(wild(SEGMENT), 3, tmp_path, within=1)
    assert not list(tmp_path.glob("within/[0-9]*"))
    found = fit(dataclasses.replace(trainer(), optimizer=optax.sgd(0.0)), 1, tmp_path)
    assert int(found.step) == 1  # from the whole step before it


def test_a_step_that_began_under_another_config_begins_anew(tmp_path, capfd):
    stopped(trainer(), tmp_path, 4 + 3, config={"seed": 0})
    taken = count_taken(trainer(), tmp_path, config={"seed": 1}, allow_change=True)
    assert taken[0] == 4 + 1
    said = capfd.readouterr().out
    assert "inside outer step 2 is of another config: it begins anew" in said
    # What was saved inside it is of no further account.
    assert count_taken(trainer(), tmp_path, config={"seed": 1}) == []


@pytest.mark.parametrize(
    ("before", "after"),
    quick([(None, SEGMENT), (SEGMENT, None)], lambda before, after: after is None),
)
def test_a_run_may_be_cut_from_an_outer_step_on(before, after, tmp_path):
    fit(trainer(segment=before), 1, tmp_path)
    assert int(fit(trainer(segment=after), 2, tmp_path).step) == 2


def explodes():
    """An outer optimizer whose first update ruins every run after it."""

    def update(grads, state, eta=None):
        del eta
        return jax.tree.map(lambda x: jnp.full_like(x, 1e38), grads), state

    return optax.GradientTransformation(lambda eta: (), update)


@functools.cache
def wild(segment):
    return dataclasses.replace(trainer(segment=segment), optimizer=explodes())


def test_a_resumed_run_says_where_it_goes_on(tmp_path, capfd):
    stopped(trainer(), tmp_path, 4 + 3)
    fit(trainer(), 3, tmp_path)
    said = capfd.readouterr().out
    assert "Going on from outer step 1 of 3, inner step 24 of 30 of the next." in said
    fit(trainer(), 3, tmp_path)
    assert "Going on" not in capfd.readouterr().out


def test_saves_inside_outer_steps_of_one_program_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"it is one program: set `Trainer\(segment=\)` too"):
        fit(trainer(segment=None), 1, tmp_path, within=1)


def test_the_bar_of_segments_moves(monkeypatch):
    shown = []
    monkeypatch.setattr(Bars, "stands_at", lambda self, place, state: shown.append(place(state)))
    fit(trainer(), 2, progress=True)
    assert [place.inner_step for place in shown] == [0, 8, 16, 24, 0, 8, 16, 24]
    assert {place.phase for place in shown} == {"forward"}


def test_a_bar_of_segments_is_set_and_begun_anew(capfd):
    def place(work):
        return Progress("replay", 8 * work, 30, work, 4, work, 4)

    with bars(3, 0, 2, segmented=True) as both:
        both._inner.mininterval = 0
        for work in (2, 1):
            both.stands_at(place, work)
            assert both._inner.n == work and both._inner.total == 4
    said = capfd.readouterr().err
    assert "replaying" in said and "inner step 16 of 30" in said


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, r"segment=0"),
        ({"segment": 2.5}, r"^`Trainer\(segment=2.5\)`: it is an integer, 1 or more\.$"),
        ({"engine": ES()}, r"`ES` does not differentiate them: it estimates from the losses"),
        ({"truncation": Truncation(10)}, "Choose one"),
    ],
)
def test_segments_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options)


def test_a_segment_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="longer than the horizon, which is 30"):
        trainer(segment=31).segments(Aims())
