"""One task over several devices: the same numbers, less memory, and no message too many."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from metalearn import Layout, Reverse, Trainer
from metalearn.algorithms import FDS, MAML, squared_error
from metalearn.datasets import Sinusoid
from metalearn.experiments import build
from metalearn.experiments.configs import maml_sinusoid
from metalearn.sharding import partition
from metalearn.sharding.batched_means import check_shares
from tests.helpers.on_data_axis import RATES, RULES, network, runs
from tests.helpers.on_devices import NETWORK, TASKS, environment
from tests.helpers.process_groups import free_port, together
from tests.helpers.refusals import refused

KERNELS = sorted([8 * 32 * 8, 32 * 4 * 8, 32 * 8])  # bytes of the parameters
MODULE = "tests.helpers.on_data_axis"


def told(*words):
    """What a process with four devices says."""
    options = {"capture_output": True, "text": True, "check": False, "timeout": 900}
    done = subprocess.run([sys.executable, "-m", MODULE, *words], env=environment(4), **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def copies():
    return told("one_task", "copies")


@pytest.fixture(scope="module")
def sharded():
    return told("one_task", "sharded")


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return told("more", str(tmp_path_factory.mktemp("runs")))


@pytest.mark.slow
def test_four_devices_that_share_a_task_find_the_meta_gradient_of_one(copies):
    assert copies["error"] < 1e-12


@pytest.mark.slow
def test_inner_steps_send_what_a_data_parallel_training_step_sends(copies):
    assert copies["advance"] == copies["plain"] == {"all-reduce": 1}


@pytest.mark.slow
def test_a_meta_gradient_adds_a_message_for_the_backward_pass_and_two_for_the_outer_loss(copies):
    # Inner steps, their backward pass, the outer loss and its metric.
    assert copies["kinds"] == {"all-reduce": 4}


@pytest.mark.slow
def test_memory_falls_with_the_devices(copies):
    assert copies["memory"] < 0.5


@pytest.mark.slow
def test_four_devices_that_shard_the_states_find_the_meta_gradient_of_one(sharded):
    assert sharded["error"] < 1e-12
    assert sharded["memory"] < 0.3


@pytest.mark.slow
def test_inner_steps_of_sharded_states_gather_parameters_as_a_training_step_does(sharded):
    assert sharded["plain"] == {"all-gather": 3, "all-reduce": 1}
    # One more: of three numbers, whether the gradient is finite.
    assert sharded["advance"] == {"all-gather": 3, "all-reduce": 2}


@pytest.mark.slow
def test_a_meta_gradient_of_sharded_states_gathers_parameters_for_each_of_three_losses(sharded):
    # And says whether gradients are finite.
    assert sharded["kinds"] == {"all-gather": 9, "all-reduce": 5}
    assert sharded["gathered"] == sorted(3 * KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["MixedFlow", "Forward", "nested"])
def test_engines_agree_with_one_device_in_one_program_and_in_segments(more, engine):
    assert len(more[engine]) == 4 and max(more[engine]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["rows", "batches", "support"])
def test_two_tasks_on_two_devices_each_agree_with_one_device(more, problem):
    assert max(more[problem]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("what", ["truncated", "evaluated", "tangents", "elastic", "gradients"])
def test_other_ways_of_running_agree_with_one_device(more, what):
    assert max(more[what]) < 1e-12


@pytest.mark.slow
def test_a_kept_state_holds_each_shard_once(more):
    whole = sum(KERNELS) * 2  # parameters and momenta
    assert more["state bytes"][0] == more["state bytes"][1]
    assert whole <= more["state bytes"][0] < whole + 64
    sharded = [shape for shape, _ in more["kept"] if shape[1:] in ([2, 32], [8, 4])]
    assert len(sharded) == 4 * 2 * 2  # devices, kernels, parameters and momenta
    assert sorted(shape for shape in more["cotangents"] if len(shape) == 3) == sorted(
        2 * [[1, 2, 32], [1, 8, 4]]
    )


@pytest.mark.slow
def test_inner_gradients_of_a_segment_are_sharded_like_the_parameters(more):
    copies, shards = more["gradient shards"]  # [tasks, K, ...]
    assert [1, 2, 8, 32] in copies and [1, 2, 32, 4] in copies
    assert [1, 2, 2, 32] in shards and [1, 2, 8, 4] in shards


@pytest.mark.slow
def test_each_of_two_processes_keeps_its_own_shards(tmp_path):
    words = [sys.executable, "-m", MODULE, "part", str(free_port())]
    said = together([[*words, str(process), str(tmp_path)] for process in range(2)], 2)
    parts = [json.loads(out.splitlines()[-1]) for out, _ in said]
    one = told("alone")
    for part in parts:
        np.testing.assert_allclose(part["found"], one["found"], rtol=1e-10)
        assert part["files"] == ["0-1.state"]  # in a folder of its own
        assert part["state bytes"] < 0.6 * one["state bytes"]


# What cannot be. The devices of an abstract mesh need not be there.


def abstract(rules=(), tasks=1, data=4):
    sizes, auto = (tasks, data, 1, 1), (jax.sharding.AxisType.Auto,) * 4  # as of `make_mesh`
    mesh = jax.sharding.AbstractMesh(sizes, ("tasks", "data", "model", "tangents"), auto)
    return Layout(mesh, rules)


def shapes(algorithm, tasks, layout):
    trainer = Trainer(algorithm, Reverse(), tasks_per_step=1, layout=layout)
    return jax.eval_shape(
        lambda eta, key: trainer.unrolls.solve(eta, tasks, key),
        jax.eval_shape(algorithm.init, jax.random.key(0)),
        jax.random.key(0),
    )


SHARE = "The 4 devices of the mesh axis 'data' share the examples of an inner step, but "


@pytest.mark.parametrize(
    ("algorithm", "tasks", "reason"),
    [
        (
            FDS(network(8, 4), RATES, 4, 6),
            runs,
            "6 of them, in an array of shape [6], do not divide among 4. The nearest sizes that do "
            "are 4 and 8.",
        ),
        (
            MAML(network(1, 1), squared_error),
            lambda: Sinusoid(3, 8),
            "3 of them, in an array of shape [3, 1], do not divide among 4. The nearest size is 4.",
        ),
        (
            NETWORK,  # its steps read the support, and it does not say so
            lambda: TASKS,
            "these inner steps read none: their batches have no axis. Leave that axis at 1; or, if "
            "they read examples of the episode, shard them in `Algorithm.shard_examples`.",
        ),
    ],
    ids=["batch", "support", "none"],
)
def test_examples_that_do_not_divide_among_the_devices_are_refused(algorithm, tasks, reason):
    with pytest.raises(ValueError) as caught:
        shapes(algorithm, tasks(), abstract())
    assert str(caught.value) == SHARE + reason


def test_a_rule_that_matches_nothing_is_refused_with_the_paths_there_are():
    trainer = Trainer(
        FDS(network(8, 4), RATES, 4, 8),
        tasks_per_step=1,
        layout=abstract((*RULES, ("kernle$", P("data")))),
    )
    with pytest.raises(ValueError) as caught:
        trainer.shapes(runs())
    assert str(caught.value).startswith(
        f"The rule 'kernle$': {P('data')!r} matches no array of eta, the outer optimizer's state "
        "or the inner state, so it would shard nothing. Their paths are: learning_rate, momentum, "
    )
    assert "params/one/kernel" in str(caught.value)


def test_a_rule_that_divides_nothing_is_refused_with_the_shapes():
    layout = abstract((("two/kernel$", P(None, "data")),), data=8)
    trainer = Trainer(FDS(network(8, 4), RATES, 4, 8), tasks_per_step=1, layout=layout)
    with pytest.raises(ValueError) as caught:
        trainer.shapes(runs())
    assert str(caught.value).startswith(
        f"The rule 'two/kernel$': {P(None, 'data')!r} divides none of the arrays that it matches "
        "on the mesh tasks=1 x data=8 x model=1 x tangents=1, so it would shard nothing: "
        "params/two/kernel [32, 4]"
    )


def test_more_devices_for_tasks_than_tasks_are_refused_with_the_other_axis():
    with refused(
        "tasks_per_step=1 does not divide by the 4 devices that take tasks. The nearest size is 4. "
        "Or let several devices share the inner run of a task: a mesh of tasks=1 and data=N, whose "
        "devices divide the examples of an inner batch."
    ):
        check_shares(1, 4, None)


def test_a_config_of_one_task_says_how_the_other_devices_take_part(monkeypatch):
    config = build.to_json(maml_sinusoid.get_config()) | {"tasks_per_step": 1}
    monkeypatch.setattr(jax, "devices", lambda: [None] * 4)
    assert build.idle_devices(config, None) == (
        "devices: 1 of 4 take part. tasks_per_step=1 does not divide among more, or config.mesh "
        "asks for no more. config.mesh.data=N lets N devices share the inner run of a task."
    )


def test_a_config_that_shares_a_task_over_more_devices_than_there_are_is_refused():
    config = build.to_json(maml_sinusoid.get_config()) | {"tasks_per_step": 1}
    with refused(
        "A mesh of tasks=1 x data=4 x model=1 x tangents=1 takes 4 devices, but there is 1 (cpu). "
        "Ask for no more, or leave `tasks` unset to take them all. To try a mesh on a CPU: "
        "XLA_FLAGS=--xla_force_host_platform_device_count=8."
    ):
        build.layout(config | {"mesh": {"tasks": 1, "data": 4}})


def test_a_spec_without_an_axis_keeps_the_others():
    assert partition.without("data", P("data", ("model", "data"), None)) == P(None, "model", None)
