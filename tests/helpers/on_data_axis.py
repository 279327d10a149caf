"""What the tests of one inner run over several devices run in a process of their own.

    python -m tests.helpers.on_data_axis one_task copies   4 devices; or sharded
    python -m tests.helpers.on_data_axis more DIR          the same, what takes longer
    python -m tests.helpers.on_data_axis part PORT I DIR   process I of 2, 2 devices each

The last line of the output is JSON. Numbers are in float64.
"""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from metalearn import Forward, Layout, MixedFlow, Replay, Reverse, Trainer, Truncation, make_mesh
from metalearn.algorithms import FDS, MAML, Hyperparameter, LearningRates, squared_error
from metalearn.checkpoints.manager import Checkpoints
from metalearn.cost.hlo import collectives
from metalearn.datasets import Sinusoid, Text, TrainingRuns
from metalearn.models import Functions
from metalearn.sharding import distributed as processes
from metalearn.training.outer_loop import Interrupted
from metalearn.training.replay_schedule import Position
from tests.helpers.on_devices import error, flat, kinds, memory

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)

WIDTH, STEPS, BATCH = 32, 6, 16
RULES = (("kernel$", P("data")), ("bias$", P("data")))
REVERSE, OPTIMIZER = Reverse(), optax.sgd(0.05, momentum=0.9)


def network(inputs, outputs, embed=False):
    """A network of two layers; its parameters divide by four along their first axis."""

    def init(key):
        one, two = jax.random.split(key)
        return {
            "one": {
                "kernel": jax.random.normal(one, (inputs, WIDTH)) / 4,
                "bias": jnp.zeros(WIDTH),
            },
            "two": {"kernel": jax.random.normal(two, (WIDTH, outputs)) / 6},
        }

    def apply(params, x):
        x = jax.nn.one_hot(x, inputs, dtype=params["one"]["kernel"].dtype) if embed else x
        return (
            jnp.tanh(x @ params["one"]["kernel"] + params["one"]["bias"]) @ params["two"]["kernel"]
        )

    return Functions(init, apply)


def runs():
    inputs = jax.random.normal(jax.random.key(0), (64, 8))
    return TrainingRuns.create(inputs, inputs[:, :4].argmax(1).astype(jnp.int32), validation=16)


RATES = {
    "learning_rate": Hyperparameter(1e-3, 1.0, start=0.1, windows=2, space="log"),
    "momentum": Hyperparameter(0.1, 0.99, start=0.5, windows=1),
}
SCHEDULES = FDS(network(8, 4), RATES, STEPS, BATCH)


def layout(rules=(), tasks=1, data=4):
    return Layout(make_mesh(tasks, data=data, devices=jax.devices()[: tasks * data]), rules)


def trainer(where=None, engine=REVERSE, algorithm=SCHEDULES, tasks=1, **options):
    return Trainer(algorithm, engine, optax.trace(1.0), tasks, layout=where, **options)


def key():
    return jax.random.key(3)


def step(made, tasks, steps=1):
    """The sum of meta-gradients, and the last outer loss, of outer steps."""
    state, placed = made.init(key(), tasks), made.place(tasks)
    for _ in range(steps):
        state, metrics = made.step(state, placed)
    return np.append(flat(state.optimizer), float(metrics["loss"]))


def difference(found, expected):
    """The larger of the relative errors of the meta-gradient and of the outer loss."""
    return max(error(found[:-1], expected[:-1]), error(found[-1:], expected[-1:]))


def compiled(made, tasks):
    """The program of an outer step, and what `step` returns of it."""
    state, placed = made.init(key(), tasks), made.place(tasks)
    program = made.step.lower(state, placed).compile()
    state, metrics = program(state, placed)
    return program, np.append(flat(state.optimizer), float(metrics["loss"]))


