"""Health checks of meta-gradients: causes of failure, detected before a run starts.

Two things go wrong silently in training through training. An inner optimizer whose update has an
infinite derivative at a zero gradient (sqrt(v) of Adam, and about half of optax) turns the first
exact zero into NaN in all of eta; one that takes a norm (clipping, lars) does so at the first
gradient that is all zero. And a leaf of eta without a path to the outer loss (unused, or behind a
`stop_gradient`) has a meta-gradient of zero: nothing fails, and nothing is learned.

`check` examines the first task of the next outer step, with the trainer's engine and over the first
few inner steps: one more program to compile, the memory of one task. It reports an error if this
task has a NaN: training would stop at its first step. It reports a warning if only an exact zero,
or an all-zero gradient, gives a NaN: a ReLU network will have one, a tanh network will not, and an
algorithm does not say which it trains. The cause is found by running the same inner loop with other
zeros in its gradients.

Of an engine that assumes symmetric Jacobians of inner gradients (`MixedFlow`), the check lists the
inner gradients where it does not, and why: a note, since the result is exact and only costs more
memory. The symmetry of the others is measured on the task (`metalearn.diagnostics.symmetry`): a
warning if a Jacobian is not symmetric and the meta-gradient is not that of `Reverse` there, a note
if it is: where every gradient vanishes, as of a saturated softmax, rounding is all that is left.

`diagnose` explains a failed outer step: which task, where, from which inner step on.
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

from metalearn._utils.labels import Seen, beyond, known
from metalearn.diagnostics import probe
from metalearn.diagnostics.probe import Look
from metalearn.diagnostics.symmetry import Symmetry
from metalearn.engines.custom_rules import listed
from metalearn.tasks import Tasks, check_tasks, draw_episode, label_range
from metalearn.train_state import TrainState

STEPS = 5  # inner steps of a check: enough to detect every optimizer of optax concerned
AGREES = 1e-3  # relative difference of meta-gradients that an asymmetry does not matter to

WRAP = "wrap it: `metalearn.optimizers.differentiable_at_zero(optimizer)`"
ROOT = (
    "An infinite derivative of the inner optimizer, as sqrt(v) has at v = 0, meets a gradient "
    "that is exactly zero. Give the inner optimizer `eps_root=1e-8` if it takes that (adam, "
    "adamw, nadam, nadamw and amsgrad of optax do), which mends that root and no norm beside it "
    "(a larger one, such as 1e-6, also makes the meta-gradient predict more: `metalearn smooth`); "
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
AT_FIRST = (
    "No step had been taken then: the data are not finite, or the state that `Unroll.init` "
    "returns, or the inner loss at it."
)
UNSEEN = (
    "No inner gradient is taken by the `grad` that `step` is given, so zeros in inner gradients "
    "were not tried, and their losses and norms are in no metric. If `step` calls `jax.grad`, call "
    "`grad` in its place."
)
OUTER = ": look at the `loss` of the algorithm's unroll, and at the data it reads."

GROWN = 1e8  # norm of a tangent above which it counts as overflowing


class HealthError(FloatingPointError):
    """The meta-gradient of the first task is not finite: training would fail at once."""


class HealthWarning(UserWarning):
    """Training can continue, but a leaf of eta is not learned, or an exact zero gives a NaN."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a health check, one paragraph per finding.

    Args:
      errors: training would fail at its first step.
      warnings: training may fail later, or does not learn all of eta.
      notes: nothing is wrong.
      probed: whether zeros were put into inner gradients; False where the loop takes none by the
        `grad` that it is given.
    """

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    probed: bool = True

    @property
    def healthy(self) -> bool:
        """Return whether there are no errors and no warnings."""
        return not (self.errors or self.warnings)

    def __str__(self) -> str:
        zeros = ", with a zero in every inner gradient too, and with all of them zero"
        fine = f"Health: the meta-gradient is finite{zeros if self.probed else ''}."
        lines = [fine] if self.healthy else [f"Error: {text}" for text in self.errors]
        lines += [f"Warning: {text}" for text in self.warnings]
        return "\n".join(lines + [f"Note: {text}" for text in self.notes])

    def raise_errors(self) -> None:
        """Raise HealthError if training would fail at its first step."""
        if self.errors:
            raise HealthError(" ".join(self.errors))

    def warn(self) -> None:
        """Issue a HealthWarning for each error and each warning."""
        for text in (*self.errors, *self.warnings):
            warnings.warn(text, HealthWarning, stacklevel=2)


class Probes(NamedTuple):
    """The functions of a `Trainer` that a health check calls; see `Trainer.check_health`.

    Args:
      look: (eta, tasks, key, zeros) -> what one task shows. Compiled.
      first_steps: (eta, tasks, key, zeros, steps) -> what its first inner steps show. Compiled
        quickly, to run a few times.
      symmetry: (eta, tasks, key) -> the symmetry of the Jacobians of inner gradients.
      task_keys: state -> the keys of the tasks of its next outer step.
      fetch: (tasks, state, steps) -> the tasks of its next outer step, read from the host where
        they are there, for the first so many inner steps; None: for those that are differentiated.
      difference: (eta, tasks, key) -> the relative difference of the meta-gradient from that of
        `Reverse`, over a task's first inner steps; None: the engine has no such exact form.
      labels_seen: losses, and the outputs of the network that they were traced with.
      whole: whether `look` sees whole unrolls; False: the first steps of one from a fresh start, of
        those that are truncated, or cut into segments.
    """

    look: Callable[..., Look]
    first_steps: Callable[..., Look]
    symmetry: Callable[..., Symmetry]
    task_keys: Callable[[TrainState], jax.Array]
    fetch: Callable[[Tasks, TrainState, int | None], Tasks]
    difference: Callable[..., float] | None
    labels_seen: Seen
    whole: bool = True


def check(probes: Probes, state: TrainState, tasks: Tasks) -> Report:
    """Examine the first task of the outer step after `state`.

    Args:
      probes: the functions of the trainer.
      state: the state before the outer step.
      tasks: as of the outer step.

    Raises:
      TypeError: if `tasks` are not a distribution over tasks.
      ValueError: if their labels are known and exceed the outputs of the network.
    """
    check_tasks("Trainer.check_health(tasks=)", tasks)
    with known(label_range(tasks), probes.labels_seen):
        return _check(probes, state, tasks)


def _check(probes: Probes, state: TrainState, tasks: Tasks) -> Report:
    keys, names = probes.task_keys(state), _names(state.eta)
    key, tasks = keys[0], probes.fetch(tasks, state, STEPS)
    look = functools.partial(probes.first_steps, state.eta, tasks, key, steps=STEPS)
    result = look(zeros=probe.AS_THEY_ARE)
    cause = _cause(result, names, _labels(probes, tasks, key, result), look)
    if cause and not _outer_finite(result):
        return Report(errors=(f"On the first task {cause}",))
    warnings = [f"On the first task {cause}"] if cause else []
    warnings += _at_zeros(look, names)
    if result.zero.any():
        warnings += _unreached(probes, state.eta, tasks, key, names)
    symmetry = probes.symmetry(state.eta, tasks, key)
    notes = list(_not_commuted(symmetry))
    steps, gradients = np.shape(result.inner.losses)
    if steps and not gradients:
        notes.append(UNSEEN)
    if symmetry.asymmetry > symmetry.tolerance:
        difference = None if probes.difference is None else probes.difference(state.eta, tasks, key)
        if difference is not None and difference <= AGREES:
            notes.append(_rounded(symmetry, difference))
        else:
            warnings.append(_asymmetric(symmetry))
    return Report(warnings=tuple(warnings), notes=tuple(notes), probed=gradients > 0)


def diagnose(probes: Probes, state: TrainState, tasks: Tasks) -> str:
    """Return a sentence: what is not finite in the outer step taken from `state`.

    Only the eta, the key and the step of `state` are read.
    """
    names, keys = _names(state.eta), probes.task_keys(state)
    tasks = probes.fetch(tasks, state, None)
    for i, key in enumerate(keys):
        look = functools.partial(probes.look, state.eta, tasks, key)
        result = look(zeros=probe.AS_THEY_ARE)
        cause = _cause(result, names, _labels(probes, tasks, key, result), look)
        if cause:
            return f"In its task {i + 1} of {len(keys)} {cause}"
    if not probes.whole:
        return (
            f"The first {len(result.inner.losses)} inner steps from a fresh start, which are what "
            "is examined of unrolls in segments or truncations, have a finite outer loss and "
            "meta-gradient for each of its tasks. What is not finite begins in a later inner step, "
            "or in the sum over the tasks, or in the outer optimizer."
        )
    return (
        "Each of its tasks has a finite outer loss and meta-gradient of its own, so it is their "
        "sum, or the outer optimizer, that is not."
    )


def _labels(probes: Probes, tasks: Tasks, key: jax.Array, result: Look) -> str:
    """Return which labels of a task exceed the network's outputs; "" if all losses are finite."""
    losses = np.asarray(result.inner.losses)
    if np.isfinite(losses).all() and jnp.isfinite(result.loss):
        return ""
    return beyond(draw_episode(tasks, key), probes.labels_seen)


