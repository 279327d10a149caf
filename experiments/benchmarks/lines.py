"""Pictures of benchmark rows: a quantity against an axis, a line per setting."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

QUANTITIES = {
    "temporaries_mib": "temporaries (MiB)",
    "flops_f_per_step": "forward passes per inner step",
    "seconds": "seconds per meta-gradient",
}


def against(
    rows: Sequence[Mapping[str, Any]], axis: str, out: pathlib.Path, axes: Mapping[str, Any]
) -> None:
    """Draw every quantity that was measured against an axis, into `out`/AXIS.png.

    Of the other axes, the first value in the rows is taken. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    others = [other for other in axes if other != axis]
    kept = [row for row in rows if all(row[other] == rows[0][other] for other in others)]
    shown = [name for name in QUANTITIES if all(row[name] == row[name] for row in kept)]
    figure = Figure(figsize=(5 * len(shown), 4.5), layout="constrained")
    for place, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for setting in dict.fromkeys(row["setting"] for row in kept):
            points = [(row[axis], row[name]) for row in kept if row["setting"] == setting]
            place.plot(*zip(*sorted(points), strict=True), marker="o", label=setting)
        place.set(xlabel=axis, ylabel=QUANTITIES[name], xscale="log", yscale="log")
        place.set_xticks(sorted({row[axis] for row in kept}), minor=False)
        place.xaxis.set_major_formatter("{x:g}")
        place.xaxis.set_minor_formatter("")
    figure.legend(*place.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(out / f"{axis}.png", dpi=120)
