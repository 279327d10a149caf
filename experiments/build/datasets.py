"""From a config to the tasks of a run: to train on, to choose by, and to report.

A dataset that `metalearn.datasets` exports is a function of a split ("train", "validation" or
"test") and keywords, which are the keys of a config. It returns a `ClassIndex`, from which
few-shot tasks are drawn, or `Tasks`. Others have a builder of their own in `SPECIAL`. The key `on`
says where the examples stay: on the "device", where programs draw from them; or on the "host",
whence the rows of the next steps are read. The tasks are the same.

A dataset of the user's own, `name = "my_package.my_file:my_dataset"`, is such a function; or one
that returns `Splits`; or a class of `Tasks`. Where it has no argument `split`, the same
distribution is trained and tested on: with other keys, so on other tasks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn import Tasks, datasets
from metalearn._utils.checks import at_least, pick
from metalearn.datasets import (
    BYTES,
    ClassIndex,
    Corruption,
    FewShot,
    HeldOut,
    HostFewShot,
    HostHeldOut,
    HostText,
    HostTrainingRuns,
    Images,
    Sinusoid,
    Text,
    TrainingRuns,
    read_images,
    read_text,
    with_label_noise,
)
from metalearn.experiments.build.registry import (
    Exports,
    check_call,
    check_kind,
    find,
    parameters,
    without_unset,
)
from metalearn.tasks import check_tasks

SPLITS = ("train", "validation", "test")
PLACES = {"device": False, "host": True}  # whether the tasks read from the host


class Sizes(NamedTuple):
    """What a network is sized by: all that the algorithm of a run needs of its data."""

    inputs: Any  # the shapes of one batch of inputs, leaves [1, ...]
    outputs: int | None  # of the network: ways, or the dimension of a regression; None: no head


class Splits(NamedTuple):
    """Tasks to train on, to choose by, and to report; and what a model sees of them."""

    train: Tasks
    validation: Tasks | None  # disjoint from those to train on; None: there are none
    test: Tasks
    inputs: Any  # the shapes of one batch of inputs, leaves [1, ...]
    outputs: int | None  # of the network: ways, or the dimension of a regression; None: no head

    @property
    def sizes(self) -> Sizes:
        """What a network is sized by, without the tasks."""
        return Sizes(self.inputs, self.outputs)


def splits(config: Mapping[str, Any]) -> Splits:
    """Read a dataset and make its three distributions over tasks."""
    options = dict(config)
    name = options.pop("name")
    read = find(DATASETS, name, "dataset", (Tasks,))
    what = f"dataset {name!r}"
    if name in SPECIAL:
        check_call(what, options, read)
        return read(**options)
    if returns(read, ClassIndex):
        check_call(what, options, few_shot, read, filled=("read", "split"))
        return few_shot(read, **options)
    check_call(what, options, read, filled=("split",))
    if name in DATASETS:
        return of_tasks(*(read(split, **options) for split in SPLITS))
    return _own(read, name, without_unset(options))


def _own(read: Callable[..., Any], name: str, options: Mapping[str, Any]) -> Splits:
    """Return the tasks of a class or function of the user's own."""
    if "split" in parameters(read):
        distributions = [read(split=split, **options) for split in SPLITS]
    else:
        distributions = [read(**options)] * len(SPLITS)
    if isinstance(distributions[0], ClassIndex):
        raise ValueError(
            f"The dataset {name!r} returned a ClassIndex. Say so in its annotation, `def "
            f"{read.__name__}(split, ...) -> ClassIndex:`; its keys are then those of few-shot "
            "tasks too: ways, shots, queries and eval_queries."
        )
    for each in distributions:
        check_kind(each, name, "dataset", (Tasks, Splits))
    if isinstance(distributions[0], Splits):
        return distributions[0]
    train, validation, test = distributions
    return of_tasks(train, validation, test, name)