def _at_zeros(look: Callable[..., Look], names: Sequence[str]) -> list[str]:
    """Return a warning if one zero in each leaf of inner gradients, or all zeros, give a NaN."""
    kinds = (
        (
            probe.ONE_A_LEAF,
            "an inner gradient is exactly zero (a dead ReLU, an unused embedding, a masked output)",
            ROOT,
        ),
        (probe.ALL, "every inner gradient is exactly zero (a task whose support is masked)", NORM),
    )
    for zeros, where, reason in kinds:
        result = look(zeros=zeros)
        if not _outer_finite(result):
            reason = reason if jnp.isfinite(result.loss) else UNDEFINED
            return [
                f"The meta-gradient becomes NaN or infinite where {where}, in "
                f"{_listed(names, ~result.finite)}. {reason}"
            ]
    return []


def _reason(look: Callable[..., Look]) -> str:
    """Return why a meta-gradient is not finite though its outer loss is."""
    for zeros, reason in ((probe.NONE, ALWAYS), (probe.ONE_A_LEAF, ROOT)):
        if not _outer_finite(look(zeros=zeros)):
            return reason
    return NORM


def _undefined(look: Callable[..., Look]) -> str:
    """Return a sentence if zeros in inner gradients make an inner loop fail; "" otherwise."""
    if not _outer_finite(look(zeros=probe.NONE)):
        return ""
    return f"Without the zeros in its inner gradients it is finite. {UNDEFINED}"


