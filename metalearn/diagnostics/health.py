"""Meta-gradient health: what would make a run fail, found before it starts.

Two things go wrong without a word in training through training. An inner optimizer whose
update has an infinite derivative at a zero gradient (sqrt(v) of Adam, and of about half of
optax) turns the first exact zero into a NaN in all of eta; one that takes a norm (clipping,
lars), the first gradient that is all zero. And a leaf of eta that no path
leads to (unused, or behind a `stop_gradient`) has the meta-gradient zero: nothing fails, and
nothing is learned.

`check` looks at the first task of the next outer step, with the trainer's own engine and
over its first few inner steps: one more program to compile, the memory of one task. What it
finds is an error where this task itself has a NaN, since training would stop at its first
step. It is a warning where only an exact zero would, or a gradient of zeros alone: a ReLU network
will meet one, a tanh network will not, and an algorithm does not say which it has. The reason
that is given is found by looking again, at the same inner loop with other zeros in its gradients.

An engine that assumes symmetric Jacobians of inner gradients (`MixedFlow`) is asked for which inner
gradients it does not, and why: a note, since the result is exact and only costs more memory. The
symmetry of the others is measured on the task (`metalearn.diagnostics.symmetry`): a warning where
a Jacobian is not symmetric.

`diagnose` says the same of an outer step that has failed: which task, where, from which
inner step on.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.diagnostics import probe
from metalearn.diagnostics.labels import Seen, beyond, known
from metalearn.diagnostics.probe import Look
from metalearn.diagnostics.symmetry import Symmetry
from metalearn.engines.custom_rules import listed
from metalearn.tasks import Tasks, check_tasks, draw_episode
from metalearn.train_state import TrainState

STEPS = 5  # inner steps of a check: enough for every optimizer of optax to show itself

WRAP = "wrap it: `metalearn.optimizers.differentiable_at_zero(optimizer)`"
ROOT = (
    "An infinite derivative of the inner optimizer, as sqrt(v) has at v = 0, meets a gradient "
    "that is exactly zero. Give the inner optimizer `eps_root=1e-8` if it takes that (adam, "
    "adamw, nadam, nadamw and amsgrad of optax do), which mends that root and no norm beside it; "
    f"or {WRAP}. A root or norm that `step` takes itself needs the same: sqrt(sum(g**2) + 1e-12)."
)
NORM = (
    "The inner optimizer takes a norm of a gradient that is all zero, whose derivative is infinite "
    "there, or divides by such a zero in a branch that is not used (clipping by a norm, lars, "
    "lamb, novograd, lbfgs), or decomposes a matrix of zeros (galore). `eps_root` does not mend "
    f"that: {WRAP}. A norm that `step` takes itself needs sqrt(sum(g**2) + 1e-12)."
)
ALWAYS = (
    "It is so with no zero in any inner gradient too, so the inner optimizer takes a root of a "
    "number that is negative and drops the value (radam in its first steps), or of one that is "
    "zero whatever the gradient (dog, mechanize: how far the loop has come). `eps_root` does not "
    f"mend that: {WRAP}. Or `init`, `step` or `loss` take such a root themselves: sqrt(x + 1e-12), "
    "or sqrt(where(used, x, 1)) where the value is dropped."
)
UNDEFINED = (
    "The update itself is not finite at a zero gradient, since the inner optimizer divides by "
    "something that is zero then (a norm, as `optax.contrib.normalize`, or a sum of gradients, as "
    "prodigy and dadapt_adamw of optax). No derivative can mend that: take an optimizer that adds "
    "a constant to what it divides by (`differentiable_at_zero(optax.normalize_by_update_norm())`),"
    " or leave out tasks that have no inner gradient."
)
DIVERGES = (
    "The inner loop diverges, or its data are not finite: lower the inner learning rate, clip "
    "the inner gradients, or take fewer inner steps."
)
OUTER = ": look at the `loss` of the algorithm's unroll, and at the data it reads."

GROWN = 1e8  # the norm of a tangent from which on it is overflowing


class HealthError(FloatingPointError):
    """The meta-gradient of the first task is not finite: training would fail at once."""


class HealthWarning(UserWarning):
    """Training can go on, but something will not be learned, or is a zero away from NaN."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check found, a paragraph each."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # nothing is wrong, but good to know

    @property
    def healthy(self) -> bool:
        """Say whether nothing was found to be wrong."""
        return not (self.errors or self.warnings)

    def __str__(self) -> str:
        fine = (
            "Health: the meta-gradient is finite, with a zero in every inner gradient too, "
            "and with all of them zero."
        )
        found = [fine] if self.healthy else [f"Error: {text}" for text in self.errors]
        found += [f"Warning: {text}" for text in self.warnings]
        return "\n".join(found + [f"Note: {text}" for text in self.notes])

    def raise_errors(self) -> None:
        """Raise HealthError if training would fail at its first step."""
        if self.errors:
            raise HealthError(" ".join(self.errors))

    def warn(self) -> None:
        """Give a HealthWarning for each thing found, errors included."""
        for text in (*self.errors, *self.warnings):
            warnings.warn(text, HealthWarning, stacklevel=2)


