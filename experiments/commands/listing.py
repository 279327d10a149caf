"""`metalearn list`: what a config may name, and the keys of one name.

metalearn list              every name, with one line each
metalearn list engines      those of a kind
metalearn list maml         the keys of a name: type, default, and one line each
metalearn list maml --json  the same for programs
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

from metalearn._utils import strict_json
from metalearn.experiments.build.reference import KINDS, Entry, described, entries

WIDTH = 100  # columns, where the output is no terminal
KEY_NOTES = {
    "algorithms": "--config.algorithm.KEY=VALUE sets one.",
    "engines": "--config.engine_options.KEY=VALUE sets one.",
    "models": "--config.model.KEY=VALUE sets one.",
    "datasets": "--config.dataset.KEY=VALUE sets one.",
    "configs": "--config.KEY=VALUE sets one.",
    "optimizers": (
        "--config.optimizer.KEY=VALUE sets one of the outer optimizer, and "
        "--config.algorithm.optimizer.KEY=VALUE of the inner one."
    ),
    "outer optimizers": "--config.optimizer.KEY=VALUE sets one.",
}


def show(names: Sequence[str] = (), as_json: bool = False) -> None:
    """Print every name, those of kinds, or the keys of names.

    Args:
      names: of kinds or of what a config may name; none: all kinds.
      as_json: print a list of entries as JSON, and nothing else.

    Raises:
      ValueError: for a name that there is not; the message has the nearest one.
    """
    chosen = [_entries(name) for name in names] or [entries(kind) for kind in KINDS]
    if as_json:
        print(strict_json.dumps([_plain(entry) for each in chosen for entry in each], indent=2))
        return
    blocks = [
        block
        for each, name in zip(chosen, names or KINDS, strict=True)
        for block in ([_names(name, each)] if name in KINDS else map(_keys, each))
    ]
    if not names:
        blocks.append(["`metalearn list NAME` shows the keys of one: `metalearn list maml`."])
    print("\n\n".join("\n".join(block) for block in blocks))


def _entries(name: str) -> list[Entry]:
    return entries(name) if name in KINDS else described(name)


def _plain(entry: Entry) -> dict[str, object]:
    return {**entry._asdict(), "keys": [key._asdict() for key in entry.keys]}


def _names(kind: str, each: Sequence[Entry]) -> list[str]:
    width = max(len(entry.name) for entry in each)
    lines = [_line(f"  {entry.name:<{width}}  ", entry.summary) for entry in each]
    return [kind, *lines]


def _keys(entry: Entry) -> list[str]:
    """Return the lines of an entry with its keys."""
    title = f"{entry.name} ({entry.kind[:-1]}): {entry.summary}"
    if not entry.keys:
        return [title]
    rows = [("key", "type", "default", "meaning"), *entry.keys]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [_line(_start(row, widths), row[3]) for row in rows]
    return [title, *lines, f"  {KEY_NOTES[entry.kind]}"]


def _start(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  " + "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False))


def _line(start: str, text: str) -> str:
    """Return a line; in a terminal the text continues below itself, as wide as the terminal."""
    if not sys.stdout.isatty():
        return f"{start}{text}".rstrip()
    columns = shutil.get_terminal_size((WIDTH, 24)).columns
    if columns - len(start) < 24:
        return f"{start}{text}".rstrip()
    return (
        textwrap.fill(text, columns, initial_indent=start, subsequent_indent=" " * len(start))
        or start.rstrip()
    )
