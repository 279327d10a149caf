"""Draw what each engine saves and recomputes, on a timeline, into docs/pictures.

    python docs/draw_timelines.py

A column is a moment of the computation, a row an inner step. The schedules are those of the
engines, for T = 9 inner steps (segments of 3); the memory below is the sum of what is alive.
"""

import pathlib
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch

PICTURES = pathlib.Path(__file__).parent / "pictures"
STEPS = 9
SEGMENT = 3

COLOURS = {
    "forward": "#4c78a8",  # an inner step, run forward
    "again": "#9ecae9",  # an inner step, run forward again
    "backward": "#e45756",  # the backward pass of a step
    "tangents": "#f2a65a",  # a step that also pushes the tangents
}
LABELS = {
    "forward": "inner step",
    "again": "inner step, recomputed",
    "backward": "backward pass of a step",
    "tangents": "inner step with its tangents",
}
LEGEND = {"loc": "outside lower center", "fontsize": "small", "frameon": False}
STATE, RESIDUALS = "#54a24b", "#b279a2"
STATE_SIZE, RESIDUALS_SIZE = 1, 6  # of one step, in units of a state: activations are most of it
TANGENTS = 3  # hyperparameters of `Forward`


class Moment(NamedTuple):
    """What is computed at a moment, and what is in memory for the backward pass.

    Args:
      step: the inner step.
      kind: a key of COLOURS.
      states: the inner steps whose state is saved.
      residuals: the inner steps whose activations are saved.
    """

    step: int
    kind: str
    states: frozenset
    residuals: frozenset


def save_everything(steps=STEPS):
    """Return the moments of `Reverse()`: all residuals of every step are saved."""
    forward = [Moment(t, "forward", frozenset(), frozenset(range(t + 1))) for t in range(steps)]
    backward = [
        Moment(t, "backward", frozenset(), frozenset(range(t + 1))) for t in reversed(range(steps))
    ]
    return forward + backward


def save_states(steps=STEPS):
    """Return the moments of remat="step": states are saved, each step is run again."""
    moments = [Moment(t, "forward", frozenset(range(t + 1)), frozenset()) for t in range(steps)]
    for t in reversed(range(steps)):
        states, own = frozenset(range(t + 1)), frozenset([t])
        moments += [Moment(t, "again", states, own), Moment(t, "backward", states, own)]
    return moments


def save_segments(steps=STEPS, segment=SEGMENT):
    """Return the moments of remat="segments": a segment at a time is run again, with residuals."""
    firsts = range(0, steps, segment)

    def before(t):
        return frozenset(s for s in firsts if s <= t)

    moments = [Moment(t, "forward", before(t), frozenset()) for t in range(steps)]
    for first in reversed(firsts):
        inside = range(first, min(first + segment, steps))
        moments += [Moment(t, "again", before(t), frozenset(range(first, t + 1))) for t in inside]
        moments += [
            Moment(t, "backward", before(t), frozenset(range(first, t + 1)))
            for t in reversed(inside)
        ]
    return moments


def save_nested(steps=STEPS, segment=SEGMENT):
    """Return the moments of remat="nested": the states of one segment at a time are saved."""
    firsts = range(0, steps, segment)
    moments = [
        Moment(t, "forward", frozenset(s for s in firsts if s <= t), frozenset())
        for t in range(steps)
    ]
    for first in reversed(firsts):
        outer = frozenset(s for s in firsts if s <= first)
        inside = range(first, min(first + segment, steps))
        moments += [
            Moment(t, "again", outer | set(range(first, t + 1)), frozenset()) for t in inside
        ]
        for t in reversed(inside):
            states, own = outer | set(range(first, t + 1)), frozenset([t])
            moments += [Moment(t, "again", states, own), Moment(t, "backward", states, own)]
    return moments


def push_forward(steps=STEPS):
    """Return the moments of `Forward()`: tangents are carried along, nothing is saved."""
    return [Moment(t, "tangents", frozenset([t]), frozenset()) for t in range(steps)]


def sizes(moments):
    """Return the memory at each moment, in states: (of states, of residuals)."""
    states = [
        STATE_SIZE * (1 + TANGENTS if moment.kind == "tangents" else len(moment.states))
        for moment in moments
    ]
    residuals = [RESIDUALS_SIZE * len(moment.residuals) for moment in moments]
    return states, residuals


def draw(columns):
    """Return a figure: a timeline for each schedule, and its memory below."""
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    longest = max(map(len, columns.values()))
    axes = figure.subplots(2, len(columns), height_ratios=(2, 1), sharex=True, sharey="row")
    for (title, moments), (above, below) in zip(columns.items(), axes.T, strict=True):
        for now, moment in enumerate(moments):
            above.barh(moment.step, 1, left=now, height=0.8, color=COLOURS[moment.kind])
        above.set_title(title, fontsize="medium")
        above.invert_yaxis() if above is axes[0, 0] else None
        states, residuals = sizes(moments)
        times = [now + 0.5 for now in range(len(moments))]
        below.bar(times, states, 1, color=STATE)
        below.bar(times, residuals, 1, bottom=states, color=RESIDUALS)
        below.set(xlabel="time", xlim=(0, longest), xticks=[])
        peak = max(map(sum, zip(states, residuals, strict=True)))
        below.text(longest, peak, f"peak {peak}", ha="right", va="bottom", fontsize="small")
    axes[0, 0].set(ylabel="inner step", yticks=[0, STEPS - 1], yticklabels=["1", "T"])
    axes[1, 0].set(ylabel="in memory", yticks=[])
    axes[1, 0].set_ylim(0, 70)
    handles = [Patch(color=colour, label=LABELS[kind]) for kind, colour in COLOURS.items()]
    handles += [Patch(color=STATE, label="saved states"), Patch(color=RESIDUALS, label="residuals")]
    figure.legend(handles=handles, **LEGEND, ncols=6)
    return figure


