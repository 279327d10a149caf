"""Task distributions, and drawing a task: from a PRNG key to an episode and its unroll.

A task distribution is a pytree (its arrays are on the device, its numbers are static), so it is an
argument of `jit`, and the data of a run depends on (seed, step) alone: resuming needs no position
in a stream. Data that are on the host (`Tasks.needs_fetch`) are fetched for the keys of an outer
step, before its program runs: `fetched(tasks, keys, first, algorithm)` is a small distribution on
the device, which has the episodes of those keys. Of a training run it has the data of those inner
steps that the program takes (`Reads`), the same bits whenever and however often they are read.

Other values (a list, a generator, a loader, a class that JAX does not know) are refused by
`check_tasks` before anything is compiled.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import first_line
from metalearn._utils.fields import check_fields
from metalearn.algorithm import Algorithm, unroll_of
from metalearn.rows import absent_value
from metalearn.sharding.inner_run import constrain, shard_examples
from metalearn.sharding.layout import Layout
from metalearn.unroll import Batch, Episode, Unroll, horizon, task_keys


class Tasks(abc.ABC):
    """A distribution over tasks. Subclasses are dataclasses registered as pytrees.

    `@jax.tree_util.register_dataclass` over `@dataclasses.dataclass(frozen=True)`; fields that are
    not arrays are `dataclasses.field(metadata={"static": True})`.
    """

    @abc.abstractmethod
    def sample(self, key: jax.Array) -> Episode:
        """Draw one task. Pure, and traced inside jit; vmap over keys for a batch."""

    def label_range(self) -> tuple[int, int] | None:
        """Return the smallest and the largest label of all episodes, read on the host.

        None, the default: unknown, or there are no labels. A known range is compared with the
        outputs of the network before training.
        """
        return None

    @property
    def needs_fetch(self) -> bool:
        """Whether a trainer calls `fetch` before each program. False, the default."""
        return False

    @property
    def fetches_keys(self) -> bool:
        """Whether `fetch` reads what the keys draw. True, the default; False: the next episodes."""
        return True

    @property
    def resumable(self) -> bool:
        """Whether the episodes of a step can be drawn again. True, the default."""
        return True

    @property
    def reads_steps(self) -> bool:
        """Whether what is fetched depends on the inner steps of the program. False, the default."""
        return False

    def step_bytes(self, algorithm: Algorithm) -> int:
        """Return the bytes that an inner step of a task reads from the host. 0, the default."""
        del algorithm
        return 0

    def fetch(self, keys: jax.Array, first: int) -> Tasks:
        """Return tasks on the device that have the episodes of `keys`, read on the host.

        Called outside jit, also from a thread. `sample(key)` of the result is called inside jit,
        with these keys alone. The default, of data on the device: self.

        Args:
          keys: [n], of the tasks of an outer step, or of a part of an evaluation.
          first: how many tasks are drawn before these, in the run or in the evaluation.
        """
        del keys, first
        return self

    def fetch_steps(self, keys: jax.Array, first: int, algorithm: Algorithm, reads: Reads) -> Tasks:
        """Return tasks on the device with what some inner steps of an algorithm read.

        By default all that the episodes have: `fetch`. Override this, and `reads_steps`, for tasks
        that are training runs of many steps on data of the host.

        Args:
          keys: [n], for `draw_task`; their episodes are those of `episode_keys(keys)`.
          first: as of `fetch`.
          algorithm: whose inner steps they are.
          reads: which of them.
        """
        del algorithm, reads
        return self.fetch(episode_keys(keys), first)


class Reads(NamedTuple):
    """What one compiled program reads of the tasks of an outer step, where they are on the host.

    Args:
      start: its first inner step: of all tasks, or [n], int, one of each task.
      steps: how many it takes; 0: none, as for the outer loss alone; None: all T.
      query: whether it takes the outer loss.
    """

    start: Any = 0
    steps: int | None = None
    query: bool = True


ALL_STEPS = Reads()
Read: TypeAlias = Callable[[Reads], "Tasks"]  # what a program reads -> tasks that have it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Fetched(Tasks):
    """The episodes of some keys, read from the host.

    For any other key `sample` returns an episode whose floats are NaN and whose integers are the
    largest of their type, so that it cannot pass for data.

    Args:
      keys: [n], of the episodes.
      rows: what was read, leaves [n, ...].
      episode: the rows of one task -> its episode. It compares by value (a function of a module,
        an instance of a frozen dataclass), or every step would be compiled anew.
    """

    keys: jax.Array = dataclasses.field(repr=False)
    rows: Any = dataclasses.field(repr=False)
    episode: Callable[[Any], Episode] = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_fields(self)

    def sample(self, key: jax.Array) -> Episode:
        """Return the episode of `key`."""
        number, present = number_of(self.keys, key)
        episode = self.episode(jax.tree.map(lambda leaf: leaf[number], self.rows))
        return jax.tree.map(lambda leaf: only_if(present, leaf), episode)


def number_of(keys: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (the number of `key` among `keys` [n], whether it is one of them)."""
    same = (jax.random.key_data(keys) == jax.random.key_data(key)[None]).all(axis=-1)
    return jnp.argmax(same), same.any()


