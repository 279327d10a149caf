"""The fuzz of the config surface: a changed config runs, or is refused in our own words.

What a case is, and when it fails, is in tests/helpers/config_cases.py. All cases are made anew from
the configs as they are, so a new field is fuzzed from its first day. Those that once
failed are kept in tests/helpers/refused_configs.py, with what they are refused by now.
"""

import collections
import re

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from metalearn.experiments.build import sections
from metalearn.experiments.cli import arguments, json_config
from tests.helpers import config_cases
from tests.helpers.config_cases import Case
from tests.helpers.refused_configs import KEPT
from tests.helpers.small_configs import skip_without

# What comes first is tried most: MAML is quick.
NAMES = sorted({*arguments.packaged()} - config_cases.WITHOUT_DATA, reverse=True)
CHEAP = ["maml_sinusoid", "maml_digits", "fds_digits"]  # a second a case, and no text
BASES = {name: config_cases.base(name) for name in arguments.packaged()}
FIELDS = {name: [key for key, _ in config_cases.fields(config)] for name, config in BASES.items()}
SETTINGS = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}


@st.composite
def cases(draw, names=NAMES):
    """A config, one to three of its fields, and something else for each."""
    name = draw(st.sampled_from(names))
    keys = draw(st.lists(st.sampled_from(FIELDS[name]), min_size=1, max_size=3, unique=True))
    config = BASES[name]
    chosen = [(key, draw(st.sampled_from(config_cases.choices(config, key)))) for key in keys]
    return Case(name, tuple(chosen))


@pytest.mark.parametrize("name", arguments.packaged())
def test_every_field_of_a_config_is_set_to_something_else(name):
    leaves = list(arguments.keys(BASES[name]))
    assert leaves == FIELDS[name] and len(leaves) > 30
    for key, value in config_cases.fields(BASES[name]):
        others = config_cases.choices(BASES[name], key)
        assert [other for other in others if repr(other) != repr(value)], key


def test_a_changed_config_runs_or_is_refused_in_our_words(tmp_path):
    outcomes = fuzz(8, tmp_path, CHEAP)
    assert outcomes["refused"] and outcomes["traced"] + outcomes["stepped"]


@pytest.mark.slow
def test_many_changed_configs_run_or_are_refused_in_our_words(tmp_path):
    skip_without("text")
    outcomes = fuzz(500, tmp_path, NAMES)
    assert outcomes.total() >= 500
    accepted = outcomes["stepped"] + outcomes["traced"]
    assert outcomes["stepped"] >= 10 and accepted >= 80 and outcomes["refused"] >= 100


@pytest.mark.slow
@pytest.mark.parametrize("name", arguments.packaged())
def test_every_integer_of_a_config_is_a_count_that_fits_or_is_refused(name, tmp_path):
    skip_without(BASES[name].dataset.name, BASES[name].dataset.get("tfds"))
    seen = set()
    for key, _ in config_cases.fields(BASES[name]):
        others = config_cases.choices(BASES[name], key)
        for value in {0, -1, config_cases.BILLION} & {x for x in others if type(x) is int}:
            case = Case(name, ((key, value),))
            seen.add((value, config_cases.run(case, tmp_path / key / str(value), False)))
    assert {value for value, became in seen if became != "traced"} == {0, -1, config_cases.BILLION}


@pytest.mark.parametrize("name", CHEAP)
def test_a_value_of_another_type_is_refused_by_its_key(name, tmp_path):
    """As JSON has it: a boolean, a fraction and a text for each integer."""
    base = BASES[name]
    for key in [key for key, value in config_cases.fields(base) if type(value) is int]:
        for value in (True, 2.5, "3", None, [3], {"a": 3}):
            if value is None and sections.nullable(base, key):
                continue
            *parents, last = key.split(".")
            given = {last: value}
            for parent in reversed(parents):
                given = {parent: given}
            message = f"^config.{key} takes an integer, such as 3, not "
            with pytest.raises(ValueError, match=message):
                json_config.update(base.copy_and_resolve_references(), given)


def fuzz(examples, workdir, names):
    """Run so many cases and count what became of them."""
    outcomes: collections.Counter[str] = collections.Counter()

    @hypothesis.seed(0)  # the same cases whatever is said here
    @hypothesis.settings(max_examples=examples, **SETTINGS)
    @hypothesis.given(cases(names))
    def run(case):
        became = config_cases.run(case, workdir / str(outcomes.total()))
        outcomes[became if became in ("stepped", "traced") else "refused"] += 1

    run()
    return outcomes


def test_an_error_of_a_library_is_not_taken_for_ours():
    with pytest.raises(TypeError) as caught:
        jax.numpy.zeros("x")
    assert not config_cases.raised_by_us(caught.value)
    with pytest.raises(TypeError) as caught:
        arguments.packaged(1)  # type: ignore[call-arg]
    assert not config_cases.raised_by_us(caught.value)
    with pytest.raises(ValueError) as ours:
        arguments._config_file("nothing")
    assert config_cases.raised_by_us(ours.value)


@pytest.mark.parametrize(("name", "changed", "message"), KEPT, ids=str)
def test_a_case_that_once_failed_is_refused(name, changed, message, tmp_path):
    found = config_cases.run(Case(name, tuple(changed.items())), tmp_path)
    assert re.search(message, found), found
