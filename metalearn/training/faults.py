"""What a run does when something goes wrong on the way, and when it has seen enough of it.

Of an outer step whose loss or meta-gradient is NaN or infinite there are four things to make:

    "stop"      the run ends, with what was seen; its last checkpoint is from before the step
    "skip"      eta stays as it was, and the next step has other tasks
    "back_off"  back to the last good checkpoint, and on from there with smaller outer updates
    "pass"      nothing: the outer optimizer sees it, and may have a rule for it (`fds_rule`)

Skipping suits a rare bad batch, backing off a run that has become unstable. Both end in a stop
when it happens too often. An inner loop that diverges while all numbers stay finite is seen by
its losses, and reported once.

Tasks that are not finite are left out: one bad task need not spoil the mean of a batch.

A task whose inner run explodes has a NaN for a meta-gradient, and so has the mean over its
batch. Left out, its result counts as zero of a task that does not count, and the mean is over
the others. How many were left out is a metric: what is never looked at is never mended.
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
from metalearn.engines import Aux

NONFINITE = ("stop", "skip", "back_off", "pass")
DIVERGED = ("warn", "stop", "pass")
WATCHED = ("loss", "meta_grad_norm", "meta_update_norm")


class NonFiniteError(FloatingPointError):
    """The outer loss or the meta-gradient became NaN or infinite."""


class DivergedError(FloatingPointError):
    """The inner loss ended far above where it began, step after step."""


@dataclasses.dataclass(frozen=True)
class Faults:
    """What to do about which fault.

    Args:
      nonfinite: about a loss or meta-gradient that is NaN or infinite: "stop", "skip",
        "back_off" or "pass".
      most: steps skipped in a row, or back-offs in all, after which the run stops.
      shrink: each back-off multiplies all later outer updates by this.
      diverged: about inner runs that diverge: "warn", "stop" or "pass".
      ratio: they do where the mean inner loss ends above so many times where it began,
      patience: so many outer steps in a row.
    """

    nonfinite: str = "stop"
    most: int = 5
    shrink: float = 0.5
    diverged: str = "warn"
    ratio: float = 10.0
    patience: int = 3

    def __post_init__(self) -> None:
        check_fields(self, "most", "patience")
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
    """Return the names of those metrics of an outer step that must be finite and are not."""
    return [name for name in WATCHED if not math.isfinite(values[name])]


class Watch:
    """Counts the faults of one run."""

    def __init__(self, faults: Faults):
        self.faults = faults
        self._skipped = 0  # outer steps in a row
        self._diverged = 0
        self._told = False

    def answer(self, step_is_broken: bool, pace: float) -> str:
        """Note an outer step; return what is to be done: "pass", "skip", "back_off" or "stop"."""
        self._skipped = self._skipped + 1 if step_is_broken else 0
        policy = self.faults.nonfinite if step_is_broken else "pass"
        enough = {
            "skip": self._skipped > self.faults.most,
            "back_off": self.pace(pace) is None,
        }
        return "stop" if enough.get(policy, False) else policy

    def pace(self, pace: float) -> float | None:
        """Return the smaller pace after a back-off; None where it is one back-off too many."""
        smaller = pace * self.faults.shrink
        least = self.faults.shrink**self.faults.most
        return smaller if smaller > least * (1 - 1e-5) else None

    def diverges(self, step: int, values: Mapping[str, float]) -> str | None:
        """Note an outer step; return what to say where inner runs have diverged, once a run."""
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
    """Say whether loss, metrics, meta-gradient and all that the inner loop saw are finite: ().

    Of the meta-gradient it is the squared norm that has to be, with room for the sum over tasks.
    """
    seen = [
        loss,
        aux.inner.losses,
        *jax.tree.leaves(aux.metrics),
        optax.tree.norm(grads) ** 2 * 1e4,
    ]
    fine = [jnp.isfinite(x).all() for x in seen]
    return jnp.stack([*fine, aux.inner.finite.all()]).all()


def or_zero(finite: jax.Array, found: Any) -> tuple[Any, ...]:
    """Return (*found, finite), with zeros for a task that is not finite."""
    kept = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), found)
    return (*kept, finite)


def mean_of_finite(means: Any, tasks: int) -> tuple[Any, dict[str, jax.Array], jax.Array]:
    """Return (meta-gradient, metrics, number of tasks left out ()).

    `means` are those of what `or_zero` returned, over all tasks: (meta-gradient, metrics, share
    that is finite). Where none is, the metrics are NaN, for all to see, and the meta-gradient
    is zero.
    """
    grads, metrics, finite = means
    some = jnp.maximum(finite, 1 / tasks)
    grads = jax.tree.map(lambda x: x / some.astype(x.dtype), grads)
    metrics = jax.tree.map(lambda x: x / finite.astype(x.dtype), metrics)
    return grads, metrics, jnp.round((1 - finite) * tasks)
