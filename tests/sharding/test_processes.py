"""Two processes are one run: they meet, compute the same, and the first one speaks."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from metalearn.sharding import distributed as processes
from tests.helpers.on_devices import environment
from tests.helpers.process_groups import free_port, together
from tests.helpers.refusals import refused

SLURM = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
NAMED = (
    "Or name the processes: --coordinator=HOST:PORT --processes=N --process=I, with I from 0 to "
    "N - 1 and HOST the machine of process 0."
)
SRUN = (
    "`srun` sets all of SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_PROCID, "
    "SLURM_LOCALID for every process that it starts, so start with "
    f"`srun metalearn ... --distributed`. {NAMED}"
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What two processes with four devices each find."""
    directory, port = tmp_path_factory.mktemp("parts"), free_port()
    words = [sys.executable, "-m", "tests.helpers.on_devices", "part", str(directory), str(port)]
    said = together([[*words, str(process)] for process in range(2)], 4)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(parts):
    for part in parts:
        assert part["devices"] == [4, 8]
        assert part["error"] < 1e-12


@pytest.mark.slow
def test_the_first_process_alone_logs_and_the_curve_is_that_of_one(parts):
    logged = [part["logged"] for part in parts]
    np.testing.assert_allclose(sum(logged[0], []), parts[0]["losses"], rtol=1e-12)
    assert len(logged[0][1]) == 2  # the second fit goes on from a checkpoint of both
    assert logged[1] == [[], []]
    assert [part["first"] for part in parts] == [True, False]


@pytest.mark.slow
def test_processes_agree_on_what_the_first_one_says(parts):
    assert [part["agreed"] for part in parts] == [{"process": 0}] * 2


@pytest.mark.slow
def test_processes_that_cannot_give_as_many_devices_each_are_refused(parts):
    expected = [
        "A mesh of tasks=3 x data=1 x model=1 x tangents=1 takes 3 devices, and 2 processes with "
        "4, 4 of them cannot give as many each. Choose sizes whose product divides by 2.",
        "tasks_per_step=3 does not divide among 2 processes with 8 devices in all. Take a "
        "multiple of 2.",
    ]
    assert parts[0]["uneven"] == parts[1]["uneven"] == expected


@pytest.mark.slow
def test_the_same_command_trains_in_two_processes_and_one_writes(tmp_path):
    words = [
        *(sys.executable, "-m", "metalearn", "train", "--config=maml_sinusoid"),
        *("--config.steps=4", "--config.test_tasks=8", "--config.log_every=1"),
        *("--config.tasks_per_step=8", "--config.wandb.mode=disabled", "--config.eval_every=0"),
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    together([[*words, f"--workdir={one}"]], 1)
    meet = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", f"--workdir={two}")
    said = together([[*words, *meet, f"--process={process}"] for process in range(2)], 4)
    own = [[line for line in out.splitlines() if "[Gloo]" not in line] for out, _ in said]
    checks = [line for line in own[0] if line.startswith("Health: the meta-gradient ")]
    assert len(checks) == 1 and own[1] == []
    curves = [(workdir / "metrics.jsonl").read_text().splitlines() for workdir in (one, two)]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in curves]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-4)
    tests = [json.loads((workdir / "test.json").read_text()) for workdir in (one, two)]
    np.testing.assert_allclose(*(test["loss"]["mean"] for test in tests), rtol=1e-4)


@pytest.mark.slow
def test_two_processes_of_which_one_is_asked_to_stop_both_save_and_leave(tmp_path):
    words = [
        *(sys.executable, "-m", "metalearn", "train", "--config=maml_sinusoid"),
        *("--config.steps=100000", "--config.log_every=1", "--config.checkpoint_every=100000"),
        "--config.tasks_per_step=8",
        *("--config.wandb.mode=disabled", "--config.eval_every=0", f"--workdir={tmp_path}"),
        *(f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"),
    ]
    started = [
        subprocess.Popen(
            [*words, f"--process={process}"],
            env=environment(1),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    logged, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and started[0].poll() is None:
        if logged.exists() and logged.read_text():
            break
        time.sleep(0.05)
    started[1].terminate()
    try:
        said = [process.communicate(timeout=60)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [75, 75], said
    (stopped_at,) = [int(p.name) for p in tmp_path.glob("checkpoints/*") if p.name.isdigit()]
    assert f"SIGTERM after outer step {stopped_at} of 100000. It is saved" in said[0]


# What cannot be.


def test_nothing_is_started_where_nothing_is_asked_for():
    processes.start()
    assert processes.is_first()
    assert processes.broadcast({"a": [1, None]}) == {"a": [1, None]}


def test_a_process_that_is_named_in_part_is_refused():
    with refused(
        "--coordinator, --processes and --process belong together: --processes and --process are "
        "not set."
    ):
        processes.start("node7:1")
    with refused(
        "--coordinator, --processes and --process belong together: --coordinator is not set."
    ):
        processes.start(None, 2, 0)


def test_processes_are_named_or_found_but_not_both():
    with refused(
        "Either --distributed, which finds the processes, or --coordinator, --processes and "
        "--process, which name them; not both."
    ):
        processes.start("node7:1", 2, 0, detect=True)


def test_a_coordinator_without_a_port_is_refused():
    with refused("--coordinator=node7 is no host and port, such as 10.0.0.1:4321 or node7:4321."):
        processes.start("node7", 2, 0)


def test_a_process_beyond_the_last_is_refused():
    with refused("--process=2 of --processes=2: processes count from 0 to 1."):
        processes.start("node7:1", 2, 2)


def test_a_machine_of_no_cluster_is_refused_with_the_way_out():
    assert processes._detection_error({"PATH": "/bin"}) == (
        "--distributed found no cluster: this is not SLURM, Open MPI, Kubernetes or a cloud TPU, "
        f"as far as the environment says. {NAMED}"
    )


def test_an_allocation_without_srun_is_an_unknown_slurm_layout():
    found = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "PATH": "/bin"}
    assert processes._detection_error(found) == (
        "Unknown SLURM layout: found SLURM_JOB_ID=12, SLURM_NTASKS=2; SLURM_STEP_NODELIST, "
        f"SLURM_PROCID, SLURM_LOCALID are missing. {SRUN}"
    )


def test_slurm_with_a_number_that_is_none_is_an_unknown_layout():
    found = SLURM | {"SLURM_NTASKS": "2(x3)"}
    assert processes._detection_error(found) == (
        "Unknown SLURM layout: found SLURM_JOB_ID=12, SLURM_STEP_NODELIST=node[3-4], "
        "SLURM_NTASKS=2(x3), SLURM_PROCID=0, SLURM_LOCALID=0; some of it is no number, or no list "
        f"of nodes. {SRUN}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (SLURM | {"SLURM_PROCID": "x"}, "some of it is no number, or no list of nodes"),
        ({"SLURM_JOB_ID": "12"}, "found SLURM_JOB_ID=12; "),
        ({}, "--distributed found no cluster"),
    ],
)
def test_the_command_line_says_so(variables, message):
    words = [sys.executable, "-m", "metalearn", "train", "--config=maml_sinusoid", "--distributed"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    found = subprocess.run(
        [*words, "--workdir=/nowhere"],
        env=clean | variables | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 2, found.stderr
    assert re.search(re.escape(message), found.stderr) and "Traceback" not in found.stderr
