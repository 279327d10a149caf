"""Taking a learned optimizer away: one file, read back as a plain optax optimizer.

    save_optimizer("learned.safetensors", rule, eta)
    optimizer = load_optimizer("learned.safetensors")          # anywhere optax is used

The file is safetensors: eta's arrays under their pytree paths, and as metadata a schema version,
the version of metalearn, the rule as JSON (`rule_json`) and a SHA-256 of all of it. Reading it
runs no code of the file's. The digest finds damage, not malice: anyone can write a file whose
digest is right.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from metalearn import __version__
from metalearn._utils import strict_json
from metalearn._utils.strict_json import parse, restored
from metalearn._utils.trees import paths
from metalearn.algorithms.learned_optimizer.rule_bounds import check_bounds
from metalearn.algorithms.learned_optimizer.rule_json import decode, encode
from metalearn.algorithms.learned_optimizer.update_rule import UpdateRule
from metalearn.train_state import TrainState

FORMAT = "metalearn update rule"
SCHEMA = "1"  # of the metadata and the names; another number is another layout
DTYPES = ("float16", "float32", "float64")  # that safetensors writes from NumPy


def save_optimizer(path: str | os.PathLike[str], rule: UpdateRule, eta: Any) -> None:
    """Write what `load_optimizer` reads. A file that is there is replaced whole.

    Raises:
      ValueError: if eta is not one of the rule's, or the rule has parts that cannot be written.
      TypeError: if rule is no UpdateRule, or eta a train state.
    """
    if not isinstance(rule, UpdateRule):
        raise TypeError(
            f"`save_optimizer(path, rule, eta)` takes an UpdateRule, not {type(rule).__name__}."
        )
    if isinstance(eta, TrainState):
        raise TypeError("`save_optimizer` takes eta, not the whole train state: `state.eta`.")
    weights = _named(jax.device_get(eta))
    _check(weights, _expected(rule), "eta", "Save an eta with the rule that it was trained with.")
    text = strict_json.dumps(encode(rule))
    metadata = {"format": FORMAT, "schema": SCHEMA, "metalearn": __version__, "rule": text}
    metadata["sha256"] = digest(metadata, weights)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(save(weights, metadata))
    part.replace(path)


def load_optimizer(
    path: str | os.PathLike[str], known: type | Iterable[type] = ()
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a file, as optax has them.

    Args:
      path: what `save_optimizer` wrote.
      known: classes of your own that the rule is made of, such as `(MyRule,)`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is of another kind, damaged, or holds what this version does not know.
    """
    rule, eta = load_rule(path, known)
    try:
        return rule.optimizer(eta)
    except Exception as error:  # of optax: arguments that its optimizer does not take
        raise ValueError(f"The rule in {path} makes no optimizer: {error}") from error


def load_rule(
    path: str | os.PathLike[str], known: type | Iterable[type] = ()
) -> tuple[UpdateRule, Any]:
    """Return (rule, eta) of a file, to train it further. See `load_optimizer`."""
    metadata, weights = _read(Path(path))
    check_bounds(f"{path}", metadata["rule"], weights)  # before anything is built of it
    rule = _rule(path, metadata["rule"], (known,) if isinstance(known, type) else known)
    try:
        expected = _expected(rule)
    except Exception as error:  # of JAX or a class: a file may hold any size and name
        raise ValueError(f"{path} holds a rule that has no weights: {error}") from error
    _check(weights, expected, f"{path}", "It was not written by `save_optimizer`.")
    found = [weights[name] for name in expected]
    leaves = [jnp.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype)) for x in found]
    return rule, jax.tree.unflatten(jax.tree.structure(_shapes(rule)), leaves)


def _rule(path: str | os.PathLike[str], text: str, known: Iterable[type]) -> UpdateRule:
    """Return the rule that the metadata of a file holds."""
    rule = decode(restored(parse(text, f"The rule in {path}", nonfinite=True)), known)
    if not isinstance(rule, UpdateRule):
        raise ValueError(f"{path} holds no update rule, but {rule!r:.80}.")
    return rule


def digest(metadata: Mapping[str, str], weights: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of the metadata, but for itself, and of arrays by name: hexadecimal."""
    said = {key: text for key, text in metadata.items() if key != "sha256"}
    found = hashlib.sha256(strict_json.dumps(said, sort_keys=True).encode())
    for name in sorted(weights):
        array = weights[name]
        found.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return (metadata, arrays by name) of a file that is whole and ours."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory. Name the file in it.")
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. `save_optimizer(path, rule, eta)` writes one from a rule "
            "and what was learned for it."
        )
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata)  # before anything is read of a file that is not ours
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a safetensors file, or is damaged or cut short ({error}). Copy it "
            "again, or save it again with `save_optimizer`."
        ) from error
    except (AttributeError, TypeError) as error:  # of safetensors, for a type of 8 bits, say
        raise ValueError(
            f"{path} has arrays of a type that NumPy has not ({error}), and weights are saved as "
            f"{', '.join(DTYPES)}. It was not written by `save_optimizer`."
        ) from error
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
    """Return names for a message, which no file makes long."""
    shown = [name if len(name) <= longest else f"{name[:longest]}..." for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(shown)}{more}"


def _shapes(rule: UpdateRule) -> Any:
    return jax.eval_shape(rule.init, jax.random.key(0))


def _expected(rule: UpdateRule) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in _by_path(_shapes(rule)).items()}


def _named(eta: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in _by_path(eta).items()}


def _by_path(tree: Any) -> dict[str, Any]:
    names = [name or "eta" for name in paths(tree)]
    if len({*names}) < len(names):
        raise ValueError(f"Two weights have one path: {_listed(names)}. Rename one.")
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def _check(
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    what: str,
    way_out: str,
) -> None:
    """Raise ValueError unless the arrays have the names and shapes of the rule's eta."""
    if missing := [name for name in expected if name not in found]:
        raise ValueError(
            f"Weights of the rule are missing from {what}: {_listed(missing)}. {way_out}"
        )
    if extra := [name for name in found if name not in expected]:
        raise ValueError(f"Weights in {what} are none of the rule's: {_listed(extra)}. {way_out}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{name} in {what} has shape {found[name].shape}, and that of the rule has "
                f"{shape}. {way_out}"
            )
        if found[name].dtype.name not in DTYPES:
            raise ValueError(
                f"{name} in {what} is of {found[name].dtype}, and weights are saved as "
                f"{', '.join(DTYPES)}. Convert it: `jax.tree.map(jnp.float32, eta)`."
            )
