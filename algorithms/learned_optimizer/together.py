"""Several problems side by side: one learned optimizer is trained on a mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.fields import check_fields
from metalearn.algorithms.learned_optimizer.problem import Problem, StepLoss


@dataclasses.dataclass(frozen=True)
class Together(Problem):
    """Several problems side by side, one of each in every task. theta: {name: theta}.

    A learned optimizer that treats each parameter by itself trains them as if each were alone,
    and its eta is judged by all: the way to train one optimizer on a mixture of tasks. A task is
    one of each, so where one part becomes NaN in truncated training, all of that task begin anew.
    """

    parts: Mapping[str, Problem] = dataclasses.field(hash=False)
    # What a part counts in the outer loss; None: all the same. They sum to one.
    weights: Mapping[str, float] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.parts:
            raise ValueError("`Together` takes at least one problem: {name: problem}.")
        if self.weights is not None and self.weights.keys() != self.parts.keys():
            raise ValueError(
                f"`Together` got weights for {sorted(self.weights)} and problems "
                f"{sorted(self.parts)}. Give each problem a weight, or none."
            )

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return {name: theta} and {name: state}."""
        made = {name: part.init(self._key(key, name)) for name, part in self.parts.items()}
        return {n: m[0] for n, m in made.items()}, {n: m[1] for n, m in made.items()}

    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> Any:
        """Return {name: batches}."""
        return {
            name: part.batches(support[name], steps, self._key(key, name))
            for name, part in self.parts.items()
        }

    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Any, key: jax.Array
    ) -> StepLoss:
        """Return the sum of the losses, whose gradients do not mix, and the measure of each."""
        found = {
            n: part.loss(params[n], statistics[n], support[n], batch[n], self._key(key, n))
            for n, part in self.parts.items()
        }
        total = jnp.stack([one.loss for one in found.values()]).sum()
        measures = jnp.stack([self.parts[n].combined(one.measure) for n, one in found.items()])
        return StepLoss(total, measures, {n: one.statistics for n, one in found.items()})

    def combined(self, measure: jax.Array) -> jax.Array:
        """Return the weighted mean of the measures [parts]."""
        return self._weighted(dict(zip(self.parts, measure, strict=True)))

    def validate(
        self, params: Any, statistics: Any, query: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the weighted validation loss, and each part's as "name/validation_loss"."""
        found = {n: p.validate(params[n], statistics[n], query[n]) for n, p in self.parts.items()}
        shown = {f"{n}/validation_loss": loss for n, (loss, _) in found.items()}
        for name, (_, metrics) in found.items():
            shown |= {f"{name}/{key}": value for key, value in metrics.items()}
        return self._weighted({n: loss for n, (loss, _) in found.items()}), shown

    def _weighted(self, measures: Mapping[str, jax.Array]) -> jax.Array:
        weights = self.weights or dict.fromkeys(self.parts, 1.0)
        total = sum(weights.values())
        return jnp.stack([weights[n] / total * value for n, value in measures.items()]).sum()

    def _key(self, key: jax.Array, name: str) -> jax.Array:
        return jax.random.fold_in(key, sorted(self.parts).index(name))

    def check(self, support: Any, horizon: int) -> None:
        """Raise ValueError unless the support has these parts, and each does."""
        found = sorted(support) if isinstance(support, dict) else "no dictionary"
        if found != sorted(self.parts):
            raise ValueError(
                f"The problems are {sorted(self.parts)}, and the tasks bring {found}. Use "
                "`metalearn.datasets.SideBySide` with the same names."
            )
        for name, part in self.parts.items():
            part.check(support[name], horizon)
