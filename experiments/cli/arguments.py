"""Reading a command line before absl does, so that a mistake in it is explained.

absl and ml-collections answer an unknown key with a bare AttributeError. Here the keys
are held against the config first, and the nearest one is named; and so are the values, and the
type that a key takes is.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from metalearn._utils.checks import nearest, pick
from metalearn.experiments.cli import values

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
JSON = pathlib.Path(__file__).parent / "json_config.py"  # reads the path that is its option
HANDED_OVER = pathlib.Path(__file__).parent / "loaded_config.py"  # its option is a key of LOADED
LOADED: dict[str, ml_collections.ConfigDict] = {}  # by what `--config` was; each executed once


# Keys of a config that were called otherwise in versions before.
RENAMED = {
    "horizon": "inner_steps",
    "eval_horizon": "eval_steps",
    "steps": "inner_steps",
    "adapt": "adapted",
}


def renamed(key: str, known: Iterable[str]) -> str:
    """Return " It is called ... now." for a key that was renamed, and "" for any other.

    >>> renamed("algorithm.horizon", ["algorithm.inner_steps", "algorithm.batch"])
    " It is called 'algorithm.inner_steps' now."
    """
    parent, dot, last = key.rpartition(".")
    new = f"{parent}{dot}{RENAMED.get(last)}"
    return f" It is called {new!r} now." if new in [*known] else ""


def packaged() -> list[str]:
    """Return the names of the packaged configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_"))


def command(argv: Sequence[str], commands: Mapping[str, Any], usage: str) -> str | None:
    """Return the command's name; None, with the usage printed, where help was asked for."""
    asked = argv[1:2] == ["help"] or {"-h", "--help"} & set(argv)
    if len(argv) > 1 and not asked:
        pick(commands, argv[1], "command")
        return argv[1]
    print(usage.strip())
    print(f"\nCommands: {', '.join(sorted(commands))}. Packaged configs: {', '.join(packaged())}.")
    return None


def expanded(argv: Sequence[str]) -> list[str]:
    """Return argv without the command, its config loaded, and keys and values checked against it.

    `--config=NAME` is made the path of `loaded_config.py`, so that the file is executed once.
    """
    rest = [argv[0], *(_with_underscores(argument) for argument in argv[2:])]
    for i in range(len(rest) - 1, 0, -1):
        if rest[i - 1] in ("-config", "--config"):  # `--config NAME`
            rest[i - 1 : i + 1] = [f"--config={rest[i]}"]
    for i, argument in enumerate(rest):
        match = re.fullmatch(r"--?config=(.+)", argument)
        if match:
            path, options = _config_file(match[1])
            config = LOADED[match[1]] = _load(path, options)
            rest[i] = f"--config={HANDED_OVER}:{match[1]}"
            _check_keys(rest, config)
            _check_values(rest, config)
    return rest


def _with_underscores(argument: str) -> str:
    """Return `--allow-config-change` as absl spells it; what is not an option as it is."""
    name, equals, value = argument.partition("=")
    option = name.startswith("--") and not name.startswith("--config.")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if option else argument


def _config_file(name: str) -> tuple[str, str]:
    """Return (the file, its option) of a packaged config's name, a config file or a JSON file."""
    path, _, options = name.partition(":")
    if path.endswith(".py"):
        if pathlib.Path(path).is_file():
            return path, options
        raise ValueError(
            f"There is no config file {path}. A name without `.py` finds a packaged config: "
            f"{', '.join(packaged())}."
        )
    if name.endswith(".json"):
        return str(JSON), name
    known = {name: str(CONFIGS / f"{name}.py") for name in packaged()}
    return pick(known, path, "config"), options


def _load(path: str, options: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location("metalearn_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "get_config" not in vars(module):
        raise ValueError(
            f"The config file {path} has no function `get_config`. Write one that returns a "
            "ConfigDict, such as that of a packaged config with a few keys changed."
        )
    config = module.get_config(options) if options else module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"`get_config` of {path} returned {type(config).__name__}, but a config is an "
            "ml_collections.ConfigDict."
        )
    return config


def _check_keys(arguments: Iterable[str], config: ml_collections.ConfigDict) -> None:
    known = list(_keys(config))
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in known:
            hint = renamed(match[1], known) or nearest(match[1], known)
            raise ValueError(
                f"The config has no key {match[1]!r}.{hint} There are: {', '.join(known)}."
            )


def _check_values(arguments: Sequence[str], config: ml_collections.ConfigDict) -> None:
    """Hold each `--config.KEY=VALUE`, or `--config.KEY VALUE`, against the type of its key."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            continue
        kind = _kind(config, match[1])
        text = following if match[2] is None and kind is not bool else match[2]
        if text is not None:
            values.check_text(match[1], text, kind)


def _kind(config: ml_collections.ConfigDict, key: str) -> type:
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    return config.get_type(last)


def _keys(config: Any, prefix: str = "") -> Iterable[str]:
    for key in config:
        value = config.get_ref(key).get() if config.is_type_safe else config[key]
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
