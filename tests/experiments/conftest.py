"""What the tests of the command line share."""

import re

import pytest

from tests.helpers.command_line import call


@pytest.fixture
def refused(capsys):
    """A function that expects a command line to be refused, and returns the message."""

    def refuse(*words):
        assert call(*words) == 2
        captured = capsys.readouterr()
        shown = captured.err.rpartition("\nmetalearn: ")
        assert shown[1], captured.err
        assert "Traceback" not in captured.err
        assert re.fullmatch(r"(metalearn .*\n(  .*\n)+(train .*\n)*)?", captured.out)  # of a run
        message, hint, _ = shown[2].strip().rpartition("\n(--traceback shows where.)")
        assert hint
        return message

    return refuse
