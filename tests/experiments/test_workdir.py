"""A run's directory is its own, and can be written to."""

import os
import pathlib
import re

import pytest

from metalearn.experiments.commands.run import held


def test_a_workdir_is_made_and_held_by_one_run_at_a_time(tmp_path):
    workdir = tmp_path / "deep" / "run"
    with held(workdir):
        message = f"^Another process is training in {re.escape(str(workdir))}. Wait until it has"
        with pytest.raises(ValueError, match=message), held(workdir):
            pass
    with held(workdir):  # it was let go
        assert workdir.is_dir()


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    where = re.escape(str(tmp_path / "file"))
    message = rf"^The run is to live in {where}, which cannot be written to \(.*\). Name another"
    with pytest.raises(ValueError, match=message), held(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def somebody():
    """Not the system's administrator, who may write everywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


def test_a_workdir_without_permission_is_refused(somebody):
    forbidden = pathlib.Path("/metalearn-run")
    message = "^The run is to live in /metalearn-run, which cannot be written to .Permission denied"
    with pytest.raises(ValueError, match=message), held(forbidden):
        pass
