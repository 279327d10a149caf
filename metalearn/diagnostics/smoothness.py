"""Is a meta-gradient worth following? It may be finite, exact, and predict nothing.

A meta-gradient is the slope of the outer loss F at eta. An outer step uses it to say how F changes
a finite way from eta; where F is rough on the scale of that step, the slope says nothing about it,
however exactly it was computed. `smoothness` measures, on one task and at one eta,

- the change of F that the derivative predicts along a direction v, h <dF/deta, v>, against the
  change that an inner run at eta + h v has, for step sizes h from 1e-4 to 1. They agree between
  two step sizes: below the first rounding takes over, above the second the curvature does;
- the empirical metasmoothness of the inner run (Engstrom et al. 2025, arXiv:2503.13751, definition
  2). With theta_i the parameters that training ends with at eta + i h v, i = 0, 1, 2,

      S = sum_j d_j sign(theta_1 - theta_0)_j sign(theta_2 - theta_1)_j / sum_j d_j,
      d = |theta_2 - theta_0|:

  whether the two movements agree in sign, each parameter weighted by how far it moved in all. 1: as
  a smooth function does; 0: as noise does. It needs no derivative, so it also measures what no
  engine can differentiate;
- the curvature of F, |F_2 - 2 F_1 + F_0| / h^2 (definition 1);
- the norms of the tangents and of the cotangents of theta by inner step: where they explode, the
  cause is.

Directions have the norm of the scale of eta (`scale_of`), so that h = 0.1 changes every entry by
about a tenth of the root mean square of its leaf, or by 0.1 where that is above 1, as it is of
logarithms. For weights of training examples that are all 1, h = 0.1 along a Gaussian direction is
what `bergson` measures its metasmoothness at. The directions are the negative meta-gradient, the
first update of the outer optimizer, and random ones.

The cost is three programs to compile, and about as many inner runs as there are directions times
step sizes; memory is that of `Reverse("nested")` on one task. A trainer with `segment=K` runs all
of them in programs of K inner steps, with the memory of one segment and of the states that its
`replay` keeps (`metalearn.training.segmented_runs`): the same numbers, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import above, counts
from metalearn.diagnostics.perturbed_runs import (
    End,
    InnerRuns,
    PerturbedRuns,
    ThreeRuns,
    metasmoothness,
)
from metalearn.engines.base import check_eta
from metalearn.tasks import Tasks, check_tasks
from metalearn.train_state import TrainState
from metalearn.unroll import Eta

SIZES = tuple(10 ** (exponent / 2) for exponent in range(-8, 1))  # 1e-4 .. 1, two a decade
STEP = 0.1  # h of the metasmoothness
AGREES = 0.25  # relative error of a prediction that counts as right
SMOOTH = 0.9  # metasmoothness below which a meta-gradient is doubtful
ROUGH = 0.5  # metasmoothness below which `roughness` says so
LONG = 10  # inner steps from which on `roughness` measures it
JUMP = 10.0  # growth of a norm within one step that points at that step
GROWN = 100.0  # growth of a norm over the second half of the loop that is called chaotic
DIRECTIONS = 3**10  # folded into the key of a task: directions are drawn by nothing else


class Prediction(NamedTuple):
    """What the derivative predicts along one direction of eta, and what happens.

    Args:
      name: "meta-gradient" (its negative), "outer step", "given", or "random 1", ...
      slope: predicted change of the outer loss per unit of step size.
      sizes: step sizes h, ascending; 1 moves eta by its own scale.
      changes: F(eta + h v) - F(eta) at each of them.
      metasmoothness: of theta_T, from -1 to 1; NaN where theta_T does not move or is not finite.
        Along "outer step" for h the length of that step, else for the h of `smoothness(step=)`.
      curvature: |F(eta + 2 h v) - 2 F(eta + h v) + F(eta)| / h^2. h is `Smoothness.step`, and for
        the outer step its own length, where rounding may be most of it.
    """

    name: str
    slope: float
    sizes: tuple[float, ...]
    changes: tuple[float, ...]
    metasmoothness: float
    curvature: float

    @property
    def errors(self) -> tuple[float, ...]:
        """|predicted - actual| / |predicted| at each step size."""
        predicted = [self.slope * h for h in self.sizes]
        pairs = zip(predicted, self.changes, strict=True)
        return tuple(abs(a - p) / abs(p) if p else math.inf for p, a in pairs)

    @property
    def reach(self) -> tuple[float, float]:
        """The least and the largest step size between which predictions hold; NaN: nowhere.

        They hold where the relative error is at most `AGREES` at two neighbouring step sizes or
        more; of several such ranges, this is the longest.
        """
        longest: list[float] = []
        current: list[float] = []
        for size, error in zip(self.sizes, self.errors, strict=True):
            current = [*current, size] if error <= AGREES else []
            longest = max(longest, current, key=len)
        return (longest[0], longest[-1]) if len(longest) > 1 else (math.nan, math.nan)


class Smoothness(NamedTuple):
    """Whether a meta-gradient predicts the outer loss around eta; see `smoothness`.

    Args:
      inner_steps: T, of the loop that was run.
      loss: the outer loss of the task.
      step: h of the metasmoothness and the curvature.
      outer_step: how far the first update of the outer optimizer moves eta, as a step size.
      predictions: one for each direction.
      tangents: [T], norm of d theta_t / d h along the last direction, after each inner step.
      gradient_tangents: [T], that of the inner gradients: the norm of a Hessian product.
      cotangents: [T], norm of dF / d theta_t.
      inner_losses: [T], mean of those of each inner step; empty where a step records none.
    """

    inner_steps: int
    loss: float
    step: float
    outer_step: float
    predictions: tuple[Prediction, ...]
    tangents: np.ndarray
    gradient_tangents: np.ndarray
    cotangents: np.ndarray
    inner_losses: np.ndarray

    @property
    def metasmoothness(self) -> float:
        """The mean over random directions, or over all where there is no random one."""
        random = [p for p in self.predictions if p.name.startswith("random")]
        return float(np.mean([p.metasmoothness for p in random or self.predictions]))

    @property
    def reach(self) -> tuple[float, float]:
        """The step sizes between which the meta-gradient predicts a step along itself."""
        return self.predictions[0].reach

    @property
    def worth(self) -> str:
        """How far the meta-gradient is worth following: "useful", "doubtful" or "useless"."""
        if not math.isfinite(self.reach[1]):
            return "useless"
        return "useful" if self.reach[1] >= self.outer_step and self._is_smooth else "doubtful"

    @property
    def _is_smooth(self) -> bool:
        """Whether the run is smooth where it matters: along the first outer step, if there is one.

        Measured at the length of that step, and not at `step`, since a run that is rough beyond it
        does no harm.
        """
        at = {p.name: p.metasmoothness for p in self.predictions}
        return at.get("outer step", self.metasmoothness) >= SMOOTH

    @property
    def verdict(self) -> str:
        """A paragraph: what the meta-gradient is worth, why, and the settings that change it."""
        return " ".join([_opening(self), *_causes(self)])

    def __str__(self) -> str:
        return self.verdict


def smoothness(
    trainer: Any,
    state: TrainState,
    tasks: Tasks,
    key: jax.Array | None = None,
    *,
    direction: Eta | None = None,
    directions: int = 1,
    step: float = STEP,
    sizes: Sequence[float] = SIZES,
) -> Smoothness:
    """Measure what the meta-gradient of one task predicts around the eta of `state`.

    Deterministic: the same arguments give the same numbers. The derivative is the exact one; how
    far that of an approximate engine is from it, `metalearn.diagnostics.compare` measures.

    Args:
      trainer: a `Trainer`; its engine is not read. Of truncated unrolls the first is measured; with
        `segment` inner runs are cut as its outer steps are.
      state: where eta is; its step and key say the task.
      tasks: that are trained on.
      key: (), draws the task; None: the first task of the outer step after `state`.
      direction: like eta, one more direction to measure; None: none.
      directions: random directions.
      step: h of the metasmoothness.
      sizes: step sizes at which predictions are compared.

    Raises:
      ValueError: for a loop without inner steps, a direction of another structure or shape, or that
        is zero, a step size that is not positive, or `segment` with a layout over devices.
      TypeError: for an eta with a leaf that is not floating-point, or tasks that are none.
    """
    check_tasks("smoothness(tasks=)", tasks)
    check_eta(state.eta)
    counts("smoothness", 0 if direction is not None else 1, directions=directions)
    above("smoothness", 0, step=step)
    for size in sizes:
        above("smoothness", 0, sizes=size)
    given = [] if direction is None else [_checked(direction, state.eta)]
    runs = _runs(trainer, state, tasks, key)
    draws = [
        jax.random.fold_in(jax.random.fold_in(runs.key, DIRECTIONS), i) for i in range(directions)
    ]
    pulled = runs.pull_back(draws, given)
    names = ["meta-gradient", "outer step", *["given"] * len(given)]
    names += [f"random {i + 1}" for i in range(directions)]
    start, outer_step = runs.run(pulled.directions[0], 0.0), float(pulled.outer_step)
    lengths = [outer_step if name == "outer step" and outer_step > 0 else step for name in names]
    predictions = [
        _predict(runs, name, v, float(slope), start, h, sizes)
        for h, name, v, slope in zip(lengths, names, pulled.directions, pulled.slopes, strict=True)
    ]
    pushed = runs.tangents(pulled.directions[-1])
    losses = np.asarray(start.inner_losses)
    return Smoothness(
        runs.horizon,
        float(start.loss),
        step,
        outer_step,
        tuple(p for p in predictions if p.name != "outer step" or outer_step > 0),
        np.asarray(pushed.theta),
        np.asarray(pushed.gradients),
        np.asarray(pulled.cotangents),
        losses.mean(1) if losses.size else np.zeros(0),
    )


def _runs(trainer: Any, state: TrainState, tasks: Tasks, key: jax.Array | None) -> InnerRuns:
    runs: InnerRuns = trainer.perturbed_runs(state, tasks, key)
    if not runs.horizon:
        raise ValueError(
            f"`smoothness` compares inner runs, and `{type(trainer.algorithm).__name__}` takes no "
            "inner steps (T = 0): its meta-gradient is that of one function without a loop. "
            "Nothing of an inner loop can make it rough."
        )
    return runs


def _checked(direction: Eta, eta: Eta) -> Eta:
    """Return a direction; ValueError unless it has the structure and shapes of eta."""
    shapes = [
        [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in leaves]
        for leaves in map(jax.tree_util.tree_leaves_with_path, (direction, eta))
    ]
    if shapes[0] != shapes[1]:
        odd = next((a for a in shapes[0] if a not in shapes[1]), None)
        other = f"`direction{odd[0]}` has shape {list(odd[1])}" if odd else "it lacks leaves"
        raise ValueError(
            f"`smoothness(direction=)` is a direction in eta, with its leaves and shapes, but "
            f"{other}. eta has {', '.join(f'{path} {list(shape)}' for path, shape in shapes[1])}."
        )
    if not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(direction)):
        raise ValueError(
            "`smoothness(direction=)` is zero everywhere, so that nothing moves along it. Give one "
            "that is not, or leave it out: random directions are drawn."
        )
    return direction


def _predict(
    runs: InnerRuns,
    name: str,
    v: Eta,
    slope: float,
    start: End,
    step: float,
    sizes: Sequence[float],
) -> Prediction:
    """Compare predictions along a direction with runs, and measure the smoothness along it."""
    sizes = tuple(sorted(map(float, sizes)))
    once, twice = runs.run(v, step), runs.run(v, 2 * step)
    at = {step: once.loss, 2 * step: twice.loss}
    losses = [at[h] if h in at else runs.run(v, h).loss for h in sizes]
    thetas = [np.stack(leaves) for leaves in zip(start.theta, once.theta, twice.theta, strict=True)]
    origin, first, second = (float(end.loss) for end in (start, once, twice))
    return Prediction(
        name,
        slope,
        sizes,
        tuple(float(loss) - origin for loss in losses),
        float(jax.jit(metasmoothness)(thetas)),
        abs(second - 2 * first + origin) / step**2,
    )


def three_runs(
    trainer: Any,
    state: TrainState,
    tasks: Tasks,
    key: jax.Array | None = None,
    *,
    step: float = STEP,
) -> ThreeRuns:
    """Measure the metasmoothness of one task along one random direction: three inner runs.

    The cheap part of `smoothness`, in one program. Arguments and errors are those of it.
    """
    check_tasks("three_runs(tasks=)", tasks)
    check_eta(state.eta)
    above("three_runs", 0, step=step)
    runs = _runs(trainer, state, tasks, key)
    draw = jax.random.fold_in(jax.random.fold_in(runs.key, DIRECTIONS), 0)
    return jax.tree.map(np.asarray, runs.three(draw, step))


def roughness(trainer: Any, state: TrainState, tasks: Tasks) -> str:
    """Return what is wrong where three short trainings say that a meta-gradient predicts nothing.

    "" where they do not, and where they are not run: for fewer than `LONG` inner steps, of which
    one program more would cost more than it could say; and for inner runs that are cut into
    segments, of which three may take hours, or shared by several processes.
    """
    if trainer.segment is not None or jax.process_count() > 1:
        return ""
    runs = PerturbedRuns.create(trainer, state, tasks)
    if runs.horizon < LONG:
        return ""
    draw = jax.random.fold_in(jax.random.fold_in(runs.key, DIRECTIONS), 0)
    smooth = float(runs.three(draw, STEP).metasmoothness)
    if not smooth < ROUGH:
        return ""
    return (
        f"The metasmoothness of the first task is {smooth:.2f}, of at most 1: where eta changes by "
        f"{STEP:g} of its scale twice, the second movement of the trained parameters has little to "
        "do with the first, so that a meta-gradient, exact as it is, predicts little of what an "
        "outer step does. `metalearn smooth` says over which steps it holds, and what makes it "
        "hold further: a larger `eps_root`, larger inner batches, a smaller inner learning rate."
    )


LEVERS = {
    "eps_root": "under an inner Adam a larger `eps_root`, such as 1e-6 (where "
    "the root of the second moment is small, its update is the sign of a gradient, which flips)",
    "batch": "larger inner batches, or fewer and larger steps",
    "learning_rate": "a smaller inner learning rate, or one that is warmed up and decays",
    "clip": "clipped inner gradients (`differentiable_at_zero(optax.chain(clip, ...))`)",
    "logit_scale": "outputs of the network divided by about 10 before the loss",
    "width": "a wider network",
    "normalisation": "normalisation before the activation, and average pooling for max pooling",
    "steps": "fewer inner steps, or truncated unrolls",
}


def _opening(result: Smoothness) -> str:
    low, high = result.reach
    smooth = f"metasmoothness {result.metasmoothness:.2f}"
    if result.worth == "useless":
        return (
            f"Useless: at no two neighbouring step sizes from {result.predictions[0].sizes[0]:.0e} "
            f"to {result.predictions[0].sizes[-1]:.0e} is the change of the outer loss along the "
            f"meta-gradient within {AGREES:.0%} of what it predicts ({smooth})."
        )
    span = (
        f"it predicts a change of the outer loss within {AGREES:.0%} for steps of {low:.1e} to "
        f"{high:.1e} of the scale of eta ({smooth})"
    )
    if result.worth == "useful":
        return f"Useful: {span}, and the first outer step is one of {result.outer_step:.1e}."
    return f"Doubtful: {span}."


def _causes(result: Smoothness) -> list[str]:
    """Return sentences: why a meta-gradient predicts too little, and what changes it."""
    if result.worth == "useful":
        return []
    causes = []
    if result.reach[1] < result.outer_step:
        causes.append(
            f"The first outer step is one of {result.outer_step:.1e}, beyond that: take a smaller "
            "outer learning rate, or clip the outer update."
        )
    if not np.isfinite(result.cotangents).all():
        causes.append("The meta-gradient is not finite: `Trainer.check_health` says why.")
        return causes
    first: tuple[str, ...] = ()
    jump, at = largest_jump(result.tangents)
    if jump > JUMP:
        causes.append(
            f"The tangents grow by {jump:.0f} in inner step {at} of {result.inner_steps} alone."
        )
        first = "eps_root", "clip"
    if growth(result.tangents) > GROWN or growth(result.cotangents[::-1]) > GROWN:
        causes.append(
            f"Tangents grow by {growth(result.tangents):.1e} over the second half of the loop, and "
            f"cotangents by {growth(result.cotangents[::-1]):.1e} over the first on their way "
            "back: the loop is chaotic."
        )
        first = (*first, "learning_rate", "steps")
    if first or not result._is_smooth or result.worth == "useless":
        names = [*dict.fromkeys((*first, *LEVERS))]
        causes.append(f"What makes it smoother: {'; '.join(LEVERS[name] for name in names)}.")
    return causes


def largest_jump(norms: np.ndarray) -> tuple[float, int]:
    """Return (the largest growth [T] of a norm in one step, that step, from 1); (1, 0): none."""
    ratios = norms[1:] / np.where(norms[:-1] > 0, norms[:-1], np.inf)
    if not ratios.size or not ratios.max() > 1:
        return 1.0, 0
    return float(ratios.max()), int(ratios.argmax()) + 2


def growth(norms: np.ndarray) -> float:
    """Return by what factor a norm [T] grows over the second half of a loop."""
    middle, end = norms[len(norms) // 2], norms[-1]
    return float(end / middle) if middle > 0 else 1.0
