"""A task is one whole training run: for learning the hyperparameters of training itself.

Learning rates, momenta, weight decays: what is learned here, eta, is not adapted to a
task, it *is* how a network is trained on a dataset for T steps, from an initialisation
drawn anew for every run. The outer loss is the loss of the trained network on examples
that the run did not train on (FDS; Micaelli & Storkey 2021, arXiv:2007.07869).

`TrainingRuns` draws these: every key is a fresh split of one dataset into training and
validation rows, uniform over all splits of that size. With one fixed split, T steps times
many runs would fit eta to its validation examples. `HeldOut` is the run to report: train
on everything, judge on a test set that no hyperparameter has seen.

A run of 10^4 steps reads every example many times, so an episode is no copy of the data:
it is all the data, and the rows that are its own. The arrays pass through `sample` as
they are, and a batch of runs (`vmap` over keys) has one array and many rows.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.fields import check_fields
from metalearn._utils.pixels import are_pixels
from metalearn.datasets.arrays import least_and_largest, one_array
from metalearn.tasks import Tasks
from metalearn.unroll import Episode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRuns(Tasks):
    """Training runs on random splits of one dataset. Make it with `TrainingRuns.create`.

    A pytree: the data are its leaves, so pass it to jit as an argument.
    """

    inputs: jax.Array = dataclasses.field(repr=False)  # [n, ...]
    targets: jax.Array = dataclasses.field(repr=False)  # [n], of the outer loss
    training_targets: jax.Array = dataclasses.field(repr=False)  # [n], of the inner loop
    validation: int = dataclasses.field(metadata={"static": True})  # examples of the outer loss

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls, inputs: Any, targets: Any, *, validation: int | float, training_targets: Any = None
    ) -> TrainingRuns:
        """Put a dataset on the device, after checking that it can be split.

        Args:
          inputs: [n, ...], kept as they are. An inner step reads images of uint8 as 0..1, and
            any other type as it is: tokens are int32.
          targets: [n], as the loss takes them.
          validation: how many examples a run does not train on, as a number (an int) or
            a share of all (a float), rounded.
          training_targets: [n], what the inner loop is told where that differs, such as
            noisy labels; None: the same.

        Raises:
          ValueError: if lengths differ, or no example is left on one side of the split; or of
            uint8 that are no images, which may be pixels or tokens.
          TypeError: if inputs or targets are no arrays, or `validation` no number.
        """
        inputs, targets = _checked("TrainingRuns", inputs, targets)
        count = _count(validation, len(inputs))
        targets = told = jnp.asarray(targets)
        if training_targets is not None:
            _, told = _checked("TrainingRuns", inputs, training_targets, "training_targets")
        return cls(jnp.asarray(inputs), targets, jnp.asarray(told), count)

    def label_range(self) -> tuple[int, int] | None:
        """Return the least and the largest target; None of a regression."""
        return least_and_largest(self.targets, self.training_targets)

    def sample(self, key: jax.Array) -> Episode:
        """Draw one split of the rows.

        Returns:
          `support` = (inputs [n, ...], training targets [n], rows [n - validation] int32), and
          `query` = (inputs, targets, rows [validation]): two sides of one random permutation,
          so together they are all rows, and none is in both.
        """
        n = self.targets.shape[0]
        rows = jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))
        train, held_out = rows[: n - self.validation], rows[n - self.validation :]
        support = self.inputs, self.training_targets, train
        return Episode(support, (self.inputs, self.targets, held_out))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut(Tasks):
    """The final run: all training examples, judged on a test set. Make it with `HeldOut.create`.

    A pytree: the data are its leaves, so pass it to jit as an argument.
    """

    inputs: jax.Array = dataclasses.field(repr=False)  # [n, ...]
    targets: jax.Array = dataclasses.field(repr=False)  # [n]
    test_inputs: jax.Array = dataclasses.field(repr=False)  # [m, ...]
    test_targets: jax.Array = dataclasses.field(repr=False)  # [m]

    @classmethod
    def create(
        cls, train_inputs: Any, train_targets: Any, test_inputs: Any, test_targets: Any
    ) -> HeldOut:
        """Put both sets on the device: inputs [n, ...] and [m, ...], targets [n] and [m].

        Inputs are kept and read as those of `TrainingRuns`.

        Raises:
          ValueError: if lengths differ, a set is empty, or their inputs are not alike; or of
            uint8 that are no images.
          TypeError: if inputs or targets are no arrays.
        """
        train_inputs, train_targets = _checked("HeldOut", train_inputs, train_targets)
        test_inputs, test_targets = _checked("HeldOut", test_inputs, test_targets)
        ours, theirs = (_kind(inputs) for inputs in (train_inputs, test_inputs))
        if ours != theirs:
            raise ValueError(
                f"`HeldOut` got training inputs of {ours} and test inputs of {theirs}, but one "
                f"network reads both. Give both the same preparation."
            )
        sets = (train_inputs, train_targets, test_inputs, test_targets)
        return cls(*(jnp.asarray(x) for x in sets))

    def label_range(self) -> tuple[int, int] | None:
        """Return the least and the largest target of both sets; None of a regression."""
        return least_and_largest(self.targets, self.test_targets)

    def sample(self, key: jax.Array) -> Episode:
        """Return the one task there is, whatever the key.

        Returns:
          `support` = (inputs [n, ...], targets [n], rows [n] int32, in order), and `query`
          likewise of the test set, with rows [m].
        """
        del key
        pairs = (self.inputs, self.targets), (self.test_inputs, self.test_targets)
        return Episode(*((x, y, jnp.arange(y.shape[0], dtype=jnp.int32)) for x, y in pairs))


def _count(validation: Any, n: int) -> int:
    """Return how many of n examples are for validation, which leaves some on both sides."""
    is_number = isinstance(validation, numbers.Real)
    if not is_number:
        raise TypeError(
            f"`TrainingRuns` got validation={validation!r}, but it is a number of examples, such "
            "as 1000, or a share of all, such as 0.1."
        )
    whole = isinstance(validation, numbers.Integral)
    if not whole and not 0 < validation < 1:
        raise ValueError(
            f"`TrainingRuns` got validation={validation}, but a share of the examples is between 0 "
            f"and 1. Pass a share such as 0.1, or a number of examples as an int."
        )
    count = int(validation) if whole else round(validation * n)
    if not 0 < count < n:
        raise ValueError(
            f"`TrainingRuns` got validation={validation} of {n} examples: {count} to validate on "
            f"and {n - count} to train on, but a run needs some of both. Pass a number from 1 to "
            f"{n - 1}, or the share that comes to it."
        )
    return count


def _checked(what: str, inputs: Any, targets: Any, name: str = "targets") -> tuple[Any, Any]:
    """Return inputs and targets as arrays of one length, with something in them."""
    inputs = one_array(what, "inputs", inputs, "[n, ...]")
    targets = one_array(what, name, targets, "[n]")
    counts = [x.shape[0] if x.ndim else 0 for x in (inputs, targets)]
    if counts[0] != counts[1] or not counts[0]:
        raise ValueError(
            f"`{what}` got {counts[0]} inputs and {counts[1]} targets, but every example is one of "
            f"each, and there is at least one. Pass inputs [n, ...] and targets [n]."
        )
    are_pixels(f"`{what}`", inputs.dtype, inputs.shape[1:])
    return inputs, targets


def _kind(inputs: Any) -> str:
    array = np.asarray(inputs[:1])
    return f"{array.dtype}{['...', *array.shape[1:]]}".replace("'", "")