def loops():
    """Return the figure of the loop: what is saved of it, by engine."""
    return draw(
        {
            'Reverse(), "none"': save_everything(),
            'remat="step"': save_states(),
            'remat="segments"': save_segments(),
            'remat="nested"': save_nested(),
            f"Forward(), {TANGENTS} tangents": push_forward(),
        }
    )


BLOCKS = 6  # of the network of one inner gradient, each rematerialised
BLOCK_SIZE = 6  # the activations of a block, in units of its input


def reverse_over_reverse(blocks=BLOCKS):
    """Return [(block, kind, memory)]: an inner gradient, differentiated backwards.

    The inner gradient is a forward and a backward pass. What the backward pass computes in a block
    is a residual of its own derivative, so that rematerialised blocks save little.
    """
    down, up = range(blocks), reversed(range(blocks))
    passes = [(block, "forward", block + 1) for block in down]
    passes += [(block, "again", blocks + BLOCK_SIZE * (blocks - block)) for block in up]
    passes += [(block, "backward", blocks + BLOCK_SIZE * (blocks - block)) for block in down]
    return passes + [(b, "backward", b + 1 + BLOCK_SIZE) for b in reversed(range(blocks))]


def forward_over_reverse(blocks=BLOCKS):
    """Return [(block, kind, memory)]: one gradient, computed with its tangent.

    Of every block its input is saved, and the tangent of that; the activations of one block are
    alive at a time, with theirs.
    """
    down, up = range(blocks), reversed(range(blocks))
    passes = [(block, "tangents", 2 * (block + 1)) for block in down]
    return passes + [(block, "tangents", 2 * (block + 1) + 2 * BLOCK_SIZE) for block in up]


def inner_gradient():
    """Return the figure of the derivative of one inner gradient, by Reverse and by MixedFlow."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=(2, 1), sharex=True, sharey="row")
    columns = {
        "Reverse: a backward pass, differentiated backwards": reverse_over_reverse(),
        "MixedFlow: one gradient with its tangent": forward_over_reverse(),
    }
    for (title, passes), (above, below) in zip(columns.items(), axes.T, strict=True):
        for now, (block, kind, memory) in enumerate(passes):
            above.barh(block, 1, left=now, height=0.8, color=COLOURS[kind])
            below.bar(now + 0.5, memory, 1, color=RESIDUALS)
        above.set_title(title, fontsize="medium")
        below.set(xlabel="time", xticks=[], xlim=(0, 4 * BLOCKS))
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(ylabel="block of the network", yticks=[])
    axes[1, 0].set(ylabel="in memory", yticks=[])
    names = {
        "forward": "forward pass",
        "again": "backward pass: the inner gradient",
        "backward": "its derivative, backwards",
        "tangents": "a pass with its tangent",
    }
    handles = [Patch(color=COLOURS[kind], label=name) for kind, name in names.items()]
    figure.legend(handles=handles, **LEGEND, ncols=4)
    return figure


QUESTIONS = (
    (
        "Is the outer loss differentiable\nthrough the loop, and not chaotic?",
        "no",
        "ES, PES or\nInverseVariance",
    ),
    ("At most a few dozen meta-parameters,\nand memory must not grow with T?", "yes", "Forward()"),
    ("A small network,\nthousands of inner steps?", "yes", 'MixedFlow("segments")\nor "nested"'),
    ("Does MixedFlow() fit the memory?", "yes", "MixedFlow()"),
    ("Is the inner loss\na mean over examples?", "yes", "MixedFlow(\nmicro_batches=4)"),
    ("Still too much?", "yes", 'MixedFlow("nested", budget=...),\nfewer tasks at once, truncation'),
)


def decision():
    """Return the figure of the questions that lead to an engine."""
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(0, 10), ylim=(-len(QUESTIONS) + 0.4, 0.6))
    ax.axis("off")
    question = {"boxstyle": "round,pad=0.5", "facecolor": "#dce9f5", "edgecolor": "#4c78a8"}
    answer = {"boxstyle": "round,pad=0.5", "facecolor": "#e3f1dd", "edgecolor": "#54a24b"}
    arrow = {"arrowstyle": "->", "color": "0.35", "linewidth": 1.4}
    for row, (text, reply, engine) in enumerate(QUESTIONS):
        ax.text(2.8, -row, text, ha="center", va="center", bbox=question, fontsize="small")
        ax.text(8.2, -row, engine, ha="center", va="center", bbox=answer, fontsize="small")
        ax.annotate("", (6.5, -row), (5.3, -row), arrowprops=arrow)
        ax.text(5.9, -row + 0.08, reply, ha="center", va="bottom", fontsize="small")
        if row + 1 < len(QUESTIONS):
            ax.annotate("", (2.8, -row - 0.66), (2.8, -row - 0.34), arrowprops=arrow)
            other = "yes" if reply == "no" else "no"
            ax.text(2.95, -row - 0.5, other, ha="left", va="center", fontsize="small")
    return figure


def main():
    """Write the pictures."""
    figures = {"timelines": loops(), "inner_gradient": inner_gradient(), "decision": decision()}
    for name, figure in figures.items():
        figure.savefig(PICTURES / f"{name}.png", dpi=80)


if __name__ == "__main__":
    main()