def plain(rules):
    """The collectives of a plain loop of training steps, data parallel, with these rules."""
    model, where = network(8, 4), layout(rules)

    def over(leaf, spec):
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(where.mesh, spec))

    stored = P("data") if rules else P()

    def train(inputs, targets):
        def loss(params, x, y):
            params = jax.tree.map(lambda leaf: over(leaf, P()), params)
            outputs, _ = model.apply(params, (), x, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, y)
            return losses.mean()

        def body(state, batch):
            params, trace = state
            x, y = (over(leaf, P("data")) for leaf in batch)
            value, grads = jax.value_and_grad(loss)(params, x, y)
            trace = jax.tree.map(lambda t, g: over(0.9 * t + g, stored), trace, grads)
            return (
                jax.tree.map(lambda p, t: over(p - 0.1 * t, stored), params, trace),
                trace,
            ), value

        params = jax.tree.map(lambda leaf: over(leaf, stored), model.init(key())[0])
        return jax.lax.scan(body, (params, jax.tree.map(jnp.zeros_like, params)), (inputs, targets))

    shapes = (
        jax.ShapeDtypeStruct((STEPS, BATCH, 8), float),
        jax.ShapeDtypeStruct((STEPS, BATCH), int),
    )
    return kinds(jax.jit(train).lower(*shapes).compile())


def advancing(rules):
    """The collectives of the program that advances a segment."""
    made, tasks = trainer(layout(rules), segment=3), runs()
    segments, shapes = made.segments(tasks), made.shapes(tasks)
    begun = segments._shapes(Position(1, 0, 0)).inner
    shared = shapes.eta, jax.eval_shape(lambda x: x, tasks), shapes.key, shapes.step
    first = jax.ShapeDtypeStruct((), jnp.int32)
    inputs = *shared, begun.stream, begun.inner, first
    return kinds(segments._programs.advance.lower(*inputs, steps=3, until=None).compile())


def one_task(states):
    """One task over four devices: data parallel, or with sharded inner states."""
    rules, tasks = {"copies": (), "sharded": RULES}[states], runs()
    first, one = compiled(trainer(), tasks)
    program, result = compiled(trainer(layout(rules)), tasks)
    sent = collectives(program.as_text())
    return {
        "error": difference(result, one),
        "kinds": kinds(program),
        "gathered": sorted(each.size for each in sent if each.kind == "all-gather"),
        "memory": memory(program) / memory(first),
        "plain": plain(rules),
        "advance": advancing(rules),
    }


# What takes longer.


def windows():
    """Windows of a text, a batch of them per inner step."""
    texts = "to be, or not to be, " * 20, "that is the question: " * 8
    return Text.create(*texts, length=5, batch=BATCH, inner_steps=STEPS, queries=8)


def problems():
    """Algorithms that read their examples in different ways, with tasks and rules."""
    rates = LearningRates(network(256, 256, embed=True), optimizer=OPTIMIZER, initial=1.0)
    maml = MAML(network(1, 1), squared_error, OPTIMIZER, inner_steps=3)
    second = (("one/kernel$", P(None, "data")), *RULES)
    return {
        "rows": (SCHEDULES, runs(), RULES),
        "batches": (rates, windows(), RULES),
        "support": (maml, Sinusoid(16, 16), second),
    }


def more(directory):
    """Engines, segments, algorithms, several tasks."""
    tasks, answers = runs(), {}
    engines = {"MixedFlow": MixedFlow(), "Forward": Forward(), "nested": Reverse("nested")}
    for name, engine in engines.items():
        one = step(trainer(None, engine), tasks)
        for rules in ((), RULES):
            made = functools.partial(trainer, layout(rules), engine)
            answers.setdefault(name, []).append(difference(step(made(), tasks), one))
            kept = {} if name == "Forward" else {"replay": Replay(states=1, host=0, disk="10MB")}
            answers[name].append(difference(step(made(segment=2, **kept), tasks), one))
            if name == "MixedFlow":
                kept_too = Replay(states=1, host="10MB", gradients="10MB")
                segmented = made(segment=2, replay=kept_too)
                gradients = segmented.segments(tasks)._gradient_shapes
                shard_shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in gradients]
                answers.setdefault("gradient shards", []).append(sorted(shard_shapes))
                answers.setdefault("gradients", []).append(difference(step(segmented, tasks), one))
    for name, (algorithm, tasks, rules) in problems().items():
        one = step(trainer(None, MixedFlow(), algorithm, 2), tasks)
        made = trainer(layout(rules, 2, 2), MixedFlow(), algorithm, 2)
        answers[name] = [difference(step(made, tasks), one)]
    return answers | others() | elastic(directory)


