"""What reading a run back needs of its data: `data.json` in the workdir.

    dataset   the section of the config that the file describes
    inputs    shape and type of one batch of inputs, [1, ...]
    outputs   of the network
    folder    where the run was started, in which its relative paths begin
    workdir   of the run, by which a workdir that was moved is known

A model is sized by `inputs` and `outputs` (`build.Sizes`), and the rest of a trainer comes from the
config. So exporting, adapting and reading eta need no data. Evaluating and training do, and find
them from another folder, too.

The file is written when a run starts. Without it, of a run of an earlier version for instance, the
data are read for their sizes.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from metalearn._utils import disk, strict_json
from metalearn._utils.checks import is_integer
from metalearn.experiments.build import Sizes

FILE = "data.json"
T = TypeVar("T")


class RunData(NamedTuple):
    """What the workdir of a run says of its data.

    Args:
      sizes: what a network is sized by; None: the workdir does not say it.
      folder: where the run was started; None: the workdir does not say it.
      moved: whether the workdir has been moved or copied since.
    """

    sizes: Sizes | None = None
    folder: pathlib.Path | None = None
    moved: bool = False

    def folders(self) -> list[pathlib.Path]:
        """Return the folders in which relative paths of the run may begin, the likeliest first.

        Those are the folder in which the run was started, and the current one; the other way round
        where the workdir was moved, perhaps with all that was beside it.
        """
        here = pathlib.Path.cwd()
        if self.folder is None or self.folder == here or not self.folder.is_dir():
            return [here]
        return [here, self.folder] if self.moved else [self.folder, here]


def write(workdir: pathlib.Path, dataset: Mapping[str, Any], sizes: Sizes) -> None:
    """Write `data.json` of a run that starts in the current folder."""
    described = _described(sizes)
    values = {
        "dataset": dict(dataset),
        **({} if described is None else described),
        "folder": str(pathlib.Path.cwd()),
        "workdir": str(workdir.resolve()),
    }
    disk.write(workdir / FILE, strict_json.dumps(values, indent=2) + "\n")


def read(workdir: pathlib.Path, dataset: Mapping[str, Any]) -> RunData:
    """Return what `data.json` says of a dataset; nothing where it is of another one, or damaged."""
    try:
        values = strict_json.restored(strict_json.read(workdir / FILE, FILE))
    except (OSError, ValueError):
        return RunData()
    if not isinstance(values, dict) or values.get("dataset") != dict(dataset):
        return RunData()
    folder = values.get("folder")
    known = isinstance(folder, str) and pathlib.Path(folder).is_absolute()
    moved = values.get("workdir") != str(workdir.resolve())
    return RunData(_sizes(values), pathlib.Path(str(folder)) if known else None, moved)


def built(folders: Sequence[pathlib.Path], build: Callable[[], T]) -> T:
    """Return what `build` returns in the first of some folders where it raises no error.

    The current folder of the process is changed while it is called.

    Raises:
      ValueError, OSError: that it raised in the first folder, where it raises in all.
    """
    errors: list[Exception] = []
    for folder in folders:
        try:
            with contextlib.chdir(folder):
                return build()
        except (ValueError, OSError) as error:
            errors.append(error)
    raise errors[0]


def missing(
    workdir: pathlib.Path, config: Mapping[str, Any], folders: Sequence[Any], described: bool
) -> str:
    """Return the beginning of a message: the data of a run cannot be read.

    `described`: whether the workdir says the sizes of the data, so that the rest needs none.
    """
    dataset = {key: value for key, value in config["dataset"].items() if key != "name"}
    words = [f"{key}={value!r}" for key, value in dataset.items() if isinstance(value, str)]
    named = f"{config['dataset']['name']!r}" + (f" ({', '.join(words)})" if words else "")
    need = (
        "Evaluating and training need them; `run.eta`, `metalearn export` and `metalearn adapt` do "
        "not."
        if described
        else f"The workdir has no {FILE} that describes them, so they are read for the sizes of "
        "the model."
    )
    return (
        f"The data of the run in {workdir} cannot be read: dataset {named}, from the folder "
        f"{' or '.join(map(str, folders))}. {need}"
    )


def _described(sizes: Sizes) -> dict[str, Any] | None:
    """Return sizes as JSON; None where their inputs have no form in it."""
    if sizes.outputs is None:
        return None
    try:
        return {"inputs": _json(sizes.inputs), "outputs": int(sizes.outputs)}
    except TypeError:
        return None


def _sizes(values: Mapping[str, Any]) -> Sizes | None:
    """Return the sizes that `_described` wrote; None where there are none."""
    if not is_integer(values.get("outputs")):
        return None
    try:
        return Sizes(_tree(values["inputs"]), values["outputs"])
    except (AttributeError, KeyError, TypeError, ValueError):  # not what `_json` writes
        return None


def _json(tree: Any) -> Any:
    """Return a pytree of shapes as JSON: an object with one key is a tuple, a list or a dict."""
    if isinstance(tree, jax.ShapeDtypeStruct):
        return {"shape": list(tree.shape), "dtype": jnp.dtype(tree.dtype).name}
    if type(tree) in (tuple, list):
        return {type(tree).__name__: [_json(each) for each in tree]}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _json(each) for key, each in tree.items()}}
    raise TypeError(f"{type(tree).__name__} has no form in JSON")


def _tree(value: Any) -> Any:
    """Return the pytree of shapes that `_json` wrote."""
    if value.keys() == {"shape", "dtype"}:
        shape = tuple(value["shape"])
        if not all(is_integer(size) and size >= 0 for size in shape):
            raise ValueError(f"{shape} is no shape")
        return jax.ShapeDtypeStruct(shape, jnp.dtype(value["dtype"]))
    ((kind, parts),) = value.items()
    if kind == "dict":
        return {key: _tree(each) for key, each in parts.items()}
    return {"tuple": tuple, "list": list}[kind](_tree(each) for each in parts)
