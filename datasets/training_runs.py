"""Tasks that are whole training runs, to learn the hyperparameters of training.

eta (learning rates, momenta, weight decays) determines how a network is trained on a dataset for T
steps, from an initialisation drawn anew for every run. The outer loss is the loss of the trained
network on examples that the run did not train on (FDS; Micaelli & Storkey 2021, arXiv:2007.07869).

`TrainingRuns` draws a random split of one dataset into training and validation rows for every key,
uniform over all splits of that size. With one fixed split, many runs would fit eta to its
validation examples. `HeldOut` is the run to report: train on all training examples, evaluate on a
test set that was never used to learn a hyperparameter.

A run of 10^4 steps reads every example many times, so an episode contains no copies of examples,
but the whole dataset and the row numbers of its split. `sample` returns the arrays unchanged, so a
batch of runs (`vmap` over keys) has one array of data and many arrays of row numbers.
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
    """Training runs on random splits of one dataset. Create it with `TrainingRuns.create`.

    A pytree: the data are its leaves, so pass it to jit as an argument.

    Args:
      inputs: [n, ...].
      targets: [n], of the outer loss.
      training_targets: [n], of the inner loop.
      validation: the number of examples of the outer loss.
    """

    inputs: jax.Array = dataclasses.field(repr=False)
    targets: jax.Array = dataclasses.field(repr=False)
    training_targets: jax.Array = dataclasses.field(repr=False)
    validation: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls, inputs: Any, targets: Any, *, validation: int | float, training_targets: Any = None
    ) -> TrainingRuns:
        """Put a dataset on the device, after checking that it can be split.

        Args:
          inputs: [n, ...], stored unchanged. An inner step scales uint8 images to 0..1, and
            reads any other type unchanged: tokens are int32.
          targets: [n], for the objective.
          validation: the validation examples of a run: a number (int), or a share of all
            (float), rounded.
          training_targets: [n], the targets of the inner loop, such as noisy labels; None: equal
            to `targets`.

        Raises:
          ValueError: if lengths differ, or one side of the split is empty; or for uint8 inputs
            that are not images, which may be pixels or tokens.
          TypeError: if inputs or targets are not arrays, or `validation` is not a number.
        """
        inputs, targets = _checked("TrainingRuns", inputs, targets)
        count = validation_examples("TrainingRuns", validation, len(inputs))
        targets = inner_targets = jnp.asarray(targets)
        if training_targets is not None:
            _, inner_targets = _checked(
                "TrainingRuns", inputs, training_targets, "training_targets"
            )
        return cls(jnp.asarray(inputs), targets, jnp.asarray(inner_targets), count)

    def label_range(self) -> tuple[int, int] | None:
        """Return the least and the largest target; None for a regression."""
        return least_and_largest(self.targets, self.training_targets)

    def sample(self, key: jax.Array) -> Episode:
        """Draw one split of the rows.

        Returns:
          `support` = (inputs [n, ...], training targets [n], rows [n - validation] int32), and
          `query` = (inputs, targets, rows [validation]): the two parts of a random permutation
          of all rows.
        """
        train, held_out = random_split(key, self.targets.shape[0], self.validation)
        support = self.inputs, self.training_targets, train
        return Episode(support, (self.inputs, self.targets, held_out))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut(Tasks):
    """The final run: train on all training examples, evaluate on a test set.

    Create it with `HeldOut.create`. A pytree: the data are its leaves, so pass it to jit as an
    argument.

    Args:
      inputs: [n, ...], of the training set.
      targets: [n].
      test_inputs: [m, ...].
      test_targets: [m].
    """

    inputs: jax.Array = dataclasses.field(repr=False)
    targets: jax.Array = dataclasses.field(repr=False)
    test_inputs: jax.Array = dataclasses.field(repr=False)
    test_targets: jax.Array = dataclasses.field(repr=False)

    @classmethod
    def create(
        cls, train_inputs: Any, train_targets: Any, test_inputs: Any, test_targets: Any
    ) -> HeldOut:
        """Put both sets on the device: inputs [n, ...] and [m, ...], targets [n] and [m].

        Inputs are stored and read as those of `TrainingRuns`.

        Raises:
          ValueError: if lengths differ, a set is empty, or the inputs of the two sets differ in
            shape or type; or for uint8 inputs that are not images.
          TypeError: if inputs or targets are not arrays.
        """
        train_inputs, train_targets = _checked("HeldOut", train_inputs, train_targets)
        test_inputs, test_targets = _checked("HeldOut", test_inputs, test_targets)
        train_kind, test_kind = (_kind(inputs) for inputs in (train_inputs, test_inputs))
        if train_kind != test_kind:
            raise ValueError(
                f"`HeldOut` got training inputs of {train_kind} and test inputs of {test_kind}, "
                f"but one network reads both. Give both the same preparation."
            )
        sets = (train_inputs, train_targets, test_inputs, test_targets)
        return cls(*(jnp.asarray(x) for x in sets))

    def label_range(self) -> tuple[int, int] | None:
        """Return the least and the largest target of both sets; None for a regression."""
        return least_and_largest(self.targets, self.test_targets)

    def sample(self, key: jax.Array) -> Episode:
        """Return the only task; the key makes no difference.

        Returns:
          `support` = (inputs [n, ...], targets [n], rows [n] int32, in order), and `query`
          likewise of the test set, with rows [m].
        """
        del key
        pairs = (self.inputs, self.targets), (self.test_inputs, self.test_targets)
        return Episode(*((x, y, jnp.arange(y.shape[0], dtype=jnp.int32)) for x, y in pairs))


def random_split(key: jax.Array, n: int, validation: int) -> tuple[jax.Array, jax.Array]:
    """Return (rows to train on [n - validation], rows of validation), of 0 .. n - 1, int32."""
    rows = jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))
    return rows[: n - validation], rows[n - validation :]


def validation_examples(what: str, validation: Any, n: int) -> int:
    """Return the number of validation examples among n, at least one and at most n - 1."""
    is_number = isinstance(validation, numbers.Real)
    if not is_number:
        raise TypeError(
            f"`{what}` got validation={validation!r}, but it is a number of examples, such "
            "as 1000, or a share of all, such as 0.1."
        )
    whole = isinstance(validation, numbers.Integral)
    if not whole and not 0 < validation < 1:
        raise ValueError(
            f"`{what}` got validation={validation}, but a share of the examples is between 0 "
            f"and 1. Pass a share such as 0.1, or a number of examples as an int."
        )
    count = int(validation) if whole else round(validation * n)
    if not 0 < count < n:
        raise ValueError(
            f"`{what}` got validation={validation} of {n} examples: {count} to validate on "
            f"and {n - count} to train on, but a run needs some of both. Pass a number from 1 to "
            f"{n - 1}, or the share that comes to it."
        )
    return count


def _checked(what: str, inputs: Any, targets: Any, name: str = "targets") -> tuple[Any, Any]:
    """Return inputs and targets as arrays of equal length, which is not zero."""
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
    """Return the dtype and shape of an example, for a message."""
    array = np.asarray(inputs[:1])
    return f"{array.dtype}{['...', *array.shape[1:]]}".replace("'", "")
