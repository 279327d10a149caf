"""One page of HTML for one run or several: it holds its pictures, and requests nothing.

Pictures are PNGs in the page itself (and files beside it); there is no script and no style sheet
to load, so that the page can be mailed, or read offline on a phone.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from metalearn._utils import strict_json
from metalearn._utils.device_memory import show_bytes
from metalearn.experiments.cli.json_config import flat
from metalearn.experiments.report.run_logs import RunLog, differing

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #f5f6f8; margin: 0; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.card { background: #fff; border: 1px solid #dde1e7; border-radius: .5rem; padding: .75rem; }
.figures { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #555; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #e6e9ee; white-space: nowrap; }
th { color: #555; font-weight: 600; } tr:last-child td { border-bottom: 0; }
pre { overflow-x: auto; background: #f0f2f5; padding: .75rem; border-radius: .35rem; font-size: .8rem; }
summary { cursor: pointer; padding: .25rem 0; } .note { color: #555; font-size: .9rem; }
"""  # noqa: E501


class Cost(NamedTuple):
    """What an outer step of a run takes, by its compiled program.

    Args:
      engine: its name and settings.
      peak: bytes; None: not counted.
      peak_of_plain: relative to plain training, the same inner loops without a meta-gradient.
      flops_of_plain: FLOPs relative to plain training; NaN where there are none to count.
      problem: why it was not counted; "" if it was.
    """

    engine: str
    peak: int | None = None
    peak_of_plain: float = math.nan
    flops_of_plain: float = math.nan
    problem: str = ""


class Picture(NamedTuple):
    """A picture of the page.

    Args:
      caption: shown below it.
      png: its bytes.
    """

    caption: str
    png: bytes


def page(
    runs: Sequence[RunLog],
    labels: Sequence[str],
    curves: Sequence[Picture],
    learned: Sequence[Picture],
    costs: Sequence[Cost],
    commands: Sequence[str],
) -> str:
    """Return the page as HTML.

    Args:
      runs: what each run has left.
      labels: of the runs, in legends and tables.
      curves: pictures of metrics by outer step.
      learned: pictures of what the runs learned.
      costs: of an outer step of each run.
      commands: the command that reproduces each run.
    """
    title = "Report of " + ", ".join(run.workdir.name for run in runs)
    parts = [
        f"<h1>{escaped(title)}</h1>",
        table(_overview(runs, labels)),
        *_differences(runs, labels),
        "<h2>Learning curves</h2>",
        '<p class="note">train: mean over the tasks of one outer step. validation: mean over '
        "held-out tasks, with its 95% interval. test: the final score, with its 95% interval.</p>",
        figures(curves),
        *(["<h2>What was learned</h2>", figures(learned)] if learned else []),
        "<h2>Cost of an outer step</h2>",
        table(_costs(labels, costs)),
        "<h2>How to run it again</h2>",
        *_reproduction(runs, labels, commands),
    ]
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Return a page of HTML with parts below each other."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _overview(runs: Sequence[RunLog], labels: Sequence[str]) -> Iterator[list[str]]:
    """Yield the rows of the table of runs, the header first."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.test))
    yield [
        "run",
        "algorithm",
        "outer steps",
        "training time",
        "tasks/s",
        *map("test {}".format, metrics),
    ]
    for run, label in zip(runs, labels, strict=True):
        rate = run.train.get("time/tasks_per_second")
        steps = f"{run.steps:,} of {run.config['steps']:,}"
        scores = [str(run.test[name]) if name in run.test else "not yet" for name in metrics]
        yield [
            label,
            str(run.config["algorithm"]["name"]),
            f"{run.steps:,}" if run.steps == run.config["steps"] else steps,
            duration(run.seconds),
            "" if rate is None else f"{sorted(rate.values)[len(rate.values) // 2]:.3g}",
            *scores,
        ]


def _differences(runs: Sequence[RunLog], labels: Sequence[str]) -> Iterator[str]:
    """Yield a table of the keys that the configs of the runs do not share."""
    keys = differing([run.config for run in runs])
    if len(runs) == 1 or not keys:
        return
    configs = [flat(run.config) for run in runs]
    yield "<h2>What differs</h2>"
    yield table(
        [["key", *labels], *([key, *(_value(each, key) for each in configs)] for key in keys)]
    )


def _value(config: Mapping[str, Any], key: str) -> str:
    return strict_json.dumps(config[key]) if key in config else ""


def _costs(labels: Sequence[str], costs: Sequence[Cost]) -> Iterator[list[str]]:
    yield ["run", "engine", "peak memory", "of plain training", "FLOPs of plain training"]
    for label, cost in zip(labels, costs, strict=True):
        if cost.peak is None:
            yield [label, cost.engine, f"not counted: {cost.problem}", "", ""]
            continue
        flops = "" if math.isnan(cost.flops_of_plain) else f"{cost.flops_of_plain:.2f}x"
        yield [label, cost.engine, show_bytes(cost.peak), f"{cost.peak_of_plain:.2f}x", flops]


def _reproduction(
    runs: Sequence[RunLog], labels: Sequence[str], commands: Sequence[str]
) -> Iterator[str]:
    for run, label, command in zip(runs, labels, commands, strict=True):
        config = strict_json.dumps(run.config, indent=2)
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        yield f"<h3>{escaped(label)}</h3>" if len(runs) > 1 else ""
        yield f"<pre>{escaped(command)}</pre>"
        yield f'<p class="note">{escaped(versions)}</p>'
        yield f"<details><summary>The whole config</summary><pre>{escaped(config)}</pre></details>"


def duration(seconds: float) -> str:
    """Format a duration.

    >>> duration(42.3), duration(754), duration(7300), duration(float("nan"))
    ('42 s', '12 min 34 s', '2 h 1 min', '')
    """
    if math.isnan(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def table(rows: Sequence[Sequence[str]] | Iterator[list[str]]) -> str:
    """Return a table as HTML; the first row is its header."""
    header, *body = rows
    cells = [f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in body]
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    return (
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(cells)}</tbody></table></div>"
    )


def figures(pictures: Sequence[Picture]) -> str:
    """Return pictures as HTML, side by side where the page is wide enough."""
    cards = [
        f'<figure class="card"><img alt="{escaped(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
        for caption, png in pictures
    ]
    return f'<div class="figures">{"".join(cards)}</div>'


def escaped(value: str) -> str:
    """Return a text as HTML."""
    return html.escape(value)
