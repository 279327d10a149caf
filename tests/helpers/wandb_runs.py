"""What Weights & Biases wrote without a network, read back."""

import json
import pathlib
import subprocess
import sys


def records_of(run: pathlib.Path) -> list[dict]:
    """The records of an offline run, as W&B's own reader prints them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]