def few_shot(
    read: Callable[..., ClassIndex],
    ways: int,
    shots: int,
    queries: int,
    eval_queries: int,
    on: str = "device",
    variants: int = 1,
    **options: Any,
) -> Splits:
    """Make few-shot tasks of the classes of each split.

    Args:
      read: a split, **options -> its classes.
      ways: classes in a task.
      shots: support examples per class.
      queries: query examples per class, of tasks to train on.
      eval_queries: query examples per class, of tasks to evaluate on.
      **options: of `read`.
      on: "device", or "host": examples stay on the host, and the rows of a step are read from it.
      variants: 4 with rotations, for tasks with one quarter turn at most of a class; see `FewShot`.
    """
    host = on_host(on)
    if host and variants != 1:
        raise ValueError(
            f"dataset.variants={variants} is drawn on the device: leave dataset.on='device', or "
            "variants=1."
        )
    shape = {"ways": ways, "shots": shots, **({} if host else {"variants": variants})}
    each = {"train": queries, "validation": eval_queries, "test": eval_queries}
    indices = {split: read(split, **options) for split in SPLITS}
    train, validation, test = (
        _few_shot_tasks(s, indices[s], {**shape, "queries": each[s]}, host) for s in SPLITS
    )
    return of_tasks(train, validation, test)


def on_host(on: str) -> bool:
    """Return whether the examples of a dataset stay on the host; ValueError for another place."""
    return pick(PLACES, on, "place of a dataset (dataset.on)")


def _few_shot_tasks(split: str, index: ClassIndex, shape: dict[str, Any], host: bool) -> Tasks:
    try:
        if not host:
            return FewShot.create(index, **shape)
        most = jax.tree.leaves(index.examples)[0].shape[1]  # beyond a count there is padding
        present = np.arange(most) < np.asarray(index.counts)[:, None]
        examples = jax.tree.map(lambda leaf: np.asarray(leaf)[present], index.examples)
        return HostFewShot.create(examples, np.nonzero(present)[0], **shape)
    except ValueError as error:
        raise ValueError(f"In the {split} split: {error}") from error


def of_tasks(train: Tasks, validation: Tasks, test: Tasks, name: str = "") -> Splits:
    """Find what a model sees of tasks whose queries are (inputs [n, ...], targets [n, ...]).

    Args:
      train: to train on.
      validation: to choose by.
      test: to report.
      name: of the dataset, for messages.
    """
    check_tasks(f"dataset {name!r}", train)
    query = jax.eval_shape(train.sample, jax.random.key(0)).query
    if not isinstance(query, tuple | list) or not all(map(_is_array, query[:2])) or len(query) < 2:
        raise ValueError(
            f"The dataset {name!r} has tasks whose query is {jax.tree.map(_shown, query)!s:.200}. "
            "A network is sized by a query (inputs [n, ...], targets [n, ...]); for any other, let "
            "the dataset be a function that returns `metalearn.experiments.build.Splits(train, "
            "validation, test, inputs, outputs)`, with the sizes stated."
        )
    inputs, targets = query[:2]
    with jax.ensure_compile_time_eval():  # `metalearn plan` reads data under a trace
        labels = train.label_range()
    outputs = math.prod(targets.shape[1:]) if labels is None else labels[1] + 1
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    return Splits(train, validation, test, example, outputs)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.ShapeDtypeStruct)


