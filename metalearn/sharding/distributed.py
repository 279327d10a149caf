"""One run in several processes: how they find each other, and which of them speaks.

Each process runs the same program and owns the devices of its machine; together they are one
mesh (`metalearn.sharding.mesh`). They meet at a coordinator, a port of process 0's machine. `jax` finds it
by itself on SLURM, Open MPI, Kubernetes and cloud TPUs; anywhere else it has three arguments.

All of them take part in what is computed and in saving a checkpoint, whose directory they share.
What is printed, logged and written besides is the first one's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from metalearn._utils import disk, strict_json
from metalearn._utils.checks import first_line

# What jax reads of SLURM; `srun` sets them all for each process it starts.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
NAMED = (
    "Or name the processes: --coordinator=HOST:PORT --processes=N --process=I, with I from 0 to "
    "N - 1 and HOST the machine of process 0."
)


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    detect: bool = False,
    timeout: int = 300,
) -> None:
    """Join the other processes of a run; before anything is computed. Nothing by default.

    Args:
      coordinator: "host:port" of process 0.
      processes: how many there are.
      process: which of them this is, from 0.
      detect: find all three: SLURM, Open MPI, Kubernetes, cloud TPUs.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: if they do not fit together, or nothing is found.
      ConnectionError: if the others do not come.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if all(value is None for value in given.values()):
        if detect:
            _detect(timeout)
        return
    _check(given, detect)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(
            f"Process {process} of {processes} did not meet the others at {coordinator} within "
            f"{timeout} s ({first_line(error)}). Are all {processes} started, with the same "
            "coordinator, and can they reach it?"
        ) from error


def _check(given: Mapping[str, Any], detect: bool) -> None:
    coordinator, processes, process = given.values()
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            "--coordinator, --processes and --process belong together: "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set."
        )
    if detect:
        raise ValueError(
            "Either --distributed, which finds the processes, or --coordinator, --processes and "
            "--process, which name them; not both."
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(
            f"--coordinator={coordinator} is no host and port, such as 10.0.0.1:4321 or node7:4321."
        )
    if not 0 <= process < processes:
        raise ValueError(
            f"--process={process} of --processes={processes}: processes count from 0 to "
            f"{processes - 1}."
        )


def _detect(timeout: int) -> None:
    try:
        jax.distributed.initialize(initialization_timeout=timeout)
    except ValueError as error:
        raise ValueError(_detection_error(os.environ)) from error
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(
            f"The processes of this cluster did not meet within {timeout} s "
            f"({first_line(error)}). {NAMED}"
        ) from error


def _detection_error(environment: Mapping[str, str]) -> str:
    """Say what could not be read of the environment."""
    found = {name: environment[name] for name in SLURM if name in environment}
    if not found:
        return (
            "--distributed found no cluster: this is not SLURM, Open MPI, Kubernetes or a cloud "
            f"TPU, as far as the environment says. {NAMED}"
        )
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    missing = [name for name in SLURM if name not in found]
    lacks = f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
    what = lacks if missing else "some of it is no number, or no list of nodes"
    return (
        f"Unknown SLURM layout: found {shown}; {what}. `srun` sets all of {', '.join(SLURM)} for "
        f"every process that it starts, so start with `srun metalearn ... --distributed`. {NAMED}"
    )


def is_first() -> bool:
    """Say whether this process is the one that prints, logs and writes."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line above a progress bar, in the first process alone."""
    if is_first():
        disk.tell(text)


def broadcast(value: Any) -> Any:
    """Return the first process's value (JSON) in all of them."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(strict_json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.resize(text, length)  # that of the others is not read
    return strict_json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
