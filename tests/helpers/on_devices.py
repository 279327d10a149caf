"""What the tests of devices and processes run in processes of their own.

    python -m tests.helpers.on_devices alone DIRECTORY        one process, 8 devices
    python -m tests.helpers.on_devices more DIRECTORY         the same, what takes longer
    python -m tests.helpers.on_devices part DIRECTORY PORT I  process I of 2, 4 devices each

The last line of the output is JSON. Numbers are in float64.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from metalearn import (
    Algorithm,
    Episode,
    Forward,
    Layout,
    MixedFlow,
    Replay,
    Reverse,
    Tasks,
    Trainer,
    Truncation,
    Unroll,
    make_mesh,
)
from metalearn.checkpoints.manager import Checkpoints
from metalearn.cost.hlo import collectives
from metalearn.experiments import build
from metalearn.loggers import Logger
from metalearn.planning.step_cost import Candidate, StepCosts
from metalearn.sharding import distributed as processes

if __name__ == "__main__":  # not where it is imported: that would be everybody's
    jax.config.update("jax_enable_x64", True)

WIDTH, HIDDEN, STEPS = 8, 32, 12
RULES = (("kernel$", P(None, "model")), ("head$", P("model")))


def environment(count):
    """The environment of a process with so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    # A device that waits at an all-reduce blocks a thread of the pool that all of them share.
    threads = {"NPROC": str(2 * count)}
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | threads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planes(Tasks):
    """Linear functions of points that lie on the device."""

    points: np.ndarray  # [n, WIDTH]

    def sample(self, key):
        support, query, slopes = jax.random.split(key, 3)
        slope = jax.random.normal(slopes, (WIDTH,))

        def draw(key):
            inputs = jnp.asarray(self.points)[jax.random.randint(key, (16,), 0, len(self.points))]
            return inputs, jnp.sin(inputs @ slope)

        return Episode(draw(support), draw(query))


@dataclasses.dataclass(frozen=True)
class Network(Algorithm):
    """An initialisation and a rate, for SGD with momentum on the support set."""

    steps: int = STEPS

    def init(self, key):
        one, two = jax.random.split(key)
        kernel = jax.random.normal(one, (WIDTH, HIDDEN)) / 3
        head = jax.random.normal(two, (HIDDEN,)) / 6
        return {"start": {"kernel": kernel, "head": head}, "rate": jnp.asarray(0.1)}

    def unroll(self, episode, key):
        del key

        def error(params, data):
            inputs, targets = data
            return jnp.mean((jnp.tanh(inputs @ params["kernel"]) @ params["head"] - targets) ** 2)

        def init(eta):
            return eta["start"], jax.tree.map(jnp.zeros_like, eta["start"])

        def step(eta, state, batch, grad):
            del batch
            params, trace = state
            grads = grad(error)(params, episode.support)
            trace = jax.tree.map(lambda t, g: 0.5 * t + g, trace, grads)
            return jax.tree.map(lambda p, t: p - eta["rate"] * t, params, trace), trace

        return Unroll(init, step, lambda eta, state: (error(state[0], episode.query), {}))

    def batches(self, episode, key):
        del episode, key
        return jnp.arange(self.steps)


@dataclasses.dataclass(frozen=True)
class Rate(Network):
    """The rate alone, and a factor on the start: few enough for `Forward`."""

    def init(self, key):
        del key
        return {"rate": jnp.asarray(0.1), "scale": jnp.ones(2)}

    def unroll(self, episode, key):
        start = super().init(jax.random.key(5))["start"]
        network = super().unroll(episode, key)

        def full(eta):
            scales = {"kernel": eta["scale"][0], "head": eta["scale"][1]}
            scaled = {name: start[name] * scales[name] for name in start}
            return {"start": scaled, "rate": eta["rate"]}

        return Unroll(
            lambda eta: network.init(full(eta)),
            lambda eta, state, batch, grad: network.step(full(eta), state, batch, grad),
            lambda eta, state: network.loss(full(eta), state),
        )


TASKS = Planes(np.random.default_rng(0).normal(size=(50, WIDTH)))
OUTER = optax.adam(0.01)
NETWORK, REVERSE = Network(), Reverse()
COMPILED = []  # an entry for each program


