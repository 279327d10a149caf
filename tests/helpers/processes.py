"""Programs in a process of their own."""

import os
import pathlib
import subprocess
import sys


def program(source, *arguments, timeout=300):
    """Run the text of a program on the processor, with this checkout on its path."""
    root = pathlib.Path(__file__).parents[2]
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    return subprocess.run(
        [sys.executable, "-c", source, *arguments],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
