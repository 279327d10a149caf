"""Meta-parameters in a file of their own, for use without the trainer, or without metalearn.

    save_eta("eta.safetensors", eta)              # `metalearn export` does this for a run
    eta = load_eta("eta.safetensors")             # nested dictionaries of NumPy arrays
    params = load_eta("eta.safetensors", like=params)   # in the structure of a model's parameters

The file is safetensors. An array's name is its path in the tree of eta, the keys joined by slashes:
"params/head/kernel" of MAML, whose eta has the fields `params` and `rates`. The metadata holds the
keys of each name as JSON (a key may contain a slash, as Haiku's do), the versions of the libraries,
and the config, algorithm and outer step of a run. Loading executes no code from the file.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils import disk, strict_json
from metalearn._utils.tensor_file import read_tensors
from metalearn._utils.trees import is_array, is_differentiable
from metalearn._utils.version import __version__
from metalearn.checkpoints.record import versions
from metalearn.train_state import TrainState

FORMAT = "metalearn eta"
SCHEMA = "1"  # version of the layout: the metadata and the names of the arrays
ALONE = "eta"  # the name of an eta that is one array

Keys = tuple[str | int, ...]
Names = tuple[str, ...]  # keys as text, to match those of another tree


def save_eta(path: str | os.PathLike[str], eta: Any, **about: Any) -> None:
    """Write meta-parameters to a file for `load_eta`. An existing file is replaced.

    Args:
      path: of the file; its folder is created.
      eta: any pytree of arrays, such as `trainer.learned(state)`.
      **about: JSON values to keep in the metadata, such as `config=`.

    Raises:
      TypeError: if eta is a train state.
      ValueError: for an array of a type that safetensors does not have, or two arrays of one name.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save

    if isinstance(eta, TrainState):
        raise TypeError(
            "`save_eta` takes eta, not the whole train state: `trainer.learned(state)`."
        )
    keys = [_keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(eta)]
    names = [_name(each) for each in keys]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two arrays of eta have the path {twice!r}. Rename one of their keys.")
    leaves = jax.device_get(jax.tree.leaves(eta))
    arrays = {n: np.asarray(leaf, order="C") for n, leaf in zip(names, leaves, strict=True)}
    texts = {"keys": dict(zip(names, keys, strict=True)), "versions": versions(), **about}
    metadata = {key: strict_json.dumps(value) for key, value in texts.items()}
    metadata |= {"format": FORMAT, "schema": SCHEMA, "metalearn": __version__}
    try:
        content = save(arrays, metadata)
    except SafetensorError as error:
        raise ValueError(
            f"safetensors cannot hold an array of this eta: {error}. Convert it first, such as "
            "complex numbers of 128 bits into complex64, or into real and imaginary parts."
        ) from error
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, content)


def load_eta(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Return the meta-parameters of a file that `save_eta` or `metalearn export` wrote.

    Args:
      path: of the file.
      like: parameters of the structure to return, of any library: a dictionary of Flax or Haiku, an
        `nnx.State`, an Equinox module, eta itself. Their names are those of the file, or those
        inside one of its parts: `like=params` takes what is under "params/" of MAML's eta.

    Returns:
      Nested dictionaries of NumPy arrays, by the keys of eta (fields by name, sequences by index);
      or the tree of `like` with JAX arrays of its types in place of its floating-point ones.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is of another kind or damaged, or names or shapes are not `like`'s.
    """
    path = pathlib.Path(path)
    keys, arrays = _read(path)
    return _nested(path, keys, arrays) if like is None else _fitted(path, keys, arrays, like)


def _read(path: pathlib.Path) -> tuple[dict[str, Keys], dict[str, np.ndarray]]:
    """Return the keys and the array of each name in a file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. `metalearn export --workdir=...` writes one from a run, and "
            "`save_eta(path, eta)` in Python."
        )

    def check(metadata: Mapping[str, str]) -> None:
        if metadata.get("format") != FORMAT or metadata.get("schema") != SCHEMA:
            raise _other_file(path, metadata)

    metadata, arrays = read_tensors(
        path, check, "export it again", "was not written by `save_eta`."
    )
    keys = strict_json.parse(metadata.get("keys", ""), f"The list of names in {path}")
    if (
        not isinstance(keys, dict)
        or keys.keys() != arrays.keys()
        or not all(map(_are_keys, keys.values()))
    ):
        raise ValueError(
            f"{path} is damaged: the names in its metadata are not those of its arrays. Copy it "
            "again, or export it again."
        )
    return {name: tuple(each) for name, each in keys.items()}, arrays


def _other_file(path: pathlib.Path, metadata: Mapping[str, str]) -> ValueError:
    if metadata.get("format") == FORMAT:
        return ValueError(
            f"{path} has schema {metadata.get('schema')}, and this metalearn ({__version__}) reads "
            f"schema {SCHEMA}. Load it with metalearn {metadata.get('metalearn')}, which wrote it."
        )
    if metadata.get("format") == "metalearn update rule":
        return ValueError(
            f"{path} holds a learned optimizer, which `metalearn.algorithms.load_optimizer(path)` "
            "loads."
        )
    return ValueError(
        f"{path} is a safetensors file, but no eta of metalearn. `safetensors.numpy.load_file` "
        "reads the arrays of any such file."
    )