def only_if(present: jax.Array, leaf: jax.Array) -> jax.Array:
    """Return a leaf of an episode, or where it is not present what cannot pass for data."""
    if not jnp.issubdtype(leaf.dtype, jnp.number):
        return leaf
    return jnp.where(present, leaf, jnp.asarray(absent_value(leaf.dtype), leaf.dtype))


def fetched(
    tasks: Tasks, keys: jax.Array, first: int, algorithm: Algorithm, reads: Reads = ALL_STEPS
) -> Tasks:
    """Return tasks on the device that have the episodes that `draw_task` draws with `keys` [n].

    Tasks on the device are returned unchanged.

    Args:
      tasks: of a trainer.
      keys: [n], for `draw_task`.
      first: how many tasks are drawn before these; see `Tasks.fetch`.
      algorithm: whose inner steps read them.
      reads: which inner steps of training runs; by default all, and the query.

    Raises:
      ValueError: for keys of an implementation whose numbers depend on how many keys are vmapped.
    """
    if not needs_fetch(tasks):
        return tasks
    implementation = str(jax.random.key_impl(keys))
    if "rbg" in implementation:
        raise ValueError(
            f"The keys of this run are {implementation!r}, whose random numbers differ between a "
            f"program that is vmapped over tasks and one that is not, so a `{type(tasks).__name__}`"
            ", which reads on the host what a key draws, could not tell what its tasks are. Take "
            'keys of the default implementation: `jax.random.key(seed, impl="threefry2x32")`.'
        )
    return tasks.fetch_steps(keys, first, algorithm, reads)


def needs_fetch(tasks: Any) -> bool:
    """Return whether tasks are fetched before a program that draws them."""
    return isinstance(tasks, Tasks) and tasks.needs_fetch


def fetches_key(tasks: Any, key: jax.Array | None) -> bool:
    """Return whether the task of `key`, or for None that of the next outer step, is fetched.

    Tasks that do not go by keys have no other than the next.
    """
    return needs_fetch(tasks) and (key is None or tasks.fetches_keys)


