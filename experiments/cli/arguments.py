"""Reading a command line before absl does, so that a mistake in it is explained.

absl and ml-collections answer an unknown key with a bare AttributeError. Here the keys
are held against the config first, and the nearest one is named; and so are the values, and the
type that a key takes is.
"""

from __future__ import annotations

import difflib
import importlib.util
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from metalearn._utils.checks import nearest, pick
from metalearn.experiments.cli import values
from metalearn.experiments.cli.import_paths import make_current_directory_importable

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


def meant(key: str, known: Sequence[str]) -> str:
    """Return " Did you mean ...?" for a key that is not known, by all of it and by its last part.

    >>> meant("learning_rate", ["optimizer.learning_rate", "seed", "algorithm.learning_rate"])
    " Did you mean 'algorithm.learning_rate' or 'optimizer.learning_rate'?"
    >>> meant("lerning_rate", ["optimizer.learning_rate", "seed"])
    " Did you mean 'optimizer.learning_rate'?"
    """
    parent, dot, last = key.rpartition(".")
    lasts = {other: other.rpartition(".")[2] for other in known}
    close = [last] if last in lasts.values() else difflib.get_close_matches(last, lasts.values(), 1)
    alike = sorted(other for other in known if lasts[other] in close)
    here = [other for other in alike if other == f"{parent}{dot}{lasts[other]}"]
    chosen = here or alike[:4]
    return f" Did you mean {' or '.join(map(repr, chosen))}?" if chosen else nearest(key, known)


def packaged() -> list[str]:
    """Return the names of the packaged configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_"))


def command(argv: Sequence[str], commands: Mapping[str, Any], usage: str) -> str | None:
    """Return the command's name; None, with the usage printed, where none is named but help."""
    if len(argv) > 1 and argv[1] not in ("help", *HELP):
        pick(commands, argv[1], "command")
        return argv[1]
    print(usage.strip())
    print(f"\nCommands: {', '.join(sorted(commands))}. Packaged configs: {', '.join(packaged())}.")
    return None


HELP = ("-h", "--help")


def asks_for_help(argv: Sequence[str]) -> bool:
    """Return whether help is asked for."""
    return bool({*HELP} & {*argv})


def usage(command: str, what: str, options: Sequence[flags.Flag]) -> str:
    """Return the help of a command: what it does, and its options."""
    names = [f"--{'no' if flag.default is True else ''}{_dashed(flag.name)}" for flag in options]
    width = max(map(len, names))
    lines = [f"  {n:{width}}  {flag.help}" for n, flag in zip(names, options, strict=True)]
    parts = [f"metalearn {command}: {what.strip()}", "\n".join(lines)]
    if any(flag.name == "config" for flag in options):
        parts.append("  --config.KEY=VALUE sets a key of the config.")
    return "\n\n".join(parts)


def check_options(
    argv: Sequence[str],
    command: str,
    commands_of: Mapping[str, Sequence[str]],
    options: Sequence[flags.Flag],
) -> None:
    """Raise ValueError for an option of another command.

    Args:
      argv: the command line.
      command: its command.
      commands_of: the commands of each option that is not of all.
      options: of the command.
    """
    for argument in map(_with_underscores, argv[2:]):
        match = re.match(r"--?(?:no)?(\w+)(?=[=.]|$)", argument)
        others = commands_of.get(match[1], ()) if match else ()
        if match and others and command not in others:
            *first, last = (f"`metalearn {other}`" for other in others)
            those = f"{', '.join(first)} and {last}" if first else last
            names = ", ".join(f"--{_dashed(flag.name)}" for flag in options)
            raise ValueError(
                f"--{_dashed(match[1])} is an option of {those}, not of `metalearn {command}`. "
                f"That has: {names}."
            )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def expanded(
    argv: Sequence[str],
    renew: Callable[[ml_collections.ConfigDict, Mapping[str, Any]], None],
    nullable: Callable[[ml_collections.ConfigDict, str], bool],
) -> list[str]:
    """Return argv without the command, its config loaded, and keys and values checked against it.

    `--config=NAME` is made the path of `loaded_config.py`, so that the file is executed once. A
    key that is set to None is set here, and its argument dropped: absl has no text for None.

    Args:
      argv: the command line.
      renew: gives names that change their own keys: `metalearn.experiments.build.sections`.
      nullable: says whether None is a value of a key.
    """
    rest = [argv[0], *(_with_underscores(argument) for argument in argv[2:])]
    for i in range(len(rest) - 1, 0, -1):
        if rest[i - 1] in ("-config", "--config"):  # `--config NAME`
            rest[i - 1 : i + 1] = [f"--config={rest[i]}"]
    for i, argument in enumerate(rest):
        match = re.fullmatch(r"--?config=(.+)", argument)
        if match:
            path, options = _config_file(match[1])
            config = LOADED[match[1]] = _load(path, options, _allows_imports(rest))
            rest[i] = f"--config={HANDED_OVER}:{match[1]}"
            renew(config, {key: text for _, key, text in _settings(rest)})
            _check_keys(rest, config)
            rest = _set_to_none(rest, config, nullable)
            _check_values(rest, config)
            break
    return rest


