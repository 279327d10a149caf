"""A compiled program of the Trainer whose algorithm holds arrays that nobody learns.

JAX copies an array that a program closes over into the program. For a pretrained body that is a
copy on the host, one on the device, and minutes of compiling. So such arrays,
`Algorithm.constants`, travel as arguments, beside the tasks (`metalearn.tasks.WithConstants`): one
array on the device serves every program.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from metalearn.tasks import Tasks, WithConstants


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled function (state or eta, tasks, ...), called and lowered like `jax.jit`'s.

    Args:
      compiled: the function, jitted.
      constants: of the algorithm, on the devices.
    """

    compiled: Any
    constants: Any

    def __call__(self, first: Any, tasks: Tasks, *others: Any, **options: Any) -> Any:
        """Run it."""
        return self.compiled(first, self._with_constants(tasks), *others, **options)

    def trace(self, first: Any, tasks: Tasks, *others: Any, **options: Any) -> Any:
        """Return it traced for arguments of these shapes, as `jax.jit` does."""
        return self.compiled.trace(first, self._with_constants(tasks), *others, **options)

    def lower(self, first: Any, tasks: Tasks, *others: Any, **options: Any) -> Any:
        """Return it lowered for arguments of these shapes, as `jax.jit` does."""
        return self.compiled.lower(first, self._with_constants(tasks), *others, **options)

    def _with_constants(self, tasks: Tasks) -> Tasks:
        if isinstance(tasks, WithConstants):
            return tasks
        return WithConstants(tasks, self.constants)
