"""Reporting of benchmarks: a mean over seeds with its interval, and pictures of rows."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from metalearn._utils.intervals import half_width

QUANTITIES = {
    "temporaries_mib": "temporaries (MiB)",
    "flops_f_per_step": "forward passes per inner step",
    "seconds": "seconds per meta-gradient",
}


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Return a mean with its 95% interval; the median if a value is not finite, or huge."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    if not all(abs(value) < 1e3 for value in values):
        return f"{statistics.median(values):.3g} (median)"
    return f"{statistics.mean(values):.{digits}f} +- {half_width(values):.{digits}f}"


def against(
    rows: Sequence[Mapping[str, Any]], axis: str, out: pathlib.Path, axes: Mapping[str, Any]
) -> None:
    """Draw every measured quantity against an axis, one line per setting, to `out`/AXIS.png.

    The other axes have the value of the first row. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    others = [other for other in axes if other != axis]
    selected = [row for row in rows if all(row[other] == rows[0][other] for other in others)]
    shown = [name for name in QUANTITIES if all(row[name] == row[name] for row in selected)]
    figure = Figure(figsize=(5 * len(shown), 4.5), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for setting in dict.fromkeys(row["setting"] for row in selected):
            points = [(row[axis], row[name]) for row in selected if row["setting"] == setting]
            ax.plot(*zip(*sorted(points), strict=True), marker="o", label=setting)
        ax.set(xlabel=axis, ylabel=QUANTITIES[name], xscale="log", yscale="log")
        ax.set_xticks(sorted({row[axis] for row in selected}), minor=False)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(out / f"{axis}.png", dpi=120)
