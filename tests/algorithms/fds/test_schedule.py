"""Schedules and windows: stretched to any length, and refused where they are none."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalearn.algorithms import FDS, Hyperparameter, Schedule, load_schedules, save_schedules
from metalearn.algorithms.fds.schedule import edges
from metalearn.algorithms.fds.schedule import stretched as stretched_edges
from tests.cases import MODELS

UNEVEN = Schedule((0, 4, 8, 11), (0.5, 0.3, 0.1))


def by_step(schedule, steps=None):
    """The value of each step, by reading edges and values."""
    found = np.repeat(np.arange(len(schedule.values)), np.diff(schedule.edges))
    return [schedule.values[i] for i in found[:steps]]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, [0.5]), (2, [0.5, 0.3]), (3, [0.5, 0.5, 0.3]), (4, [0.5, 0.5, 0.3, 0.1])],
)
def test_a_schedule_of_fewer_steps_than_windows_leaves_out_those_no_step_is_in(steps, expected):
    short = UNEVEN.stretched(steps)
    assert short.horizon == steps and by_step(short) == expected
    assert (np.diff(short.edges) > 0).all()
    np.testing.assert_allclose([float(short(t)) for t in range(steps)], expected, rtol=1e-6)


@st.composite
def schedules(draw):
    inner = draw(st.lists(st.integers(1, 60), max_size=8, unique=True))
    bounds = (0, *sorted(inner), max(inner, default=0) + draw(st.integers(1, 9)))
    return Schedule(bounds, tuple(float(i) for i in range(len(bounds) - 1)))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(schedules(), st.integers(1, 200))
@pytest.mark.slow
def test_a_step_of_a_stretched_schedule_has_the_value_of_its_place_in_the_first(schedule, steps):
    first, found = by_step(schedule), by_step(schedule.stretched(steps))
    assert found == [first[t * schedule.horizon // steps] for t in range(steps)]


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3", None, float("nan"), 2**31])
def test_a_schedule_is_stretched_to_a_number_of_steps(steps):
    message = "counted in 32 bits" if steps == 2**31 else "is an integer, 1 or more"
    with pytest.raises(ValueError, match=message):
        UNEVEN.stretched(steps)


def learner(windows, horizon=11, **options):
    chosen = {"learning_rate": Hyperparameter(0.0, 1.0, 0.1, windows)}
    return FDS(MODELS["Functions"], chosen, horizon, 2, **options)


def test_fds_is_stretched_as_its_schedules_are_or_refused_where_a_window_would_be_empty():
    assert learner((0, 4, 8, 11)).stretched(4).edges("learning_rate").tolist() == [0, 2, 3, 4]
    for steps in (1, 2, 3):
        with pytest.raises(
            ValueError, match=f"3 windows of 'learning_rate' do not fit a run of {steps} s"
        ):
            learner((0, 4, 8, 11)).stretched(steps)
    with pytest.raises(
        ValueError, match="2 windows of 'learning_rate' do not fit a run of 5 steps"
    ):
        learner((0, 10, 11)).stretched(5)
    for steps in (0, -3, 2.5, True):
        with pytest.raises(
            ValueError, match=r"`FDS.stretched\(inner_steps=.*\)`: it is an integer, 1"
        ):
            learner(2).stretched(steps)


@pytest.mark.parametrize("steps", [0, -1, 20.0, True])
def test_the_horizon_of_evaluation_is_a_number_of_steps(steps):
    with pytest.raises(ValueError, match=r"`FDS\(eval_steps=.*\)`: it is an integer, 1 or more"):
        learner(2, eval_steps=steps)


WINDOWS = [
    ((0, 8, 4, 11), "Edges of windows rise"),
    ((0, 4, 4, 11), "Edges of windows rise"),
    ((0, 0, 11), "Edges of windows rise"),
    ((0, -3, 11), "Edges of windows rise"),
    ((1, 4, 11), "do not cover it"),
    ((-1, 4, 11), "do not cover it"),
    ((), "do not cover it"),
    ((0,), "do not cover it"),
    ((0, 4.5, 11), "integers, not 4.5"),
    ((0, "4", 11), "integers, not '4'"),
    ((False, 4, 11), "integers, not False"),
    ((0, float("nan"), 11), "integers, not nan"),
    ((0, None), "integers, not None"),
    ((0, 2**31), "counted in 32 bits"),
]


@pytest.mark.parametrize(("windows", "message"), WINDOWS, ids=str)
def test_edges_that_are_no_windows_are_refused_wherever_they_are_given(windows, message):
    with pytest.raises(ValueError, match=message):
        Hyperparameter(0.0, 1.0, 0.5, windows)
    with pytest.raises(ValueError, match=message):
        edges(windows, 11)
    with pytest.raises(
        ValueError, match=message if len(windows) > 1 else "not cover|one edge more"
    ):
        Schedule(windows, (0.1,) * max(len(windows) - 1, 0))


@pytest.mark.parametrize("windows", [True, 2.0, "3", None, [0, 11], np.array([0, 11])], ids=str)
def test_windows_are_a_number_or_a_tuple_of_edges(windows):
    for refuses in (lambda: Hyperparameter(0.0, 1.0, 0.5, windows), lambda: edges(windows, 11)):
        with pytest.raises(ValueError, match="is neither a number of windows nor a tuple of the"):
            refuses()
    for number in (0, -1, 12, 10**9):
        with pytest.raises(ValueError, match=f"windows={number}, but .* window and at most 11"):
            edges(number, 11)


VALUES = [
    (("a",), "finite number, not 'a'"),
    ((float("nan"),), "finite number, not nan"),
    ((float("inf"),), "finite number, not inf"),
    ((True,), "finite number, not True"),
    ((None,), "finite number, not None"),
    ((10**400,), "finite number, not 1000"),
    (({},), "finite number, not {}"),
    (((),), "an array of numbers, not ()"),
    ((((1.0, 2.0), 3.0),), "an array of numbers, not"),
    (((1.0, "b"),), "finite number, not 'b'"),
]


def nested(depth):
    return json.loads("[" * depth + "1.0" + "]" * depth)


@pytest.mark.parametrize(("values", "message"), VALUES, ids=lambda x: str(x)[:30])
def test_values_that_are_no_finite_numbers_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule((0, 3), values)


def test_values_have_one_shape():
    with pytest.raises(ValueError, match=r"have one shape, not .*\(2,\)"):
        Schedule((0, 3, 5), (0.1, (0.1, 0.2)))
    with pytest.raises(ValueError, match="8 axes at most"):
        Schedule((0, 3), (tuple_of(nested(9)),))
    matrix = Schedule((0, 3, 5), (((1.0, 2.0),), ((3.0, 4.0),)))
    assert matrix(4).tolist() == [[3.0, 4.0]] and Schedule.from_json(matrix.to_json()) == matrix


def tuple_of(value):
    return tuple(map(tuple_of, value)) if isinstance(value, list) else value


JSON = [
    ("", "is not JSON"),
    ("{", "is not JSON"),
    ("null", "has edges and values"),
    ('{"edges": [0, 3], "values": [NaN]}', "NaN is no JSON"),
    ('{"edges": [0, 3], "values": [-Infinity]}', "-Infinity is no JSON"),
    ('{"edges": [0, 3], "values": [1e999]}', "finite number, not inf"),
    ('{"edges": [0, 3], "edges": [0, 4], "values": [1]}', "'edges' is set twice"),
    ('{"edges": "03", "values": [1]}', "edges of a schedule are a list, not '03'"),
    ('{"edges": [0, 3], "values": 1}', "values of a schedule are a list, not 1"),
    ('{"edges": [0, 3], "values": {"0": 1}}', "values of a schedule are a list"),
    ('{"edges": [0, 5, 3], "values": [1, 2]}', "Edges of windows rise"),
    ('{"edges": [0, 3.0], "values": [1]}', "integers, not 3.0"),
    ('{"edges": [0, 3], "values": [' + "9" * 5000 + "]}", "is not JSON"),
    ("[" * 100_000, "more than 64 deep"),
    ("[" * 500 + "]" * 500, "more than 64 deep"),
    ('{"edges": [0, 3], "values": [' + "[" * 40 + "1" + "]" * 40 + "]}", "8 axes at most"),
]


@pytest.mark.parametrize(("text", "message"), JSON, ids=lambda x: str(x)[:40])
def test_json_that_is_no_schedule_is_refused_by_what_is_wrong_and_by_file_and_name(
    text, message, tmp_path
):
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule.from_json(text)
    path = tmp_path / "learned.json"
    path.write_text(f'{{"momentum": {text}}}' if message != "is not JSON" else text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_schedules(path)
    assert "learned.json" in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_of_another_encoding_or_size_is_refused_and_a_byte_order_mark_is_not(tmp_path):
    path = tmp_path / "learned.json"
    save_schedules(path, {"learning_rate": UNEVEN})
    text = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_schedules(path) == {"learning_rate": UNEVEN}
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match="learned.json is not JSON: 'utf-8' codec can't decode"):
        load_schedules(path)
    with path.open("wb") as file:
        file.truncate(100 * 2**20)  # of zeros, none of which is read
    with pytest.raises(ValueError, match="learned.json is longer than .* bytes"):
        load_schedules(path)
    path.write_text('{"momentum": {"edges": [0, 5, 3], "values": [1, 2]}}')
    with pytest.raises(ValueError, match="learned.json, 'momentum': Edges of windows rise"):
        load_schedules(path)


def test_a_schedule_of_numpys_numbers_is_written_as_one_of_pythons(tmp_path):
    made = Schedule(tuple(np.array([0, 4])), tuple(np.array([0.5])))
    assert Schedule.from_json(made.to_json()) == made
    save_schedules(tmp_path / "a.json", {"x": made})
    assert load_schedules(tmp_path / "a.json") == {"x": made}


def test_edges_of_a_longer_run_are_those_of_the_first_step_of_each_window():
    assert stretched_edges((0, 4, 8, 11), 110) == (0, 40, 80, 110)
    assert stretched_edges((0, 4, 8, 11), 12) == (0, 5, 9, 12)
