"""What runs have logged, without the times, which differ from one run to another."""

import json
import pathlib

from metalearn._utils import strict_json


def untimed(metrics):
    """Return the metrics that a run determines."""
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def logged(workdir: pathlib.Path) -> list[str]:
    """Return the lines of a run's metrics.jsonl, as JSON, without times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.dumps(untimed(strict_json.loads(line))) for line in lines]