SWEPT = re.compile(r"--?sweep\.([^=]+)(?:=(.*))?", re.DOTALL)
OF_TRIALS = re.compile(
    r"--?(no)?(config([.=].*)?|(allow_imports|compilation_cache)(=.*)?)", re.DOTALL
)


def swept(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return (argv without them, the text of each `--sweep.KEY=TEXT` or `--sweep.KEY TEXT`)."""
    rest, texts, words = [], {}, iter(argv)
    for word in words:
        match = SWEPT.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        if match[1] in texts:
            raise ValueError(f"--sweep.{match[1]} is there twice. Leave one of them out.")
        texts[match[1]] = next(words, "") if match[2] is None else match[2]
    return rest, texts


def of_trials(argv: Sequence[str]) -> list[str]:
    """Return the options of a command line that are those of its trials: the config, imports.

    >>> of_trials(["metalearn", "sweep", "--jobs=2", "--config", "maml_digits", "--config.seed=1"])
    ['--config', 'maml_digits', '--config.seed=1']
    """
    words = [_with_underscores(word) for word in argv[2:]]
    chosen: list[str] = []
    for i, word in enumerate(words):
        follows = i > 0 and words[i - 1] in chosen[-1:] and "=" not in words[i - 1]
        if OF_TRIALS.fullmatch(word) or (follows and not word.startswith("--")):
            chosen.append(word)
    return chosen


def of_sweep(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return (the options that are those of the trials, the text of each `--sweep.KEY`)."""
    rest, texts = swept(argv)
    return of_trials(rest), texts


def settings(argv: Sequence[str]) -> dict[str, str]:
    """Return the text of each `--config.KEY=TEXT` of a command line."""
    return {key: text for _, key, text in _settings(argv)}


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


def _allows_imports(arguments: Iterable[str]) -> bool:
    """Return whether `--allow_imports` is among the arguments, which absl has not read yet."""
    flags = [a for a in arguments if re.match(r"--?(no)?allow_imports(=|$)", a)]
    return bool(flags) and re.fullmatch(r"--?allow_imports(=(true|t|1))?", flags[-1]) is not None


def _load(path: str, options: str, allow_imports: bool = False) -> ml_collections.ConfigDict:
    make_current_directory_importable()
    spec = importlib.util.spec_from_file_location("metalearn_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "get_config" not in vars(module):
        raise ValueError(
            f"The config file {path} has no function `get_config`. Write one that returns a "
            "ConfigDict, such as that of a packaged config with a few keys changed."
        )
    if path == str(JSON):
        config = module.get_config(options, allow_imports)
    else:
        config = module.get_config(options) if options else module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"`get_config` of {path} returned {type(config).__name__}, but a config is an "
            "ml_collections.ConfigDict."
        )
    return config


def _settings(arguments: Sequence[str]) -> list[tuple[int, str, str]]:
    """Return (position, key, text) of each `--config.KEY=TEXT`, and of `--config.KEY TEXT`."""
    settings = []
    for i, argument in enumerate(arguments):
        match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match:
            following = arguments[i + 1] if i + 1 < len(arguments) else ""
            settings.append((i, match[1], following if match[2] is None else match[2]))
    return settings


NONE = ("", "None", "none", "null")  # texts for None


def _set_to_none(
    arguments: list[str],
    config: ml_collections.ConfigDict,
    nullable: Callable[[ml_collections.ConfigDict, str], bool],
) -> list[str]:
    """Set keys to None whose text says so, and return the arguments without them."""
    dropped = set()
    for i, key, text in _settings(arguments):
        apart = "=" not in arguments[i]  # `--config.chunk None`
        if text in (NONE[1:] if apart else NONE) and nullable(config, key):
            config.update_from_flattened_dict({key: None})
            dropped |= {i, i + 1} if apart else {i}
    return [argument for i, argument in enumerate(arguments) if i not in dropped]


def _check_keys(arguments: Iterable[str], config: ml_collections.ConfigDict) -> None:
    known = list(keys(config))
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in known:
            hint = renamed(match[1], known) or meant(match[1], known)
            raise ValueError(
                f"The config has no key {match[1]!r}.{hint} There are: {', '.join(known)}."
            )


def _check_values(arguments: Sequence[str], config: ml_collections.ConfigDict) -> None:
    """Hold each `--config.KEY=VALUE`, or `--config.KEY VALUE`, against the type of its key."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            continue
        kind = kind_of(config, match[1])
        text = following if match[2] is None and kind is not bool else match[2]
        if text is not None:
            values.check_text(match[1], text, kind)


def kind_of(config: ml_collections.ConfigDict, key: str) -> type:
    """Return the type of the values of a dotted key."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    return config.get_type(last)


def keys(config: Any, prefix: str = "") -> Iterable[str]:
    """Yield the dotted keys of a config."""
    for key in config:
        value = config.get_ref(key).get() if config.is_type_safe else config[key]
        if isinstance(value, ml_collections.ConfigDict):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
