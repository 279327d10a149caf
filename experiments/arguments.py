"""Reading a command line before absl does, so that a mistake in it is explained.

absl and ml-collections answer an unknown key with a bare AttributeError. Here the keys
are held against the config first, and the nearest one is named.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from metalearn.names import nearest, pick

CONFIGS = pathlib.Path(__file__).parent / "configs"


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
    """Return argv without the command, with `--config=NAME` made a path, keys checked."""
    rest = [argv[0], *(_with_underscores(argument) for argument in argv[2:])]
    for i in range(len(rest) - 1, 0, -1):
        if rest[i - 1] in ("-config", "--config"):  # `--config NAME`
            rest[i - 1 : i + 1] = [f"--config={rest[i]}"]
    for i, argument in enumerate(rest):
        match = re.fullmatch(r"--?config=(.+)", argument)
        if match:
            path, colon, options = match[1].partition(":")
            path = str(_config_file(path))
            rest[i] = f"--config={path}{colon}{options}"
            _check_keys(rest, _load(path, options))
    return rest


def _with_underscores(argument: str) -> str:
    """Return `--allow-config-change` as absl spells it; what is not an option as it is."""
    name, equals, value = argument.partition("=")
    option = name.startswith("--") and not name.startswith("--config.")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if option else argument


def _config_file(name: str) -> pathlib.Path:
    """Return the file of a packaged config's name, or the path as it is."""
    path = pathlib.Path(name)
    if path.suffix != ".py":
        return pick({found: CONFIGS / f"{found}.py" for found in packaged()}, name, "config")
    if not path.is_file():
        raise ValueError(
            f"There is no config file {name}. A name without `.py` finds a packaged config: "
            f"{', '.join(packaged())}."
        )
    return path


def _load(path: str, options: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location("metalearn_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(options) if options else module.get_config()


def _check_keys(arguments: Iterable[str], config: ml_collections.ConfigDict) -> None:
    known = list(_keys(config))
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in known:
            raise ValueError(
                f"The config has no key {match[1]!r}.{nearest(match[1], known)} "
                f"There are: {', '.join(known)}."
            )


def _keys(config: Any, prefix: str = "") -> Iterable[str]:
    for key in config:
        value = config.get_ref(key).get() if config.is_type_safe else config[key]
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
