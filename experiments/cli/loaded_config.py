"""The config file that ml-collections is given: it hands over the config that was loaded already.

`arguments.expanded` executes a config file, to hold the command line against it. ml-collections
would execute it once more; instead it executes this one, with the key of that config as its option.
"""

from __future__ import annotations

import ml_collections

from metalearn.experiments.cli.arguments import LOADED


def get_config(key: str) -> ml_collections.ConfigDict:
    """Return the config that `--config` named."""
    return LOADED.pop(key)
