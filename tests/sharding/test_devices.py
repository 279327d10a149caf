"""One device or eight: the same run, in an eighth of the memory, with one message a step."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from metalearn import Layout, Trainer, make_mesh
from metalearn.algorithms import MAML
from metalearn.experiments import build
from metalearn.experiments.benchmarks import devices as benchmark
from metalearn.experiments.configs import maml_sinusoid
from metalearn.sharding import partition
from metalearn.sharding.batched_means import check_shares
from tests.cases import MODELS
from tests.helpers.on_devices import RULES, environment
from tests.helpers.refusals import refused

EIGHT = {"tasks": 8, "model": 1, "tangents": 1}


def told(what, directory):
    """What a process with eight devices says; each program is compiled once there."""
    words = [sys.executable, "-m", "tests.helpers.on_devices", what, str(directory)]
    options = {"capture_output": True, "text": True, "check": False, "timeout": 400}
    found = subprocess.run(words, env=environment(8), **options)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return told("alone", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return told("more", tmp_path_factory.mktemp("run"))


def test_eight_devices_find_the_meta_gradient_and_the_learning_curve_of_one(alone):
    assert alone["devices"] == 8
    assert alone["smallest"] > 0
    assert alone["error"] < 1e-12
    assert alone["curve"] < 1e-12


def test_an_outer_step_sends_one_all_reduce_of_the_meta_gradient_and_the_metrics(alone):
    assert alone["kinds"] == {"all-reduce": 1}
    assert 0 < alone["sent"][0] / 8 - alone["numbers"] < 12


def test_the_memory_of_an_outer_step_falls_to_about_an_eighth(alone):
    assert 0.05 < alone["memory"] < 0.16


def test_nothing_is_compiled_after_the_first_outer_step(alone):
    assert alone["compiled"] == 0


def test_rules_cut_eta_and_the_outer_optimizer_and_the_meta_gradient_is_the_same(alone):
    assert alone["shards"] == [[8, 16], [16]]
    assert alone["cut"] < 1e-12


def test_a_run_of_eight_devices_goes_on_with_four_and_then_with_one(alone):
    assert alone["elastic"] < 1e-12


def test_as_many_devices_take_part_as_tasks_divide_among_and_the_others_are_spoken_of(alone):
    found = {tasks: taken for tasks, (taken, _) in alone["idle"].items()}
    assert found == {"16": 8, "10": 5, "40": 5, "1": 1}
    assert alone["idle"]["16"][1] == ""
    assert alone["idle"]["10"][1] == (
        "devices: 5 of 8 take part. tasks_per_step=10 does not divide among more, or config.mesh "
        "asks for no more."
    )
    assert "tasks_per_step=40 in chunks of 4 does not" in alone["idle"]["40"][1]


@pytest.mark.slow
def test_chunks_of_tasks_on_each_device_change_nothing(more):
    assert more["chunked"] < 1e-12


@pytest.mark.slow
def test_tasks_are_left_out_over_devices_as_they_are_on_one(more):
    assert more["isolated"] < 1e-12


@pytest.mark.slow
def test_tangents_of_forward_have_an_axis_beside_that_of_tasks(more):
    assert more["tangents"] < 1e-12


@pytest.mark.slow
def test_inner_runs_that_go_on_lie_with_their_tasks(more):
    assert more["carried"] == [2, 8, 32]
    assert more["truncated"] < 1e-12


@pytest.mark.slow
def test_segments_over_eight_devices_are_whole_steps_on_one(more):
    assert more["in segments"] == [16 // 4, 4 // 2]  # tasks, tangents: 3, and one to fill up
    assert more["segmented"] < 1e-12 and more["spread"] < 1e-12
    assert max(more["replayed"]) < 1e-12 and more["recompiled"] == 0


@pytest.mark.slow
def test_eight_devices_evaluate_as_one_does(more):
    assert more["evaluated"] < 1e-12


@pytest.mark.slow
def test_a_plan_is_of_the_memory_of_one_device(more):
    assert 0.05 < more["planned"] < 0.16


# What cannot be, on the one device of this process.


def test_more_devices_than_there_are_is_refused_with_the_count():
    with refused(
        "A mesh of tasks=8 x data=1 x model=1 x tangents=1 takes 8 devices, but there is 1 (cpu). "
        "Ask for no more, or leave `tasks` unset to take them all. To try a mesh on a CPU: "
        "XLA_FLAGS=--xla_force_host_platform_device_count=8."
    ):
        make_mesh(8)


def test_an_axis_without_devices_is_refused():
    with refused("An axis of a mesh has at least one device, not model=0, tangents=-1."):
        make_mesh(1, model=0, tangents=-1)


def test_devices_that_cannot_be_cut_into_groups_are_refused():
    with refused(
        "The 1 device there is cannot be cut into groups of data=1 x model=2 x tangents=3 = 6. "
        "Choose sizes that divide, or say how many of the groups there are to be: `tasks`."
    ):
        make_mesh(model=2, tangents=3)


@pytest.mark.parametrize(
    ("tasks", "nearest"),
    [(20, "sizes that do are 16 and 24"), (12, "sizes that do are 8 and 16")],
)
def test_tasks_that_do_not_divide_are_refused_with_the_nearest_sizes_that_do(tasks, nearest):
    with refused(
        f"tasks_per_step={tasks} does not divide by the 8 devices that take tasks. The nearest "
        f"{nearest}."
    ):
        check_shares(tasks, 8, None)


def test_chunks_that_do_not_divide_the_share_of_a_device_are_refused():
    check_shares(16, 8, 4)  # two tasks on each are less than a chunk
    with refused(
        "tasks_per_step=24 on 4 devices is 6 tasks on each, which do not divide into chunks of 4. "
        "Chunks that fit: 1, 2, 3, 6."
    ):
        check_shares(24, 4, 4)


def test_a_trainer_checks_its_tasks_against_its_layout():
    mesh = AbstractMesh((8,), ("tasks",), (AxisType.Auto,))
    with pytest.raises(ValueError, match="tasks_per_step=20 does not divide by the 8 devices"):
        Trainer(MAML(MODELS["linen-MLP"]), tasks_per_step=20, layout=Layout(mesh))


def test_a_mesh_without_an_axis_of_tasks_is_refused():
    with refused(
        "A layout needs a mesh with an axis 'tasks', but this one has ('data',). "
        "`metalearn.make_mesh()` makes one."
    ):
        Layout(Mesh(np.array(jax.devices()), ("data",)))


def explicit_mesh():
    return jax.make_mesh((1,), ("tasks",))


def manual_axis():
    return AbstractMesh((4, 2), ("tasks", "model"), (AxisType.Auto, AxisType.Manual))


@pytest.mark.parametrize(
    ("mesh", "axes", "count"),
    [(explicit_mesh, "'tasks' is Explicit", 1), (manual_axis, "'model' is Manual", 2)],
)
def test_a_mesh_with_axes_that_are_not_of_type_auto_is_refused(mesh, axes, count):
    with refused(
        "A layout needs a mesh whose axes are all of type Auto, along which the compiler "
        f"partitions, but of this one {axes}. `metalearn.make_mesh()` makes one. "
        "`jax.make_mesh` makes axes Explicit where no types are named: pass "
        f"`axis_types=(jax.sharding.AxisType.Auto,) * {count}`."
    ):
        Layout(mesh())


def test_a_rule_for_an_axis_that_is_not_there_is_refused():
    with refused(
        f"The rule 'kernel$': {P(None, 'modle')!r} names the axis 'modle', which is not in the "
        "mesh tasks=1 x data=1 x model=1 x tangents=1."
    ):
        Layout(make_mesh(), (("kernel$", P(None, "modle")),))


def test_a_rule_along_the_axis_of_tasks_is_refused():
    with refused(
        f"The rule 'kernel': {P('tasks')!r} cuts along 'tasks', where every device needs all of "
        'eta for tasks of its own. Cut along another axis, such as "model".'
    ):
        Layout(make_mesh(), (("kernel", P("tasks")),))


def test_a_rule_that_is_no_regular_expression_is_refused():
    with pytest.raises(
        ValueError, match=r"^The rule '\(': .* is no regular expression of a path: "
    ):
        Layout(make_mesh(), (("(", P("model")),))


@pytest.mark.parametrize("shape", [(4, 3), (4,)], ids=["does not divide", "has too few axes"])
def test_a_rule_that_does_not_divide_a_leaf_of_eta_is_refused(shape):
    sizes = EIGHT | {"model": 2}
    with refused(
        f"The rule for 'start/kernel' of eta is {P(None, 'model')!r}, which does not divide its "
        f"shape {shape} on the mesh tasks=8 x model=2 x tangents=1. Give that path a rule of its "
        "own before this one: P() for a copy on every device."
    ):
        partition.eta_spec(RULES, sizes, "start/kernel", shape)


def test_the_first_rule_that_matches_counts_and_no_match_is_a_copy_on_every_device():
    rules, sizes = (("head/kernel", P()), *RULES), EIGHT | {"model": 2}
    assert partition.eta_spec(rules, sizes, "head/kernel", (3, 4)) == P()
    assert partition.eta_spec(rules, sizes, "body/kernel", (3, 4)) == P(None, "model")
    assert partition.eta_spec(rules, sizes, "body/bias", (4,)) == P()


def test_what_is_none_of_eta_is_cut_by_its_path_or_as_eta_is_by_its_shape_or_not_at_all():
    sizes = EIGHT | {"model": 2}
    eta = {"kernel": np.ones((3, 4)), "head": np.ones(4), "other": np.ones(6)}
    alike = partition.specs_by_shape(RULES, sizes, eta)

    def spec(path, shape):
        return partition.state_spec(RULES, sizes, path, shape, alike)

    assert spec("0/mu/kernel", (3, 4)) == P(None, "model")
    assert spec("params/0", (3, 4)) == P(None, "model")
    assert spec("params/1", (4,)) == P("model")
    assert spec("0/factor/kernel", (3,)) == spec("0/count", ()) == spec("0/other", (6,)) == P()


@pytest.mark.slow
def test_the_benchmark_counts_the_bytes_that_a_ring_of_devices_sends(capsys):
    benchmark.main(["--paper", "--devices", "8", "--flops", "1e13", "--bandwidth", "1e9"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "initialisation" in line]
    # 2 x 7/8 x 4 bytes x 10^8, and 18 x 10^8 x 10 x 2^14 FLOPs
    assert row.split(" | ")[1:4] == ["667.6 MiB", "700 ms", "29.5 s"]


# From configs.


def sinusoid(**changes):
    return build.to_json(maml_sinusoid.get_config()) | changes


def test_one_device_needs_no_layout():
    assert build.layout(sinusoid()) is None
    assert build.evaluation_layout(sinusoid(mesh=EIGHT | {"model": 2})) is None


def test_a_config_that_asks_for_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="takes 8 devices, but there is 1"):
        build.layout(sinusoid(mesh=EIGHT))


def test_tangents_are_those_of_forward_alone():
    with refused(
        "mesh.tangents=2 spreads the tangents of the engine 'forward', but the engine is "
        "'mixed_flow', which has none. Leave mesh.tangents at 1."
    ):
        build.layout(sinusoid(mesh={"tangents": 2}))


def test_an_axis_of_the_model_needs_rules():
    with refused(
        "mesh.model=2 cuts nothing without mesh.rules, which say what is cut and how, such as "
        "--config.mesh.rules=\"(('kernel$', None, 'model'),)\"."
    ):
        build.layout(sinusoid(mesh={"model": 2}))


@pytest.mark.parametrize("rule", ["kernel", ["kernel"], [1, "model"]])
def test_a_rule_of_a_config_that_is_none_is_refused(rule):
    with refused(
        "A rule of mesh.rules is a pattern and an axis or None for each axis of an array, such as "
        f"('kernel$', None, 'model'), not {rule!r}."
    ):
        build.layout(sinusoid(mesh={"model": 1, "tasks": 1, "rules": [rule]}))
