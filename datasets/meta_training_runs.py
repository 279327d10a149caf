"""Tasks of a level above: an episode is a meta-training run, on tasks of the level below."""

from __future__ import annotations

import dataclasses

import jax

from metalearn._utils.checks import Count
from metalearn._utils.fields import check_fields
from metalearn.tasks import Tasks, check_tasks
from metalearn.unroll import Episode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MetaTrainingRuns(Tasks):
    """Meta-training runs, for `metalearn.algorithms.MetaTraining`. Create it with `create`.

    A pytree: the data of both distributions are its leaves, so pass it to jit as an argument. They
    are in memory once, for any number of runs: an episode has the distributions, from which each
    outer step of the run draws its tasks.

    Args:
      tasks: the distribution that a run is meta-trained on.
      held_out: the one that its result is judged on.
      queries: the number of held-out tasks of a run.
    """

    tasks: Tasks
    held_out: Tasks
    queries: Count = dataclasses.field(default=16, metadata={"static": True})

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls, tasks: Tasks, held_out: Tasks | None = None, *, queries: int = 16
    ) -> MetaTrainingRuns:
        """Return meta-training runs on tasks.

        Args:
          tasks: to meta-train on, on the device.
          held_out: to judge the result on, such as tasks of other classes; None: `tasks`, from
            which other tasks are drawn.
          queries: the number of held-out tasks of a run.

        Raises:
          TypeError: for what is no distribution over tasks.
          ValueError: for tasks that are read on the host.
        """
        held_out = tasks if held_out is None else held_out
        for name, part in (("tasks", tasks), ("held_out", held_out)):
            check_tasks(f"MetaTrainingRuns.create({name}=)", part)
            if part.needs_fetch:
                raise ValueError(
                    f"`MetaTrainingRuns.create({name}=)` got a `{type(part).__name__}`, which is "
                    "read on the host before each outer step, but a meta-training run draws its "
                    "tasks inside a compiled program. Use tasks on the device, such as "
                    "`FewShot.from_arrays`."
                )
        return cls(tasks, held_out, queries)

    def label_range(self) -> tuple[int, int] | None:
        """Return the smallest and the largest label of both; None: unknown, or there are none."""
        ranges = [r for r in (self.tasks.label_range(), self.held_out.label_range()) if r]
        return (min(r[0] for r in ranges), max(r[1] for r in ranges)) if ranges else None

    def sample(self, key: jax.Array) -> Episode:
        """Draw a run.

        Returns:
          `support` = the tasks to meta-train on, and `query` = (held-out tasks, keys [queries] of
          those that the result is judged on).
        """
        return Episode(self.tasks, (self.held_out, jax.random.split(key, self.queries)))
