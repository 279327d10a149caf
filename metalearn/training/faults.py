"""The policy on non-finite numbers: of an outer step, of a task, and of inner loops that diverge.

An outer step whose loss or meta-gradient is NaN or infinite has one of four outcomes:

    "stop"      training ends with an error; the last checkpoint is from before the step
    "skip"      eta is left unchanged, and the next step draws other tasks
    "back_off"  training resumes from the last good checkpoint with smaller outer updates
    "pass"      the outer optimizer gets the numbers as they are, for rules that handle them
                (`fds_rule`)

Skipping suits a rare bad batch, backing off a run that has become unstable. Both end training
when they happen too often. Inner loops that diverge while all numbers stay finite are detected
by their losses, and reported once.

One non-finite task makes the mean meta-gradient of its batch NaN. With `isolate`, and in
truncated training, non-finite tasks are masked: divide by the finite count. How many tasks were
masked is a metric (`tasks_left_out`, `tasks_reset`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import is_integer, pick
from metalearn._utils.fields import check_fields
from metalearn._utils.trees import precise
from metalearn.engines import Aux

NONFINITE = ("stop", "skip", "back_off", "pass")
DIVERGED = ("warn", "stop", "pass")
WATCHED = ("loss", "meta_grad_norm", "meta_update_norm")


class NonFiniteError(FloatingPointError):
    """The outer loss or the meta-gradient became NaN or infinite."""


class DivergedError(FloatingPointError):
    """The inner loss ended far above its first value in several outer steps in a row."""


@dataclasses.dataclass(frozen=True)
class Faults:
    """What to do about non-finite outer steps and diverging inner loops.

    Args:
      nonfinite: for a loss or meta-gradient that is NaN or infinite: "stop", "skip",
        "back_off" or "pass".
      most: skipped steps in a row, or back-offs in total, after which training stops.
      shrink: each back-off multiplies all later outer updates by this, between 0 and 1.
      diverged: for inner loops that diverge: "warn", "stop" or "pass".
      ratio: an inner loop diverges where its last mean loss is above `ratio` times its first,
      patience: in so many outer steps in a row.
    """

    nonfinite: str = "stop"
    most: int = 5
    shrink: float = 0.5
    diverged: str = "warn"
    ratio: float = 10.0
    patience: int = 3

    def __post_init__(self) -> None:
        check_fields(self)
        pick(dict.fromkeys(NONFINITE), self.nonfinite, "way with steps that are not finite")
        pick(dict.fromkeys(DIVERGED), self.diverged, "way with inner runs that diverge")
        if not 0 < self.shrink < 1:
            raise ValueError(
                f"`Faults(shrink={self.shrink})` makes outer updates smaller: between 0 and 1."
            )
        for name, value in (("most", self.most), ("patience", self.patience)):
            if not is_integer(value) or value < 1:
                raise ValueError(f"`Faults({name}={value})` is a number of times: at least 1.")
        if not self.ratio > 1:
            raise ValueError(
                f"`Faults(ratio={self.ratio})` is how far an inner loss may rise: above 1."
            )


def broken(values: Mapping[str, float]) -> list[str]:
    """Return the names of the metrics of an outer step that must be finite and are not."""
    return [name for name in WATCHED if not math.isfinite(values[name])]


class Watch:
    """Counts the faults of one run and decides what to do about the next."""

    def __init__(self, faults: Faults):
        self.faults = faults
        self._skipped = 0  # outer steps in a row
        self._diverged = 0
        self._told = False
        self._doubted: set[str] = set()

    def answer(self, step_is_broken: bool, pace: float) -> str:
        """Count an outer step; return "pass", "skip", "back_off" or "stop"."""
        self._skipped = self._skipped + 1 if step_is_broken else 0
        policy = self.faults.nonfinite if step_is_broken else "pass"
        enough = {
            "skip": self._skipped > self.faults.most,
            "back_off": self.pace(pace) is None,
        }
        return "stop" if enough.get(policy, False) else policy

    def pace(self, pace: float) -> float | None:
        """Return the smaller pace after a back-off; None after the last back-off allowed."""
        smaller = pace * self.faults.shrink
        least = self.faults.shrink**self.faults.most
        return smaller if smaller > least * (1 - 1e-5) else None

    def new(self, doubts: Mapping[str, str]) -> list[str]:
        """Return those of an engine's doubts that have not been reported in this run."""
        names = [name for name in doubts if name not in self._doubted]
        self._doubted.update(names)
        return [doubts[name] for name in names]

    def diverges(self, step: int, values: Mapping[str, float]) -> str | None:
        """Count an outer step; return a message where inner loops diverge, once a run."""
        first, last = values.get("inner_loss_first"), values.get("inner_loss_last")
        if self.faults.diverged == "pass" or first is None or last is None:
            return None
        rises = last > self.faults.ratio * abs(first)
        self._diverged = self._diverged + 1 if rises else 0
        if self._told or self._diverged < self.faults.patience:
            return None
        self._told = True
        return (
            f"The inner loop diverges: for {self.faults.patience} outer steps up to {step} its "
            f"mean loss has ended more than {self.faults.ratio:g} times above where it began "
            f"({first:.4g} to {last:.4g} in the last). Lower the inner learning rate, clip the "
            "inner gradients, or take fewer inner steps."
        )


def all_finite(loss: jax.Array, aux: Aux, grads: Any) -> jax.Array:
    """Return whether loss, metrics, meta-gradient and inner losses are finite: (), bool.

    Of the meta-gradient the squared norm must be finite, with room for the sum over tasks.
    """
    seen = [
        loss,
        aux.inner.losses,
        *jax.tree.leaves(aux.metrics),
        optax.tree.norm(jax.tree.map(precise, grads)) ** 2 * 1e4,
    ]
    fine = [jnp.isfinite(x).all() for x in seen]
    return jnp.stack([*fine, aux.inner.finite.all()]).all()


def or_zero(finite: jax.Array, outputs: Any) -> tuple[Any, ...]:
    """Return (*outputs, finite), the outputs zero for a task that is not finite."""
    masked = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), outputs)
    return (*masked, finite)


def mean_of_finite(means: Any, tasks: int) -> tuple[Any, dict[str, jax.Array], jax.Array]:
    """Return (meta-gradient, metrics, number of masked tasks ()).

    `means` are the means of `or_zero` over all tasks: (meta-gradient, metrics, finite share).
    Non-finite tasks are masked; divide by the finite count. Where no task is finite, the metrics
    are NaN and the meta-gradient is zero.
    """
    grads, metrics, finite = means
    some = jnp.maximum(finite, 1 / tasks)
    grads = jax.tree.map(lambda x: x / some.astype(x.dtype), grads)
    metrics = jax.tree.map(lambda x: x / finite.astype(x.dtype), metrics)
    return grads, metrics, jnp.round((1 - finite) * tasks)