@jax.jit
def episode_keys(keys: jax.Array) -> jax.Array:
    """Return the keys that `draw_episode` gives to `sample` for `keys` [n]."""
    return jax.vmap(lambda key: task_keys(key).episode)(keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithConstants(Tasks):
    """Tasks, and the constants of the algorithm that they are for: arguments of one program.

    Args:
      tasks: the distribution.
      constants: `Algorithm.constants()`, to which `draw_task` binds the algorithm.
    """

    tasks: Tasks
    constants: Any

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task."""
        return self.tasks.sample(key)

    def label_range(self) -> tuple[int, int] | None:
        """Return the range of the labels of the tasks."""
        return self.tasks.label_range()


OWN = (
    "A distribution of your own is a class with a method `sample(key) -> Episode`: a "
    "`@dataclasses.dataclass(frozen=True)` under `@jax.tree_util.register_dataclass`, its data "
    "arrays, and what is no array a `dataclasses.field(metadata={'static': True})`"
)
DATA = (
    "Arrays of data become a distribution with `FewShot`, `TrainingRuns` or `Text` of "
    "`metalearn.datasets`"
)
GIVEN = (
    "Episodes that are there already become one with `GivenTasks.create(episodes)`, and a stream "
    "of them with `TaskStream(loader)`, of `metalearn.datasets`"
)


def check_tasks(where: str, tasks: Any) -> None:
    """Raise TypeError unless `tasks` is a task distribution that jit takes as an argument.

    Args:
      where: the argument, as its user writes it: "Trainer.fit(tasks=)".
      tasks: its value; arrays may be shapes.
    """
    given, why, way_out = _other(tasks)
    if not given and not callable(_sample(tasks)):
        given, why, way_out = f"a {type(tasks).__name__}", "it has no `sample`", f"{DATA}. {OWN}"
    if given:
        raise TypeError(
            f"`{where}` takes a distribution over tasks, whose `sample(key)` draws an episode "
            f"inside jit, but got {given}: {why}. {way_out}."
        )
    name = type(tasks).__name__
    leaves = jax.tree_util.tree_leaves_with_path(tasks)
    if any(leaf is tasks for _, leaf in leaves):
        kind = "dataclass" if dataclasses.is_dataclass(tasks) else "class"
        raise TypeError(
            f"`{where}` got a `{name}`, a {kind} that JAX does not know as a pytree, so that jit "
            f"cannot take it as an argument. {OWN}. Any other class is registered with "
            "`jax.tree_util.register_pytree_node`."
        )
    integers = []  # paths of Python's integers among the leaves
    for path, leaf in leaves:
        field = jax.tree_util.keystr(path)
        if not _is_number(leaf):
            raise TypeError(
                f"`{where}` got a `{name}` whose `{field}` is a {type(leaf).__name__}, which is no "
                "array and no number, so that jit cannot take it as an argument. Make that field "
                "static: `dataclasses.field(metadata={'static': True})`; or its data an array."
            )
        integers += [field] if isinstance(leaf, int) else []
    if integers:
        _check_numbers(where, tasks, integers)


def label_range(tasks: Any) -> tuple[int, int] | None:
    """Return the smallest and the largest label of tasks; None: unknown, or there are none."""
    return tasks.label_range() if isinstance(tasks, Tasks) else None


def draw(tasks: Tasks, key: jax.Array) -> Episode:
    """Return `tasks.sample(key)`; TypeError unless it is an episode."""
    episode = tasks.sample(key)
    try:
        _ = episode.support, episode.query
    except AttributeError:
        raise TypeError(
            f"`{type(tasks).__name__}.sample` returned a {type(episode).__name__}, but it returns "
            "an episode: `metalearn.Episode(support, query)`, what the inner loop learns from and "
            "what its result is judged on."
        ) from None
    return episode


def _other(tasks: Any) -> tuple[str, str, str]:
    """Return (description, reason, way out) for a common mistake; "" if it is none of them."""
    kind = type(tasks).__name__
    stream = "jit cannot draw from it, and a run that is resumed could not either"
    if tasks is None:
        return "nothing", "there is nothing to draw from", f"{DATA}. {OWN}"
    if isinstance(tasks, type):
        return (
            f"the class `{tasks.__name__}`",
            "it has no data yet",
            f"Make an instance: `{tasks.__name__}(...)`, or `.create(...)` where there is one",
        )
    if isinstance(tasks, Episode):
        return (
            "one episode",
            "a distribution draws many",
            f"{OWN}; one whose `sample` returns this episode is enough",
        )
    if callable(_sample(tasks)):
        return "", "", ""
    if _is_loader(tasks):
        return (
            f"a loader, `{kind}`",
            f"it hands out batches on the host, and {stream}",
            "Where its items are examples, pass its dataset to "
            f"`metalearn.datasets.HostFewShot.create`. {GIVEN}. Or read its dataset once, into "
            f"arrays. {DATA}",
        )
    if isinstance(tasks, Iterator):
        return f"a {kind}", f"it is an iterator, and {stream}", f"{GIVEN}. {OWN}"
    if isinstance(tasks, Mapping):
        return (
            f"a {kind} with the keys {', '.join(map(repr, tasks))}",
            "nothing says how to draw from it",
            f"Distributions side by side are `metalearn.datasets.SideBySide`. {DATA}",
        )
    if isinstance(tasks, list | set | frozenset) or type(tasks) is tuple:
        return (
            f"a {kind} of {len(tasks)}",
            "nothing says how to draw from it",
            f"{GIVEN}. {DATA}",
        )
    if isinstance(tasks, np.ndarray | jax.Array):
        return f"an array {list(tasks.shape)}", "nothing says how to draw from it", DATA
    if callable(tasks):
        return f"a function, `{kind}`", "jit takes what holds arrays", f"Make it a method. {OWN}"
    return "", "", ""


def _sample(tasks: Any) -> Any:
    """Return the attribute `sample` of an object; None if it has none."""
    return getattr(tasks, "sample", None)


def _is_loader(tasks: Any) -> bool:
    """Return whether a value looks like a loader of PyTorch or tf.data, importing neither."""
    names = {*dir(tasks)}
    return {"__iter__", "batch_size"} <= names or {"element_spec", "batch"} <= names


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMm"
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | bool | int | float | complex):
        return True
    try:
        jax.numpy.result_type(leaf)
    except (TypeError, ValueError):
        return False
    return not isinstance(leaf, str)


def _check_numbers(where: str, tasks: Any, fields: Sequence[str]) -> None:
    """Raise TypeError if `sample` needs the values of numbers that jit turns into arrays."""
    try:
        jax.eval_shape(lambda tasks: tasks.sample(jax.random.key(0)), tasks)
    except TypeError as error:  # JAX's, of tracers where a number was needed, are TypeErrors
        raise TypeError(
            f"`{where}` got a `{type(tasks).__name__}` whose `sample` cannot be traced "
            f"({first_line(error)}). In jit its {', '.join(fields)} are arrays without a known "
            "value, and cannot say a shape or a number of rounds. Make such fields static: "
            "`dataclasses.field(metadata={'static': True})`."
        ) from error


class DrawnTask(NamedTuple):
    """One task, ready to be unrolled.

    Args:
      unroll: its inner loop.
      batches: () -> the inputs of all inner steps, leaves [T, ...].
      batches_at: numbers of steps [t] -> the inputs of those steps, leaves [t, ...].
      engine_key: (), for `MetaGradient.init(engine_key, unroll, eta)`.
    """

    unroll: Unroll
    batches: Callable[[], Batch]
    batches_at: Callable[[jax.Array], Batch]
    engine_key: jax.Array

    def first_batches(self, steps: int | None) -> Batch:
        """Return the inputs of the first `steps` inner steps; None: of all."""
        batches = self.batches()
        horizon(batches)  # refuses leaves of different lengths, which slicing would hide
        return jax.tree.map(lambda leaf: leaf[:steps], batches)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AtOuterStep(Tasks):
    """Tasks, and the outer step that they are drawn for, of an algorithm that `anneals`.

    Args:
      tasks: the distribution.
      step: (), int32: outer steps taken before, for `Algorithm.at_outer_step`.
    """

    tasks: Tasks
    step: jax.Array

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task of the distribution."""
        return draw(self.tasks, key)


def draw_episode(tasks: Tasks, key: jax.Array) -> Episode:
    """Return the episode of the task that `draw_task` draws with the same key."""
    return draw(tasks, task_keys(key).episode)


def draw_task(
    algorithm: Algorithm,
    tasks: Tasks,
    key: jax.Array,
    transform: Callable[[Unroll], Unroll] | None = None,
    layout: Layout | None = None,
) -> DrawnTask:
    """Return the task that `key` draws, with the unroll of `algorithm`.

    Args:
      algorithm: of the inner loop.
      tasks: the distribution to draw from.
      key: (); the same key draws the same episode, batches and engine key.
      transform: applied to the unroll; None: nothing.
      layout: how inner batches and inner states are laid out over devices; None: on one device.

    Raises:
      ValueError: for tasks of a level above (`MetaTrainingRuns`) and an algorithm of one level.
    """
    step = None
    if isinstance(tasks, AtOuterStep):
        step, tasks = tasks.step, tasks.tasks
    if isinstance(tasks, WithConstants):
        algorithm, tasks = algorithm.bind(tasks.constants), tasks.tasks
    if step is not None:
        algorithm = algorithm.at_outer_step(step)
    keys, episode = task_keys(key), draw_episode(tasks, key)
    if not algorithm.reads_tasks:
        _check_level(algorithm, tasks, episode)
    examples: list[tuple[int, ...]] = []
    if layout is not None:
        episode, examples = _over_devices(algorithm, episode, layout)
    unroll = unroll_of(algorithm, episode, keys.unroll)
    unroll = unroll if transform is None else transform(unroll)

    def laid_out(batches: Callable[..., Batch]) -> Callable[..., Batch]:
        if layout is None:
            return functools.partial(batches, episode, keys.batches)
        return lambda *steps: shard_examples(layout, batches(episode, keys.batches, *steps), 1)

    return DrawnTask(
        unroll if layout is None else constrain(layout, unroll, examples),
        laid_out(algorithm.batches),
        laid_out(algorithm.batches_at),
        keys.engine,
    )


def _check_level(algorithm: Algorithm, tasks: Tasks, episode: Episode) -> None:
    """Raise ValueError where the support set of an episode is a distribution over tasks."""
    nodes = jax.tree.leaves(episode.support, is_leaf=lambda node: isinstance(node, Tasks))
    inside = [type(node).__name__ for node in nodes if isinstance(node, Tasks)]
    if inside:
        name, outside = type(algorithm).__name__, type(tasks).__name__
        raise ValueError(
            f"{name} got the tasks `{outside}`, of which an episode is a whole meta-training run: "
            f"its support set is a distribution over tasks, `{inside[0]}`, not examples. Pass "
            f"{name} the `{inside[0]}` itself; or, to learn how an algorithm is meta-trained, one "
            f"level above it, pass `{outside}` to `LearnedOptimizer(MetaTraining(algorithm), rule, "
            "inner_steps)`."
        )


def _over_devices(
    algorithm: Algorithm, episode: Episode, layout: Layout
) -> tuple[Episode, list[tuple[int, ...]]]:
    """Return an episode whose examples are sharded, and the shapes of those that steps read."""
    sharded: set[int] = set()  # the leaves that the algorithm shards: their id()

    def shard(tree: Any) -> Any:
        sharded.update(map(id, jax.tree.leaves(tree)))
        return shard_examples(layout, tree)

    laid_out = algorithm.shard_examples(episode, shard)
    support = jax.tree.leaves(episode.support)
    return laid_out, [jnp.shape(leaf) for leaf in support if id(leaf) in sharded]
