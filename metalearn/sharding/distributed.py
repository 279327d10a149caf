"""One run in several processes: how they connect, and what only the first of them does.

Each process runs the same program and owns the devices of its machine; the devices of all
processes are one mesh (`metalearn.sharding.mesh`). The processes connect to a coordinator, a port
on the machine of process 0. `jax` detects it on SLURM, Open MPI, Kubernetes and cloud TPUs;
elsewhere three arguments name it.

All processes compute, and all save checkpoints, to a directory that they share. Only the first
one prints, logs and writes other files.
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

# The variables of SLURM that jax reads; `srun` sets all of them for each process it starts.
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
    """Connect to the other processes of a run, before any computation. By default does nothing.

    Args:
      coordinator: "host:port" of process 0.
      processes: the number of processes.
      process: the index of this process, from 0.
      detect: detect all three, on SLURM, Open MPI, Kubernetes or cloud TPUs.
      timeout: seconds to wait for the other processes.

    Raises:
      ValueError: if the arguments do not fit together, or no cluster is detected.
      ConnectionError: if the other processes do not connect in time.
    """
    options = {"coordinator": coordinator, "processes": processes, "process": process}
    if all(value is None for value in options.values()):
        if detect:
            _detect(timeout)
        return
    _check(options, detect)
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


def _check(options: Mapping[str, Any], detect: bool) -> None:
    coordinator, processes, process = options.values()
    missing = [f"--{name}" for name, value in options.items() if value is None]
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
    """Return the error text for an environment in which jax detects no cluster."""
    variables = {name: environment[name] for name in SLURM if name in environment}
    if not variables:
        return (
            "--distributed found no cluster: this is not SLURM, Open MPI, Kubernetes or a cloud "
            f"TPU, as far as the environment says. {NAMED}"
        )
    values = ", ".join(f"{name}={value}" for name, value in variables.items())
    missing = [name for name in SLURM if name not in variables]
    reason = f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
    if not missing:
        reason = "some of it is no number, or no list of nodes"
    return (
        f"Unknown SLURM layout: found {values}; {reason}. `srun` sets all of {', '.join(SLURM)} "
        "for every process that it starts, so start with `srun metalearn ... --distributed`. "
        f"{NAMED}"
    )


def is_first() -> bool:
    """Say whether this is the first process, which prints, logs and writes."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line above a progress bar, in the first process only."""
    if is_first():
        disk.tell(text)


def broadcast(value: Any) -> Any:
    """Return the value of the first process, a JSON value, in all processes."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(strict_json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.resize(text, length)  # the same shape everywhere; only the first one's is read
    return strict_json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
