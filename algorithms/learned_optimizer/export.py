"""Exporting a learned optimizer to one file, which loads as a plain optax optimizer.

    save_optimizer("learned.safetensors", rule, eta)
    optimizer = load_optimizer("learned.safetensors")          # anywhere optax is used

The file is safetensors: the arrays of eta under their pytree paths, and as metadata a schema
version, the version of metalearn, the rule as JSON (`rule_json`) and a SHA-256 of all of these.
Loading executes no code from the file. The digest detects damage, not malice: anyone can write a
file with a matching digest.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save

from metalearn import __version__
from metalearn._utils import strict_json
from metalearn._utils.strict_json import parse, restored
from metalearn._utils.tensor_file import read_tensors
from metalearn._utils.trees import paths
from metalearn.algorithms.learned_optimizer.rule_json import check_bounds, decode, encode
from metalearn.algorithms.learned_optimizer.update_rule import UpdateRule
from metalearn.train_state import TrainState
from metalearn.unroll import Eta

FORMAT = "metalearn update rule"
SCHEMA = "1"  # version of the layout: the metadata and the names of the arrays
DTYPES = ("float16", "float32", "float64")  # that safetensors writes from NumPy


def save_optimizer(path: str | os.PathLike[str], rule: UpdateRule, eta: Eta) -> None:
    """Write a learned optimizer to a file for `load_optimizer`. An existing file is replaced.

    Args:
      path: of the file; its folder is created.
      rule: the update rule.
      eta: its trained parameters.

    Raises:
      ValueError: if eta does not fit the rule, or the rule has parts that cannot be written.
      TypeError: if rule is not an UpdateRule, or eta is a train state.
    """
    if not isinstance(rule, UpdateRule):
        raise TypeError(
            f"`save_optimizer(path, rule, eta)` takes an UpdateRule, not {type(rule).__name__}."
        )
    if isinstance(eta, TrainState):
        raise TypeError("`save_optimizer` takes eta, not the whole train state: `state.eta`.")
    weights = {name: np.asarray(leaf) for name, leaf in _by_path(jax.device_get(eta)).items()}
    _check(weights, _expected(rule), "eta", "Save an eta with the rule that it was trained with.")
    text = strict_json.dumps(encode(rule))
    metadata = {"format": FORMAT, "schema": SCHEMA, "metalearn": __version__, "rule": text}
    metadata["sha256"] = digest(metadata, weights)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(save(weights, metadata))
    temporary.replace(path)


def load_optimizer(
    path: str | os.PathLike[str], known: type | Iterable[type] = ()
) -> optax.GradientTransformationExtraArgs:
    """Return the learned optimizer of a file, as an optax optimizer.

    Args:
      path: of a file that `save_optimizer` wrote.
      known: your own classes among the parts of the rule, such as `(MyRule,)`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is of another kind, damaged, or has parts unknown to this version.
    """
    rule, eta = load_rule(path, known)
    try:
        return rule.optimizer(eta)
    except Exception as error:  # optax: the optimizer does not take these arguments
        raise ValueError(f"The rule in {path} makes no optimizer: {error}") from error


def load_rule(
    path: str | os.PathLike[str], known: type | Iterable[type] = ()
) -> tuple[UpdateRule, Eta]:
    """Return (rule, eta) of a file, to continue its training. See `load_optimizer`."""
    metadata, weights = _read(Path(path))
    check_bounds(f"{path}", metadata["rule"], weights)  # before anything is built from it
    rule = _rule(path, metadata["rule"], (known,) if isinstance(known, type) else known)
    try:
        expected = _expected(rule)
    except Exception as error:  # JAX or a class: the file may hold any size and name
        raise ValueError(f"{path} holds a rule that has no weights: {error}") from error
    _check(weights, expected, f"{path}", "It was not written by `save_optimizer`.")
    arrays = [weights[name] for name in expected]
    leaves = [jnp.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype)) for x in arrays]
    return rule, jax.tree.unflatten(jax.tree.structure(_shapes(rule)), leaves)


def _rule(path: str | os.PathLike[str], text: str, known: Iterable[type]) -> UpdateRule:
    """Return the rule in the metadata of a file."""
    rule = decode(restored(parse(text, f"The rule in {path}", nonfinite=True)), known)
    if not isinstance(rule, UpdateRule):
        raise ValueError(f"{path} holds no update rule, but {rule!r:.80}.")
    return rule


def digest(metadata: Mapping[str, str], weights: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of the metadata, its own entry aside, and of the arrays: hexadecimal."""
    hashed = {key: text for key, text in metadata.items() if key != "sha256"}
    sha256 = hashlib.sha256(strict_json.dumps(hashed, sort_keys=True).encode())
    for name in sorted(weights):
        array = weights[name]
        sha256.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        sha256.update(np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return (metadata, arrays by name) of a file of `save_optimizer`, its digest checked."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory. Name the file in it.")
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. `save_optimizer(path, rule, eta)` writes one from a rule "
            "and what was learned for it."
        )
    metadata, weights = read_tensors(
        path,
        functools.partial(_check_metadata, path),
        "save it again with `save_optimizer`",
        f"weights are saved as {', '.join(DTYPES)}. It was not written by `save_optimizer`.",
    )
    if digest(metadata, weights) != metadata["sha256"]:
        raise ValueError(
            f"{path} is damaged: its contents do not have the digest it was saved with. Copy it "
            "again, or save it again with `save_optimizer`."
        )
    return metadata, weights


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT or not {"schema", "metalearn", "rule", "sha256"} <= {
        *metadata
    }:
        raise ValueError(
            f"{path} is a safetensors file, but not of an optimizer: `save_optimizer` did not "
            f"write it. Its metadata: {_listed(sorted(metadata)) or 'none'}."
        )
    if metadata["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {metadata['schema']}, and this metalearn ({__version__}) reads "
            f"schema {SCHEMA}. Load it with metalearn {metadata['metalearn']}, which wrote it."
        )


def _listed(names: Sequence[str], most: int = 8, longest: int = 80) -> str:
    """Return names for a message, shortened to `most` names of `longest` characters."""
    shown = [name if len(name) <= longest else f"{name[:longest]}..." for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(shown)}{more}"


def _shapes(rule: UpdateRule) -> Eta:
    """Return the shapes of a rule's eta."""
    return jax.eval_shape(rule.init, jax.random.key(0))


def _expected(rule: UpdateRule) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of a rule's eta, by path."""
    return {name: leaf.shape for name, leaf in _by_path(_shapes(rule)).items()}


def _by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their path; "eta" for a tree that is one leaf."""
    names = [name or "eta" for name in paths(tree)]
    if len({*names}) < len(names):
        raise ValueError(f"Two weights have one path: {_listed(names)}. Rename one.")
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def _check(
    weights: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    what: str,
    way_out: str,
) -> None:
    """Raise ValueError unless the arrays have the names and shapes of the rule's eta."""
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(
            f"Weights of the rule are missing from {what}: {_listed(missing)}. {way_out}"
        )
    if extra := [name for name in weights if name not in expected]:
        raise ValueError(f"Weights in {what} are none of the rule's: {_listed(extra)}. {way_out}")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"{name} in {what} has shape {weights[name].shape}, and that of the rule has "
                f"{shape}. {way_out}"
            )
        if weights[name].dtype.name not in DTYPES:
            raise ValueError(
                f"{name} in {what} is of {weights[name].dtype}, and weights are saved as "
                f"{', '.join(DTYPES)}. Convert it: `jax.tree.map(jnp.float32, eta)`."
            )