def _cause(result: Look, names: Sequence[str], labels: str, look: Callable[..., Look]) -> str:
    """Return what is not finite on a task, and what to do; "" if everything is finite.

    Args:
      result: of the task.
      names: of the leaves of eta.
      labels: what is wrong with its labels; "": nothing.
      look: examines the task again, with given zeros in its inner gradients.
    """
    if labels:
        return f"the loss is not finite, of labels that the network has no output for. {labels}"
    losses, finite = np.asarray(result.inner.losses), np.asarray(result.inner.finite)
    bad = ~(np.isfinite(losses) & finite)
    if bad.any():
        first = int(bad.any(axis=1).argmax())
        reason = DIVERGES if first or np.isfinite(losses[0]).all() else AT_FIRST
        return (
            f"the inner loss or its gradient is not finite from inner step {first + 1} of "
            f"{len(losses)} on (inner loss: first {losses[0].mean():.4g}, last "
            f"{losses[-1].mean():.4g}; {1 - bad.mean():.0%} finite). "
            f"{_undefined(look) or reason}"
        )
    overflow = _overflow(np.asarray(result.inner.tangent_norm))
    if overflow:
        return overflow
    if not jnp.isfinite(result.loss):
        undefined = _undefined(look)
        return (
            f"the outer loss is {float(result.loss)}, though every inner loss and gradient is "
            "finite" + (f". {undefined}" if undefined else OUTER)
        )
    if not result.finite.all():
        return (
            f"the meta-gradient is not finite in {_listed(names, ~result.finite)}, though the "
            f"outer loss and every inner loss and gradient are. {_reason(look)}"
        )
    return ""