class Probes(NamedTuple):
    """The functions of a `Trainer` that a health check calls; see `Trainer.check_health`.

    Args:
      look: (eta, tasks, key, zeros, steps) -> what one task shows. Compiled.
      symmetry: (eta, tasks, key) -> the symmetry of the Jacobians of inner gradients.
      task_keys: state -> the keys of the tasks of its next outer step.
      labels_seen: losses, and the outputs of the network that they were traced with.
    """

    look: Callable[..., Look]
    symmetry: Callable[..., Symmetry]
    task_keys: Callable[[TrainState], jax.Array]
    labels_seen: Seen


def check(probes: Probes, state: TrainState, tasks: Tasks) -> Report:
    """Look at the first task of the outer step that comes after `state`.

    Raises:
      TypeError: if `tasks` are no distribution over tasks.
      ValueError: if their labels are known, and beyond the outputs of the network.
    """
    check_tasks("Trainer.check_health(tasks=)", tasks)
    with known(tasks, probes.labels_seen):
        return _check(probes, state, tasks)


def _check(probes: Probes, state: TrainState, tasks: Tasks) -> Report:
    key, names = probes.task_keys(state)[0], _names(state.eta)
    look = functools.partial(probes.look, state.eta, tasks, key, steps=STEPS)
    seen = look(zeros=probe.AS_THEY_ARE)
    trouble = _trouble(seen, names, _labels(probes, tasks, key, seen), look)
    if trouble and not _outer_finite(seen):
        return Report(errors=(f"On the first task {trouble}",))
    found = [f"On the first task {trouble}"] if trouble else []
    found += _at_zeros(look, names)
    if seen.zero.any():
        found += _unreached(probes, state.eta, tasks, key, names)
    symmetry = probes.symmetry(state.eta, tasks, key)
    return Report(warnings=(*found, *_asymmetric(symmetry)), notes=_as_they_stand(symmetry))


def diagnose(probes: Probes, state: TrainState, tasks: Tasks) -> str:
    """Say what is not finite in the outer step that was taken from `state`, task by task.

    Only the eta, the key and the step of `state` are read.
    """
    names, keys = _names(state.eta), probes.task_keys(state)
    for i, key in enumerate(keys):
        look = functools.partial(probes.look, state.eta, tasks, key)
        seen = look(zeros=probe.AS_THEY_ARE)
        trouble = _trouble(seen, names, _labels(probes, tasks, key, seen), look)
        if trouble:
            return f"In its task {i + 1} of {len(keys)} {trouble}"
    return (
        "Each of its tasks has a finite outer loss and meta-gradient of its own, so it is their "
        "sum, or the outer optimizer, that is not."
    )


def _labels(probes: Probes, tasks: Tasks, key: jax.Array, seen: Look) -> str:
    """Say which labels of a task are beyond the outputs of the network; "" where all is finite."""
    losses = np.asarray(seen.inner.losses)
    if np.isfinite(losses).all() and jnp.isfinite(seen.loss):
        return ""
    return beyond(draw_episode(tasks, key), probes.labels_seen)


def _at_zeros(look: Callable[..., Look], names: Sequence[str]) -> list[str]:
    """Warn of what is not finite with one zero in each leaf of inner gradients, or with all."""
    kinds = (
        (
            probe.ONE_A_LEAF,
            "an inner gradient is exactly zero (a dead ReLU, an unused embedding, a masked output)",
            ROOT,
        ),
        (probe.ALL, "every inner gradient is exactly zero (a task whose support is masked)", NORM),
    )
    for zeros, where, reason in kinds:
        seen = look(zeros=zeros)
        if not _outer_finite(seen):
            reason = reason if jnp.isfinite(seen.loss) else UNDEFINED
            return [
                f"The meta-gradient becomes NaN or infinite where {where}, in "
                f"{_listed(names, ~seen.finite)}. {reason}"
            ]
    return []


def _reason(look: Callable[..., Look]) -> str:
    """Say why a meta-gradient is not finite though its outer loss is."""
    for zeros, reason in ((probe.NONE, ALWAYS), (probe.ONE_A_LEAF, ROOT)):
        if not _outer_finite(look(zeros=zeros)):
            return reason
    return NORM


def _undefined(look: Callable[..., Look]) -> str:
    """Say that it is zeros in inner gradients that make an inner loop fail; "" where not."""
    if not _outer_finite(look(zeros=probe.NONE)):
        return ""
    return f"Without the zeros in its inner gradients it is finite. {UNDEFINED}"