@functools.cache  # and so are its compiled programs
def trainer(layout=None, algorithm=NETWORK, engine=REVERSE, **options):
    return Trainer(algorithm, engine, OUTER, 16, layout=layout, **options)


def key():
    return jax.random.key(3)


class Run(NamedTuple):
    """The first outer steps of a run."""

    gradient: np.ndarray  # the mean meta-gradient of the first one
    losses: np.ndarray
    compiled: int  # programs that were compiled after the first step
    state: Any


def run(made, steps=1):
    state, tasks, losses = made.init(key(), TASKS), made.place(TASKS), []
    for step in range(steps):
        state, metrics = made.step(state, tasks)
        losses.append(float(metrics["loss"]))
        if step == 0:
            # Adam begins with a tenth of the meta-gradient for its mean.
            gradient, before = 10 * flat(state.optimizer[0].mu), len(COMPILED)
    return Run(gradient, np.array(losses), len(COMPILED) - before, state)


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def compiled(made):
    return made.step.lower(made.shapes(TASKS), jax.eval_shape(lambda x: x, TASKS)).compile()


def kinds(program):
    """The number of collectives of a program, by kind."""
    found = [one.kind for one in collectives(program.as_text())]
    return {kind: found.count(kind) for kind in found}


def memory(program):
    return program.memory_analysis().temp_size_in_bytes


class Seen(Logger):
    """Remembers the outer losses."""

    def __init__(self):
        self.losses = []

    def log(self, step, metrics):
        self.losses.append(metrics["loss"])


def trained(made, directory, steps):
    """The losses up to outer step `steps` of a run that goes on from its checkpoints."""
    seen, checkpoints = Seen(), Checkpoints(directory, {"seed": 0}, every=2)
    options = {"log_every": 1, "progress": False, "loggers": [seen], "checkpoints": checkpoints}
    made.fit(TASKS, steps, key=key(), **options)
    checkpoints.close()
    return seen.losses


def alone(directory):
    """8 devices in one process, and the same on one of them."""
    one, eight = run(trainer(), 6), run(trainer(Layout(make_mesh())), 3)
    programs = compiled(trainer()), compiled(trainer(Layout(make_mesh())))
    return {
        "devices": len(jax.devices()),
        "error": error(eight.gradient, one.gradient),
        "smallest": float(np.abs(one.gradient).min()),
        "curve": error(eight.losses, one.losses[:3]),
        "compiled": eight.compiled,
        "kinds": kinds(programs[1]),
        "sent": [one.size for one in collectives(programs[1].as_text())],
        "numbers": one.gradient.size,
        "memory": memory(programs[1]) / memory(programs[0]),
        "idle": idle(),
        **cut(one.gradient),
        "elastic": error(elastic(pathlib.Path(directory)), one.losses),
    }


def elastic(directory):
    """Two outer steps on 8 devices, two on 4, two on 1."""
    layouts = Layout(make_mesh()), Layout(make_mesh(4)), None
    parts = [trained(trainer(layout), directory, 2 * i) for i, layout in enumerate(layouts, 1)]
    return np.concatenate(parts)


def cut(expected):
    """Eta over two devices, tasks over four pairs."""
    found = run(trainer(Layout(make_mesh(model=2), RULES)))
    kernel, moment = (
        found.state.eta["start"]["kernel"],
        found.state.optimizer[0].mu["start"]["head"],
    )
    shards = [list(leaf.addressable_shards[0].data.shape) for leaf in (kernel, moment)]
    return {"cut": error(found.gradient, expected), "shards": shards}


def idle():
    """What is said of configs that some devices are of no use to."""
    found = {}
    for tasks, chunk in ((16, None), (10, None), (40, 4), (1, None)):
        config = {"tasks_per_step": tasks, "chunk": chunk, "engine": "reverse"}
        layout = build.layout(config)
        taken = 1 if layout is None else layout.devices
        found[str(tasks)] = [taken, build.idle_devices(config, layout)]
    return found