def _overflow(norms: np.ndarray) -> str:
    """Return where the tangents [T, k] of `Forward` overflow; "" if they do not."""
    bad = (~np.isfinite(norms)).any(axis=1)
    first = int(bad.argmax()) if bad.any() else 0
    if not first or norms[first - 1].max() < GROWN:
        return ""  # not finite from one step to the next, without growth: see `_reason`
    return (
        f"the tangents overflow from inner step {first + 1} of {len(norms)} on (largest norm "
        f"before: {norms[first - 1].max():.3g}): the inner loop is chaotic there, and its "
        f"derivative says little long before it overflows. {DIVERGES}"
    )


def _outer_finite(result: Look) -> bool:
    return bool(jnp.isfinite(result.loss) & result.finite.all())


def _unreached(
    probes: Probes, eta: Any, tasks: Tasks, key: jax.Array, names: Sequence[str]
) -> list[str]:
    """Return a warning if leaves of eta have a meta-gradient of zero, at eta and at eta + noise.

    At eta alone a layer that is initialised to zero gives zeros to the layers before it.
    """
    leaves, treedef = jax.tree.flatten(eta)
    draws = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(draws, leaves, strict=True)]
    moved = [x + 0.01 * (1 + abs(x)) * n for x, n in zip(leaves, noise, strict=True)]
    result = probes.look(jax.tree.unflatten(treedef, moved), tasks, key)
    if not result.zero.any():
        return []
    return [
        f"The meta-gradient is exactly zero in {_listed(names, result.zero)}, at the initial eta "
        "and beside it: no path leads from there to the outer loss, so it will not be learned. Is "
        "it used in `init`, `step` or `loss`, and not behind a `stop_gradient`, a rounding or an "
        "argmax? What is not learned belongs on the algorithm, not in `eta`."
    ]


def _rounded(symmetry: Symmetry, difference: float) -> str:
    """Return a note of an asymmetry that the meta-gradient does not show."""
    return (
        "The Jacobian J of an inner gradient is not symmetric on the first task (u^T J v and "
        f"v^T J u differ by {symmetry.asymmetry:.2g} of their size), but the meta-gradient is that "
        f"of `Reverse()` to {difference:.0e}: J is mostly rounding there, as where a softmax is "
        "saturated and its gradient vanishes."
    )


def _asymmetric(symmetry: Symmetry) -> str:
    """Return a warning of a Jacobian that an engine assumes symmetric and is not, on this task."""
    return (
        "The Jacobian J of an inner gradient is not symmetric on the first task (u^T J v and "
        f"v^T J u differ by {symmetry.asymmetry:.2g} of their size, of which rounding explains "
        f"{symmetry.tolerance:.0e}), but the engine takes it for symmetric: its meta-gradient is "
        "wrong there. A function of the inner loss has a derivative rule that is no derivative "
        "where this task uses it, though it is one wherever it was tried, or was declared one in "
        "`true_rules`. Use `Reverse()`, or take the name out of `true_rules`; a rule that was "
        "believed without being declared is worth a report."
    )


def _not_commuted(symmetry: Symmetry) -> tuple[str, ...]:
    """Return a note of the functions for which inner gradients take reverse over reverse."""
    if not symmetry.rules:
        return ()
    return (
        "Inner gradients are differentiated as they stand, by reverse over reverse, where they "
        "pass functions whose derivative rules do not count as derivatives: "
        f"{listed(symmetry.rules)}. The meta-gradient is exact; these gradients take the memory "
        "that they take under `Reverse('step')`. Where a rule that could not be told by trying is "
        "a true derivative, say so by name in `MixedFlow(true_rules=...)`.",
    )


def _names(eta: Any) -> list[str]:
    with_path = jax.tree_util.tree_leaves_with_path(eta)
    return [f"`eta{jax.tree_util.keystr(path)}`" for path, _ in with_path]


def _listed(names: Sequence[str], where: jax.Array, most: int = 4) -> str:
    chosen = [name for name, is_so in zip(names, np.asarray(where), strict=True) if is_so]
    more = f" and {len(chosen) - most} more" if len(chosen) > most else ""
    return f"{', '.join(chosen[:most])}{more} ({len(chosen)} of {len(names)} leaves)"