def _are_keys(keys: Any) -> bool:
    return isinstance(keys, list) and all(type(key) in (str, int) for key in keys)


def _keys(path: Any) -> Keys:
    """Return the keys of a leaf's path: of dictionaries, the names of fields, indices."""
    return tuple(map(_key, path))


def _key(entry: Any) -> str | int:
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return entry.name
    key = entry.idx if isinstance(entry, jax.tree_util.SequenceKey) else entry.key
    return key if type(key) in (str, int) else str(key)


def _name(keys: Keys | Names) -> str:
    return "/".join(map(str, keys)) or ALONE


def _nested(path: pathlib.Path, keys: Mapping[str, Keys], arrays: Mapping[str, np.ndarray]) -> Any:
    """Return nested dictionaries of the arrays; an eta that is one array as that array."""
    tree: dict[str | int, Any] = {}
    for name, (*parents, last) in ((name, each) for name, each in keys.items() if each):
        inside: Any = tree
        for key in parents:
            inside = inside.setdefault(key, {}) if isinstance(inside, dict) else None
        if not isinstance(inside, dict) or last in inside:
            raise ValueError(f"{path} is damaged: {name!r} lies inside an array.")
        inside[last] = arrays[name]
    return tree if tree or ALONE not in arrays else arrays[ALONE]


def _fitted(
    path: pathlib.Path, keys: Mapping[str, Keys], arrays: Mapping[str, np.ndarray], like: Any
) -> Any:
    """Return the tree of `like` with the arrays of a file, matched by their keys."""
    by_keys = {tuple(map(str, each)): arrays[name] for name, each in keys.items()}
    leaves, treedef = jax.tree.flatten(like)
    names = [tuple(map(str, _keys(p))) for p, _ in jax.tree_util.tree_leaves_with_path(like)]
    expected = [_is_learned(leaf) for leaf in leaves]
    wanted = [name for name, is_one in zip(names, expected, strict=True) if is_one]
    prefix, bare = _best_part(by_keys, wanted)
    names = [_without_value(name) for name in names] if bare else names
    part = {each[len(prefix) :]: x for each, x in by_keys.items() if each[: len(prefix)] == prefix}
    slots = {
        name: leaf for name, leaf, is_one in zip(names, leaves, expected, strict=True) if is_one
    }
    if trouble := _differences(slots, part):
        where = f"the part {_name(prefix)!r} of {path}" if prefix else f"{path}"
        raise ValueError(
            f"The parameters `like` are not those in {where}:\n"
            + "\n".join(f"  {line}" for line in trouble)
            + "\nGive parameters of the model that was trained, of the same sizes."
        )
    values = [
        jnp.asarray(part[name], leaf.dtype) if name in slots else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, values)


def _is_learned(leaf: Any) -> bool:
    """Return whether a leaf is a floating-point array, or the shape of one."""
    return (is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)) and is_differentiable(leaf)


def _best_part(by_keys: Mapping[Names, Any], wanted: list[Names]) -> tuple[Names, bool]:
    """Return the keys of the part of a file that has most of some names, the whole file first.

    Also whether the names match without the "value" that Flax NNX puts at the end of a path.
    """
    prefixes = dict.fromkeys(each[:n] for n in range(4) for each in by_keys if n <= len(each))
    best: tuple[int, Names, bool] = (-1, (), False)
    for prefix in prefixes:
        for bare in (False, True):
            names = map(_without_value, wanted) if bare else wanted
            matches = sum(prefix + name in by_keys for name in names)
            if matches > best[0]:
                best = matches, prefix, bare
    return best[1:]


def _without_value(name: Names) -> Names:
    return name[:-1] if name[-1:] == ("value",) else name


def _differences(slots: Mapping[Names, Any], part: Mapping[Names, np.ndarray]) -> list[str]:
    """Return what differs between the parameters to fill and the arrays of a file, line by line."""
    missing = [f"{_name(n)} {list(x.shape)}" for n, x in slots.items() if n not in part]
    extra = [f"{_name(n)} {list(x.shape)}" for n, x in part.items() if n not in slots]
    shapes = [
        f"{_name(n)} has shape {list(part[n].shape)} in the file and {list(x.shape)} in `like`"
        for n, x in slots.items()
        if n in part and part[n].shape != x.shape
    ]
    lines = [f"not in the file: {_listed(missing)}"] if missing else []
    lines += [f"in the file alone: {_listed(extra)}"] if extra else []
    return lines + shapes[:MOST] + ([f"... and {len(shapes) - MOST} more"] if shapes[MOST:] else [])


MOST = 8  # names in a message


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"{', '.join(names[:MOST])}{more}"