def more(directory):
    """What takes longer."""
    one, layout = run(trainer()), Layout(make_mesh())
    eta = jax.device_get(one.state.eta)
    estimates = [trainer(each).evaluate(eta, TASKS, key(), 20)["loss"] for each in (None, layout)]
    shapes = jax.eval_shape(lambda x: x, TASKS)
    rows = [
        StepCosts(m, shapes).row(Candidate(REVERSE), m.batch.at_once)
        for m in (trainer(), trainer(layout))
    ]
    return {
        "chunked": error(run(trainer(layout, chunk=1)).gradient, one.gradient),
        "isolated": error(run(trainer(layout, isolate=True)).gradient, one.gradient),
        "evaluated": error(np.array(estimates[1][:2]), np.array(estimates[0][:2])),
        "planned": rows[1].peak / rows[0].peak,
        **tangents(),
        **truncated(layout),
        **segmented(layout),
        **replayed(layout),
    }


def tangents():
    """The tangents of `Forward` over two devices, tasks over four pairs."""
    layout = Layout(make_mesh(tangents=2))
    engine = Forward(sharding=NamedSharding(layout.mesh, P("tangents")))
    one, many = trainer(None, Rate(), Forward()), trainer(layout, Rate(), engine)
    return {"tangents": error(run(many).gradient, run(one).gradient)}


def truncated(layout):
    options = {"truncation": Truncation(4), "engine": MixedFlow()}
    one, eight = (run(trainer(each, **options), 4) for each in (None, layout))
    carried = eight.state.inner.state[0]["kernel"].addressable_shards[0].data.shape
    return {"truncated": error(eight.losses, one.losses), "carried": list(carried)}


def segmented(layout):
    """Outer steps in segments over eight devices, against whole ones on one."""
    eight = run(trainer(layout, Rate(), Forward(), segment=5), 2)
    one = run(trainer(None, Rate(), Forward()), 2)
    both = Layout(make_mesh(tangents=2))
    engine = Forward(sharding=NamedSharding(both.mesh, P("tangents")))
    spread = trainer(both, Rate(), engine, segment=5)
    segments, tasks = spread.segments(TASKS), spread.place(TASKS)
    partway, _ = segments.take(spread.init(key(), TASKS), tasks)
    tangents = partway.inner.stream.tangents[0].addressable_shards[0].data.shape
    found, _ = spread.step(partway, tasks)  # which takes over the buffers of `partway`
    return {
        "segmented": error(eight.gradient, one.gradient),
        "spread": error(10 * flat(found.optimizer[0].mu), one.gradient),
        "in segments": list(tangents[:2]),
    }


def replayed(layout):
    """Outer steps in segments that go backward, over eight devices, and with a cut eta."""
    one = run(trainer(None), 2)
    errors = []
    for each in (layout, Layout(make_mesh(model=2), RULES)):
        replay = Replay(states=1, host=0, disk="10MB")
        made = trainer(each, engine=MixedFlow(), segment=3, replay=replay)
        ours = run(made, 2)
        errors.append(max(error(ours.gradient, one.gradient), error(ours.losses, one.losses)))
    return {"replayed": errors, "recompiled": ours.compiled}


def part(directory, port, process):
    """4 of 8 devices, in one process of two: a run that begins, and one that goes on from it."""
    processes.start(f"127.0.0.1:{port}", 2, int(process), timeout=60)
    made, few = trainer(Layout(make_mesh())), {"tasks_per_step": 3, "chunk": None, "engine": "es"}
    one, all_of_them = run(trainer(), 4), run(made)  # the first on a device of its own
    return {
        "devices": [len(jax.local_devices()), len(jax.devices())],
        "error": error(all_of_them.gradient, one.gradient),
        "losses": one.losses.tolist(),
        "logged": [trained(made, pathlib.Path(directory), steps) for steps in (2, 4)],
        "first": processes.is_first(),
        "agreed": processes.broadcast({"process": int(process)}),
        "uneven": [refusal(lambda: make_mesh(3)), refusal(lambda: build.layout(few))],
    }


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: COMPILED.append(event) if "backend_compile" in event else None
    )
    print(json.dumps({"alone": alone, "more": more, "part": part}[sys.argv[1]](*sys.argv[2:])))
