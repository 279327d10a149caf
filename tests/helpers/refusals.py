"""What a message of a refusal is compared with: all of it."""

import re

import pytest


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")