def others():
    """Truncated unrolls, evaluation, tangents that are sharded as well, kept states."""
    tasks, where = runs(), layout(RULES)
    truncated = [step(trainer(each, truncation=Truncation(2)), tasks, 4) for each in (None, where)]
    eta = trainer().init(key(), tasks).eta
    evaluated = [
        np.array(trainer(each).evaluate(eta, tasks, key(), 2)["loss"][:2]) for each in (None, where)
    ]
    both = Layout(make_mesh(1, tangents=2, data=2), RULES)
    engine = Forward(sharding=NamedSharding(both.mesh, P("tangents")))
    tangents = [
        step(trainer(None, Forward()), tasks),
        step(trainer(both, engine), tasks),
        step(trainer(both, engine, segment=2), tasks),
    ]
    return {
        "truncated": [difference(truncated[1], truncated[0])],
        "evaluated": [error(evaluated[1], evaluated[0])],
        "tangents": [difference(each, tangents[0]) for each in tangents[1:]],
        **kept(where, tasks),
    }


def kept(where, tasks):
    """The shards of a state that is kept in host memory, and of the cotangents."""
    made = trainer(where, segment=2, replay=Replay(host="10MB"))
    segments, placed = made.segments(tasks), made.place(tasks)
    state = made.init(key(), tasks)
    while not jax.tree.leaves(getattr(state.inner, "cotangents", ())):
        state, _ = segments.take(state, placed)
    segments._opened.settle()
    (only,) = state.inner.kept
    copies = trainer(layout(), segment=2).segments(tasks).planned.state_bytes
    return {
        "kept": sorted([list(array.shape), int(array.nbytes)] for array in only.arrays),
        "cotangents": [
            list(leaf.addressable_shards[0].data.shape)
            for leaf in jax.tree.leaves(state.inner.cotangents.state)
        ],
        "state bytes": [copies, segments.planned.state_bytes],
    }


def elastic(directory):
    """A run that is saved between two segments on four devices, and goes on with two, then one."""
    one, tasks = step(trainer(segment=1), runs()), runs()
    for number, where in enumerate((layout(RULES), layout(RULES, data=2), None)):
        made = trainer(where, segment=1, replay=Replay(states=2, disk="10MB"))
        saved = Checkpoints(pathlib.Path(directory) / "elastic", {"seed": 0}, within=1)
        stop = 4 * number + 4 if number < 2 else 10**6
        try:
            state = made.fit(
                *(tasks, 1),
                key=key(),
                progress=False,
                checkpoints=saved,
                asked_to_stop=lambda programs, stop=stop: "so far" if programs >= stop else None,
            )
        except Interrupted:
            continue
        finally:
            saved.close()
    return {"elastic": [error(flat(state.optimizer), one[:-1])]}


def part(port, process, directory):
    """2 of 4 devices, in one process of two."""
    processes.start(f"127.0.0.1:{port}", 2, int(process), timeout=60)
    tasks = runs()
    replay = Replay(states=1, host=0, disk="10MB", folder=directory)
    made = trainer(layout(RULES), MixedFlow(), segment=2, replay=replay)
    segments, placed, state = made.segments(tasks), made.place(tasks), made.init(key(), tasks)
    metrics, files = None, set()
    while metrics is None:
        state, metrics = segments.take(state, placed)
        segments._opened.settle()
        segments._opened._await_files()
        files |= {path.name for path in (pathlib.Path(directory) / process).glob("*.state")}
    return {
        "found": np.append(flat(state.optimizer), float(metrics["loss"])).tolist(),
        "files": sorted(files),
        "state bytes": segments.planned.state_bytes,
    }


def alone():
    """The same on one device."""
    made, tasks = trainer(None, MixedFlow(), segment=2), runs()
    segments = made.segments(tasks)
    return {"found": step(made, tasks).tolist(), "state bytes": segments.planned.state_bytes}


WHAT = {"one_task": one_task, "more": more, "part": part, "alone": alone}

if __name__ == "__main__":
    print(json.dumps(WHAT[sys.argv[1]](*sys.argv[2:])))
