"""`metalearn adapt`: adapt to a support set with what a run has learned, and predict a query set.

The support set is an .npz file with the arrays `inputs` and `labels`, as the algorithm of the run
reads them (`Algorithm.adapt`), or a folder with a folder of images for each class; the query set
the same without need of labels, so that a folder may hold the images themselves. uint8 images are
scaled to 0..1 where the model of the run takes floats. The predictions are an .npz file:

    outputs      [n, ...], of the model
    predictions  [n], of classes: the largest output, counted from 0
    names        [n], of images by class: the name of the predicted class
    files        [n], of images: the path of each in its folder
"""

from __future__ import annotations

import pathlib
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from metalearn._utils.pixels import are_pixels
from metalearn.datasets.folders import read_folder
from metalearn.experiments import build
from metalearn.experiments.commands.run import named
from metalearn.experiments.runs import load_run


class Examples(NamedTuple):
    """A support or query set that was read from files.

    inputs: [n, ...], or with more leading axes, as the algorithm reads them.
    labels: [n, ...]; None: there are none.
    classes: the names of the classes, of a folder of images by class.
    files: the path of each image in its folder, of a folder of images.
    """

    inputs: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def adapt(
    workdir: pathlib.Path,
    support: pathlib.Path,
    query: pathlib.Path,
    out: pathlib.Path | None = None,
    inner_steps: int | None = None,
    best: bool = False,
    allow_imports: bool = False,
) -> None:
    """Adapt to a support set, predict a query set, write the predictions, and say their score."""
    run = load_run(workdir, best, allow_imports)
    algorithm, example = run.algorithm, run.sizes.inputs
    examples = read("support", support, example)
    queries = read("query", query, example, labelled=False)
    if examples.classes and queries.classes:
        queries = _same_classes(examples, queries)
    key = build.key_of(run.config["seed"])
    episode_support = examples.inputs, examples.labels
    learner = algorithm.adapt(run.eta, episode_support, key, steps=inner_steps)
    outputs = np.asarray(learner.predict(queries.inputs))
    results, score = _results(examples, queries, outputs)
    out = out or workdir / "predictions.npz"
    with named(out), out.open("wb") as file:
        np.savez(file, **results)  # type: ignore[arg-type]
    size = ", ".join(f"{name} {list(array.shape)}" for name, array in results.items())
    step, count = run.step, len(outputs)
    undefined = int((~np.isfinite(outputs.reshape(count, -1))).any(1).sum())
    print(
        f"{out}: {size}, of outer step {step} of {workdir} after {learner.steps} inner steps."
        + (f"\n{score} on the {count} labelled queries." if score else "")
    )
    if undefined:
        print(
            f"Warning: the outputs of {undefined} of the {count} queries are NaN or infinite, and "
            "what is predicted for them means nothing. The inner loop diverged on this support "
            "set, or it lacks a class that the algorithm needs."
        )


def read(what: str, path: pathlib.Path, example: Any, labelled: bool = True) -> Examples:
    """Read a support or query set from an .npz file, or a folder of images, which are resized.

    Args:
      what: the flag that names it: "support".
      path: of the file or the folder.
      example: the shape and type [1, ...] of a batch of inputs of the run's model.
      labelled: whether it needs labels.

    Raises:
      ValueError: where it cannot be read, lacks labels, or has inputs of another shape.
    """
    shape = example.shape[1:]
    if path.is_dir():
        size, channels = (shape[:2], shape[-1]) if len(shape) == 3 else (None, None)
        folder = read_folder(path, size=size, channels=channels, training=False)
        examples = Examples(folder.images, folder.labels, folder.classes, folder.files)
        if labelled and examples.labels is None:
            raise ValueError(
                f"--{what}={path} holds images, and no folder for each class, whose name would "
                f"say what they are. Move the images of a class into a folder: {path}/CLASS."
            )
    else:
        examples = _read_arrays(what, path, labelled)
    inputs = examples.inputs
    if inputs.shape[-len(shape) :] != shape or inputs.ndim <= len(shape):
        raise ValueError(
            f"--{what}={path} has inputs of the shape {list(inputs.shape)}, but the model of this "
            f"run takes [n, {', '.join(map(str, shape))}]. Crop or resize the images, or reshape "
            "the arrays."
        )
    if jnp.issubdtype(example.dtype, jnp.floating) and are_pixels(
        f"--{what}", inputs.dtype, tuple(shape)
    ):
        inputs = inputs.astype(np.float32) / 255
    return examples._replace(inputs=np.asarray(inputs, example.dtype))


def _read_arrays(what: str, path: pathlib.Path, labelled: bool) -> Examples:
    if not path.is_file():
        raise ValueError(f"There is no file and no folder --{what}={path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise ValueError(
            f"--{what}={path} is no .npz file of arrays ({error}). Write one with "
            "`np.savez(path, inputs=..., labels=...)`, or name a folder of images."
        ) from error
    needed = ("inputs", "labels") if labelled else ("inputs",)
    if missing := [name for name in needed if name not in arrays]:
        raise ValueError(
            f"--{what}={path} lacks {' and '.join(missing)}; it has {sorted(arrays)}. Write it "
            "with `np.savez(path, inputs=..., labels=...)`."
        )
    labels = arrays.get("labels")
    if labels is not None and labels.dtype.kind in "iu":
        labels = labels.astype(np.int32)
    return Examples(arrays["inputs"], labels)


def _same_classes(support: Examples, queries: Examples) -> Examples:
    """Return the queries with their labels counted as those of the support set."""
    unknown = sorted(set(queries.classes) - set(support.classes))
    if unknown:
        raise ValueError(
            f"--query has images of {', '.join(unknown)}, and --support has none to adapt to; it "
            f"has {', '.join(support.classes)}. Name the folders of the two alike, or put queries "
            "of an unknown class into one folder, without folders in it."
        )
    numbers = np.array([support.classes.index(name) for name in queries.classes], np.int32)
    return queries._replace(labels=numbers[queries.labels])


def _results(
    support: Examples, queries: Examples, outputs: np.ndarray
) -> tuple[dict[str, np.ndarray], str]:
    """Return (arrays to write, the score in words; "" without labels)."""
    results = {"outputs": outputs}
    if queries.files:
        results["files"] = np.array(queries.files)
    assert support.labels is not None
    if support.labels.dtype.kind != "i":
        if queries.labels is None:
            return results, ""
        _check_shape(queries.labels, outputs)
        return results, f"Mean squared error {np.mean((outputs - queries.labels) ** 2):.4g}"
    seen = outputs[..., : len(support.classes)] if support.classes else outputs
    results["predictions"] = seen.argmax(-1).astype(np.int32)
    if support.classes:
        results["names"] = np.array(support.classes)[results["predictions"]]
    if queries.labels is None:
        return results, ""
    _check_shape(queries.labels, results["predictions"])
    return results, f"Accuracy {np.mean(results['predictions'] == queries.labels):.3f}"


def _check_shape(labels: np.ndarray, expected: np.ndarray) -> None:
    """Raise ValueError for labels of queries of another shape than what is predicted."""
    if labels.shape != expected.shape:
        raise ValueError(
            f"--query has labels {list(labels.shape)}, and what is predicted for its inputs is "
            f"{list(expected.shape)}: no score can be taken. Give them that shape, or leave the "
            "labels out."
        )