def _trouble(seen: Look, names: Sequence[str], labels: str, look: Callable[..., Look]) -> str:
    """Say what is not finite on a task, and what to do; "" where everything is.

    `labels`: what is wrong with the labels, if it is that. `look` looks at the task again, with
    the zeros it is told.
    """
    if labels:
        return f"the loss is not finite, of labels that the network has no output for. {labels}"
    losses, finite = np.asarray(seen.inner.losses), np.asarray(seen.inner.finite)
    bad = ~(np.isfinite(losses) & finite)
    if bad.any():
        first = int(bad.any(axis=1).argmax())
        return (
            f"the inner loss or its gradient is not finite from inner step {first + 1} of "
            f"{len(losses)} on (inner loss: first {losses[0].mean():.4g}, last "
            f"{losses[-1].mean():.4g}; {1 - bad.mean():.0%} finite). "
            f"{_undefined(look) or DIVERGES}"
        )
    overflow = _overflow(np.asarray(seen.inner.tangent_norm))
    if overflow:
        return overflow
    if not jnp.isfinite(seen.loss):
        undefined = _undefined(look)
        return (
            f"the outer loss is {float(seen.loss)}, though every inner loss and gradient is finite"
            + (f". {undefined}" if undefined else OUTER)
        )
    if not seen.finite.all():
        return (
            f"the meta-gradient is not finite in {_listed(names, ~seen.finite)}, though the outer "
            f"loss and every inner loss and gradient are. {_reason(look)}"
        )
    return ""


def _overflow(norms: np.ndarray) -> str:
    """Say where the tangents [T, k] of `Forward` grew beyond all bounds; "" where they did not."""
    bad = (~np.isfinite(norms)).any(axis=1)
    first = int(bad.argmax()) if bad.any() else 0
    if not first or norms[first - 1].max() < GROWN:
        return ""  # what is not finite from one step to the next has not grown: see _reason
    return (
        f"the tangents overflow from inner step {first + 1} of {len(norms)} on (largest norm "
        f"before: {norms[first - 1].max():.3g}): the inner loop is chaotic there, and its "
        f"derivative says little long before it overflows. {DIVERGES}"
    )


def _outer_finite(seen: Look) -> bool:
    return bool(jnp.isfinite(seen.loss) & seen.finite.all())


def _unreached(
    probes: Probes, eta: Any, tasks: Tasks, key: jax.Array, names: Sequence[str]
) -> list[str]:
    """Warn of leaves of eta with a meta-gradient of zero here, and close by, over all steps.

    A layer that starts at zero gives those before it a zero meta-gradient too, once.
    """
    leaves, treedef = jax.tree.flatten(eta)
    draws = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(draws, leaves, strict=True)]
    moved = [x + 0.01 * (1 + abs(x)) * n for x, n in zip(leaves, noise, strict=True)]
    seen = probes.look(jax.tree.unflatten(treedef, moved), tasks, key)
    if not seen.zero.any():
        return []
    return [
        f"The meta-gradient is exactly zero in {_listed(names, seen.zero)}, at the initial eta "
        "and beside it: no path leads from there to the outer loss, so it will not be learned. Is "
        "it used in `init`, `step` or `loss`, and not behind a `stop_gradient`, a rounding or an "
        "argmax? What is not learned belongs on the algorithm, not in `eta`."
    ]


def _asymmetric(seen: Symmetry) -> tuple[str, ...]:
    """Warn where an engine takes a Jacobian for symmetric that is not, on this task."""
    if not seen.asymmetry > seen.tolerance:
        return ()
    return (
        "The Jacobian J of an inner gradient is not symmetric on the first task (u^T J v and "
        f"v^T J u differ by {seen.asymmetry:.2g} of their size, of which rounding explains "
        f"{seen.tolerance:.0e}), but the engine takes it for symmetric: its meta-gradient is wrong "
        "there. A function of the inner loss has a derivative rule that is no derivative where "
        "this task uses it, though it is one wherever it was tried, or was declared one in "
        "`true_rules`. Use `Reverse()`, or take the name out of `true_rules`; a rule that was "
        "believed without being declared is worth a report.",
    )


def _as_they_stand(seen: Symmetry) -> tuple[str, ...]:
    """Name the functions that keep inner gradients from being commuted, and what they cost."""
    if not seen.rules:
        return ()
    return (
        "Inner gradients are differentiated as they stand, by reverse over reverse, where they "
        "pass functions whose derivative rules do not count as derivatives: "
        f"{listed(seen.rules)}. The meta-gradient is exact; these gradients take the memory that "
        "they take under `Reverse('step')`. Where a rule that could not be told by trying is a "
        "true derivative, say so by name in `MixedFlow(true_rules=...)`.",
    )


def _names(eta: Any) -> list[str]:
    with_path = jax.tree_util.tree_leaves_with_path(eta)
    return [f"`eta{jax.tree_util.keystr(path)}`" for path, _ in with_path]


def _listed(names: Sequence[str], where: jax.Array, most: int = 4) -> str:
    chosen = [name for name, is_so in zip(names, np.asarray(where), strict=True) if is_so]
    more = f" and {len(chosen) - most} more" if len(chosen) > most else ""
    return f"{', '.join(chosen[:most])}{more} ({len(chosen)} of {len(names)} leaves)"
