"""Where tasks come from: a pure function from a PRNG key to an episode.

A task distribution is a pytree (its arrays sit on the device, its numbers are
static), so it goes through `jit` as an argument, and a run's data is decided by
(seed, step) alone: resuming needs no position in any stream.
"""

from __future__ import annotations

import abc

import jax

from metalearn.unroll import Episode


class Tasks(abc.ABC):
    """A distribution over tasks. Subclasses are dataclasses registered as pytrees.

    `@jax.tree_util.register_dataclass` over `@dataclasses.dataclass(frozen=True)`, with what is
    no array as `dataclasses.field(metadata={"static": True})`.
    """

    @abc.abstractmethod
    def sample(self, key: jax.Array) -> Episode:
        """Draw one task. Pure, and traced inside jit; vmap over keys for a batch."""