def _shown(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _sinusoid(shots: int, queries: int, eval_queries: int) -> Splits:
    """Make sine waves with random amplitudes and phases, which never repeat.

    Args:
      shots: support points of a task.
      queries: query points of a task to train on.
      eval_queries: query points of a task to evaluate on.
    """
    train = Sinusoid(shots, queries)
    held_out = Sinusoid(shots, eval_queries)  # waves never repeat
    return Splits(train, held_out, held_out, jax.ShapeDtypeStruct((1, 1), jnp.float32), 1)


def _text(
    tfds: str,
    feature: str,
    held_out: float,
    corruption: Mapping[str, Any],
    length: int,
    inner_steps: int,
    eval_steps: int,
    batch: int,
    queries: int,
    eval_queries: int,
    probes: int,
    eval_probes: int,
    pieces: int = 1,
    fresh: bool = False,
    on: str = "device",
) -> Splits:
    """Read a text of TFDS, for language models.

    The inner loop always reads the training split, but for its last `held_out` share: that
    is what the outer loss of training reads. Validation and test read their own split, and
    train for `eval_steps`. Where what is learned is how to train (`fresh`), they train on their
    own split too, but for its last `held_out` share, which the outer loss reads.

    Args:
      tfds: the name of a text of TFDS.
      feature: of its records that is the text.
      held_out: the share of the training text that the outer loss reads.
      corruption: share, kinds, probability and seed: of pieces of the training text.
      length: S, tokens in a window.
      inner_steps: T, of training.
      eval_steps: inner steps of an evaluation.
      batch: windows in an inner step.
      queries: held-out windows of a task to train on.
      eval_queries: held-out windows of a task to evaluate on.
      probes: corrupted held-out windows of a task to train on, for metrics.
      eval_probes: corrupted held-out windows of a task to evaluate on, for metrics.
      pieces: the number of pieces of the text, each a source.
      fresh: whether validation and test runs train on their own split.
      on: "device", or "host": examples stay on the host, and the rows of a step are read from it.
    """
    if not 0 < held_out < 1:
        raise ValueError(
            f"dataset.held_out={held_out} is the share of the training text that the inner loop "
            "does not read, above 0 and below 1. Take one such as 0.1."
        )
    corrupted = build_corruption(corruption)
    host = on_host(on)
    if host and (corrupted or pieces != 1 or probes or eval_probes):
        raise ValueError(
            "dataset.on='host' is for a text in one clean piece, and this config has "
            f"corruption.share={corruption['share']}, pieces={pieces}, probes={probes} and "
            f"eval_probes={eval_probes}. Set them to 0, 1, 0 and 0, or dataset.on='device'."
        )
    same: dict[str, Any] = {
        "length": length,
        "batch": batch,
        "pieces": pieces,
        "corruption": corrupted,
    }
    training: dict[str, Any] = {
        "inner_steps": inner_steps,
        "queries": queries,
        "probes": probes,
        **same,
    }
    evaluation: dict[str, Any] = {
        "inner_steps": eval_steps,
        "queries": eval_queries,
        "probes": eval_probes,
        **same,
    }
    texts = {split: read_text(tfds, split, feature=feature) for split in SPLITS}
    cuts = {split: round(len(text) * (1 - held_out)) for split, text in texts.items()}
    inner, judge = texts["train"][: cuts["train"]], texts["train"][cuts["train"] :]
    create = _host_text if host else Text.create
    texts_by_split = {"train": create(inner, judge, **training)}
    for split in SPLITS[1:]:
        text, cut = texts[split], cuts[split]
        parts = (text[:cut], text[cut:]) if fresh else (inner, text)
        texts_by_split[split] = create(*parts, **evaluation)
    window = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return Splits(**texts_by_split, inputs=window, outputs=BYTES.vocabulary)


def _host_text(train: str, held_out: str, **options: Any) -> HostText:
    """Return tasks of texts whose bytes stay on the host, without what they do not have."""
    for name in ("probes", "pieces", "corruption"):
        del options[name]
    tokens = BYTES(train), BYTES(held_out)
    return HostText.create(*tokens, **options, vocabulary=BYTES.vocabulary)


def build_corruption(config: Mapping[str, Any]) -> Corruption | None:
    """Build a corruption; a share of zero is none."""
    return Corruption(**without_unset(config)) if config["share"] else None


def training_run(
    tfds: str,
    data_dir: str | None,
    validation: int | float,
    label_noise: float,
    noise_seed: int,
    held_out: float = 0.0,
    on: str = "device",
    final_on_held_out: bool = True,
) -> Splits:
    """Read a dataset of images as training runs, for what is learned of one training run.

    Hyperparameters are learned on runs that never see the last `held_out` of the training split,
    neither to train on nor to judge by. A validation run is the final run in small: it trains on
    all that they see, and is judged by what is held out. The final one trains on the whole
    training split and is judged by the test split.

    Args:
      tfds: the name of a dataset of images: "digits", or one of TFDS.
      data_dir: the directory of datasets; None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
      validation: the examples of the outer loss of a run: a number, or a share of all.
      label_noise: the share of wrong labels in the inner loop.
      noise_seed: decides which labels are wrong.
      held_out: the share of the training split for evaluations during training; 0: none of it.
      on: "device", or "host": examples stay on the host, and the rows of a step are read from it.
      final_on_held_out: whether the final run trains on what is held out, too; False where what is
        learned is of each training example.
    """
    host = on_host(on)
    train, test = (read_images(tfds, split, data_dir=data_dir) for split in ("train", "test"))
    noisy = with_label_noise(train, label_noise, noise_seed).labels
    count = training_examples(len(noisy), held_out)
    images = train.inputs[:count], train.labels[:count]
    create = HostTrainingRuns.create if host else TrainingRuns.create
    runs = create(*images, validation=validation, training_targets=noisy[:count])
    validation_runs = None
    if count < len(noisy):
        unseen = train.inputs[count:], train.labels[count:]
        validation_runs = _final_run(host, train.inputs[:count], noisy[:count], *unseen)
    rows = slice(None if final_on_held_out else count)
    final = _final_run(host, train.inputs[rows], noisy[rows], *test)
    image = jax.ShapeDtypeStruct((1, *train.inputs.shape[1:]), jnp.float32)
    return Splits(runs, validation_runs, final, image, int(train.labels.max()) + 1)


def _final_run(host: bool, inputs: Any, targets: Any, test_inputs: Any, test_targets: Any) -> Tasks:
    if not host:
        return HeldOut.create(inputs, targets, test_inputs, test_targets)
    return HostHeldOut.create(inputs, targets, test_source=test_inputs, test_targets=test_targets)


def _optimizer_runs(
    tfds: str,
    data_dir: str | None,
    validation: int | float,
    most: int | None,
    held_out: float = 0.0,
    on: str = "device",
) -> Splits:
    """Read a dataset of images: runs on the training split, and on images never seen in those.

    What is learned is how to train, so validation and test runs train too, from fresh
    initialisations: on the last `held_out` of the training split, and on the test split.

    Args:
      tfds: the name of a dataset of images: "digits", or one of TFDS.
      data_dir: the directory of datasets; None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
      validation: the examples by which a run is judged: a number, or a share of all.
      most: images of a split at most; None: all.
      held_out: the share of the training split for evaluations during training; 0: none of it.
      on: "device", or "host": examples stay on the host, and the rows of a step are read from it.
    """
    at_least("dataset", 1, most=most)
    create: Any = HostTrainingRuns.create if on_host(on) else TrainingRuns.create

    def runs(inputs: Any, labels: Any) -> Tasks:
        images = Images(inputs[:most], labels[:most])
        return create(*images, validation=validation)

    images, test = (read_images(tfds, split, data_dir=data_dir) for split in ("train", "test"))
    count = training_examples(len(images.labels), held_out)
    train = runs(images.inputs[:count], images.labels[:count])
    unseen = images.inputs[count:], images.labels[count:]
    validation_runs = runs(*unseen) if len(unseen[1]) else None
    image = jax.ShapeDtypeStruct((1, *images.inputs.shape[1:]), jnp.float32)
    return Splits(train, validation_runs, runs(*test), image, int(images.labels.max()) + 1)


def training_examples(examples: int, held_out: float) -> int:
    """Return how many of the training examples are left where a share of them is held out.

    Raises:
      ValueError: for a share that leaves none on a side; 0 holds nothing out.
    """
    if not 0 <= held_out < 1:
        raise ValueError(
            f"dataset.held_out={held_out} is the share of the training split that evaluations on "
            "the way are judged by, from 0 (none of it, and no evaluations) to below 1. Take one "
            "such as 0.1."
        )
    count = round(held_out * examples)
    if (held_out and not count) or count == examples:
        raise ValueError(
            f"dataset.held_out={held_out} of {examples} training examples is {count} of them, "
            "which leaves none on one side. Take a share such as 0.1, or 0 to hold nothing out."
        )
    return examples - count


SPECIAL: dict[str, Callable[..., Splits]] = {
    "sinusoid": _sinusoid,
    "text": _text,
    "training_run": training_run,
    "optimizer_runs": _optimizer_runs,
}


def _is_dataset(export: Any) -> bool:
    """Say whether an export is a function of a split that returns classes or tasks."""
    if not inspect.isfunction(export):
        return False
    first = next(iter(inspect.signature(export).parameters), "")
    return first == "split" and (returns(export, ClassIndex) or returns(export, Tasks))


def returns(function: Callable[..., Any], kind: type) -> bool:
    """Return whether a function is annotated to return a kind of object."""
    returned = inspect.get_annotations(function, eval_str=True).get("return")
    return isinstance(returned, type) and issubclass(returned, kind)


DATASETS = Exports(datasets, _is_dataset, SPECIAL)
