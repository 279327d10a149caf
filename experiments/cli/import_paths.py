"""Names in a config that are import paths: "my_package.my_file:MyAlgorithm".

What stands before the colon is a module, as in an `import` statement; what stands behind it is a
class or function of the module, or an attribute of one ("my_file:MyTasks.create"). Modules are
found where Python finds them, and in the current directory, as for `python -m`.

An import path executes code. A config file is Python and does so anyway, but a config as JSON,
and the record of a run in a workdir, may be from others: a JSON config with import paths is refused
without `--allow-imports`, and so is a run with import paths that no run of this user was trained
with on this machine. Those are kept, one a line, in the cache directory (`imports.txt`); and with
each the folders in which runs were started, where a run that is read from elsewhere finds them.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from metalearn._utils.checks import first_line, nearest
from metalearn.datasets.reading import cache_dir
from metalearn.experiments.cli.values import leaves

NAME = r"[^\W\d]\w*"
PATH = re.compile(rf"{NAME}(?:\.{NAME})*:{NAME}(?:\.{NAME})*")
NOT_CODE = "wandb"  # the names of a run there may look like an import path, and are never imported


def is_import_path(name: Any) -> bool:
    """Return whether a name in a config is an import path.

    >>> is_import_path("my_package.my_file:MyAlgorithm"), is_import_path("maml")
    (True, False)
    """
    return isinstance(name, str) and PATH.fullmatch(name) is not None


def import_paths(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the import paths in a config, by dotted key."""
    code = {key: value for key, value in config.items() if key != NOT_CODE}
    return {key: value for key, value in leaves(code) if is_import_path(value)}


def check_json(path: str, config: Mapping[str, Any], allowed: bool) -> None:
    """Raise ValueError if a JSON config names import paths, unless they are allowed."""
    named = import_paths(config)
    if named and not allowed:
        key, name = next(iter(named.items()))
        raise ValueError(
            f"{path} sets config.{key} to the import path {name!r}, and to import is to execute "
            "code, which a JSON config does not do by itself. If you trust that code, add "
            "--allow-imports; or set the key on the command line."
        )


def remember(config: Mapping[str, Any]) -> None:
    """Note the import paths of a config that the user trains with, for `check_run`."""
    names = set(import_paths(config).values())
    here = pathlib.Path.cwd()
    named = (names | {_in(here, name) for name in names}) - _known()
    if not named:
        return
    try:
        with (cache_dir() / "imports.txt").open("a") as file:
            file.write("".join(f"{name}\n" for name in sorted(named)))
    except OSError:  # no cache: `check_run` then asks for the flag
        pass


def check_run(workdir: Any, config: Mapping[str, Any], allowed: bool) -> None:
    """Raise ValueError if the config of a run has import paths that this user has not run."""
    if allowed:
        return
    named, known = import_paths(config), _known()
    for key, name in named.items():
        if name not in known:
            raise ValueError(
                f"The run in {workdir} names code by the import path {name!r} (config.{key}), and "
                "to read the run is to execute it. No run on this machine has been trained with it "
                "yet. If you trust that code, add --allow-imports (in Python: allow_imports=True)."
            )


def known_in(folder: pathlib.Path | None, config: Mapping[str, Any]) -> bool:
    """Return whether this user has trained in a folder with all import paths of a config."""
    return folder is None or _known().issuperset(
        _in(folder, name) for name in import_paths(config).values()
    )


def _in(folder: pathlib.Path, name: str) -> str:
    """Return the line that says that an import path was found from a folder."""
    return f"{name} {str(folder)!r}"


def _known() -> set[str]:
    try:
        return set((cache_dir() / "imports.txt").read_text().splitlines())
    except OSError:
        return set()


def make_current_directory_importable() -> None:
    """Add the current directory to `sys.path`, as `python -m` does."""
    here = os.getcwd()
    if not {"", here} & {*sys.path}:
        sys.path.insert(0, here)


def load(path: str, what: str) -> Any:
    """Return what an import path names.

    Args:
      path: such as "my_package.my_file:MyAlgorithm".
      what: for messages, such as "algorithm".

    Raises:
      ValueError: if the module cannot be imported, or has no such attribute.
    """
    make_current_directory_importable()
    module_name, _, attributes = path.partition(":")
    value: Any = _module(module_name, f"The {what} {path!r}")
    for name in attributes.split("."):
        if name not in dir(value):
            names = _public(value)
            holder = f"{value.__file__}" if inspect.ismodule(value) else f"{value!r}"
            raise ValueError(
                f"The {what} {path!r} cannot be imported: {holder} has no {name!r}."
                f"{nearest(name, names)} It has: {', '.join(names) or 'nothing'}."
            )
        value = getattr(value, name)
    return value


def _module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{what} cannot be imported: the module {name!r} imports {error.name!r}, which is "
                "not installed."
            ) from error
        raise ValueError(
            f"{what} cannot be imported: there is no module {error.name!r}, neither among what is "
            f"installed nor in the current directory, {os.getcwd()}. An import path is "
            "'package.module:Name'; begin in the folder that holds the package, or put the folder "
            "on PYTHONPATH."
        ) from error
    except Exception as error:  # the user's module may raise anything
        raise ValueError(
            f"{what} cannot be imported: the module {name!r} raises {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def _public(value: Any) -> list[str]:
    """Return the names that a module defines itself, or the public attributes of anything else."""
    names = [name for name in dir(value) if not name.startswith("_")]
    if not inspect.ismodule(value):
        return names
    return [name for name in names if inspect.getmodule(vars(value)[name]) is value]
