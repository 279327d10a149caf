"""Compiled programs that the command line keeps from one start to the next."""

import jax
import pytest

from metalearn.experiments.cli import compilation_cache
from metalearn.experiments.cli.compilation_cache import kept_programs
from tests.helpers.command_line import SINUSOID, call
from tests.helpers.logs import logged

# ml-collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, and no other cache of JAX's: a function that lists the entries."""
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    seconds = "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.setitem(compilation_cache.SETTINGS, seconds, 0.0)  # small programs
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: sorted(path.name for path in tmp_path.glob("cache/compiled/*/*-cache"))
    jax.config.update("jax_compilation_cache_dir", before)


def rows(workdir):
    return logged(workdir), (workdir / "test.json").read_text()


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_gives_the_same_numbers(cache, tmp_path):
    entries = []
    for number in (1, 2):
        jax.clear_caches()
        assert call(*SINUSOID, "--noprogress", f"--workdir={tmp_path / str(number)}") == 0
        entries.append(cache())
    assert any(name.startswith("jit__step-") for name in entries[0])
    assert entries[0] == entries[1]
    assert rows(tmp_path / "1") == rows(tmp_path / "2")


def test_the_cache_can_be_switched_off_and_that_of_the_user_stays(cache, tmp_path):
    with kept_programs(False):
        assert jax.config.jax_compilation_cache_dir is None
    with kept_programs():
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "cache" / "compiled"))
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with kept_programs():
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_without_a_place_for_the_cache_a_command_runs_as_ever(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "file"))
    with kept_programs():
        assert jax.config.jax_compilation_cache_dir is None
