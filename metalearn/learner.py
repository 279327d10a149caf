"""A learner: a model after the inner loop on one support set, ready to predict.

`Algorithm.adapt` returns one. It is a pytree, so that learners of several tasks come out of a
`vmap`, go into another, and are saved like any other tree:

    learner = maml.adapt(eta, support, key)
    logits = learner.predict(images)

    learners = jax.vmap(maml.adapt, in_axes=(None, 0, 0))(eta, supports, keys)
    logits = jax.vmap(Learner.predict)(learners, images)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.trees import paths
from metalearn.unroll import Eta


def _static() -> Any:
    return dataclasses.field(metadata={"static": True}, repr=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
    """A model adapted to a support set. `Algorithm.adapt` makes it.

    Args:
      params: the model's own tree, those parameters that the inner loop leaves fixed included.
      statistics: the model's mutable state, such as running statistics.
      key: (), of random layers other than dropout, which is off.
      steps: inner steps taken.
      apply: params, statistics, inputs, key -> outputs: `Algorithm.predict`.
    """

    params: Any
    statistics: Any
    key: jax.Array = dataclasses.field(repr=False)
    steps: int = dataclasses.field(metadata={"static": True})
    apply: Callable[[Any, Any, Any, jax.Array], Any] = _static()

    def predict(self, inputs: Any) -> Any:
        """Return the model's outputs for inputs [n, ...], as the outer loss sees those of queries.

        Compiled, once for each shape. Inputs are like those of the support set: images of
        `FewShot` are floats in 0..1. With the batch-normalisation policy "transductive" the
        outputs depend on the whole batch, so predict all queries of a task in one call.
        """
        return _predict(self, inputs)


@jax.jit
def _predict(learner: Learner, inputs: Any) -> Any:
    return learner.apply(learner.params, learner.statistics, inputs, learner.key)


def check_key(what: str, key: Any) -> None:
    """Raise TypeError for a seed where a key is asked for.

    Args:
      what: the argument, as its user writes it: "MAML.adapt(key=)".
      key: its value.
    """
    if not isinstance(key, jax.Array):
        raise TypeError(f"`{what}` takes a key, not {key!r:.80}. Of a seed: `jax.random.key(0)`.")


def check_support(what: str, support: Any) -> None:
    """Raise ValueError or TypeError for a support set without examples, or of no arrays.

    Args:
      what: the argument, as its user writes it: "MAML.adapt(support=)".
      support: its value.
    """
    leaves = jax.tree_util.tree_leaves_with_path(support)
    for path, leaf in leaves:
        where = f"{what[:-1]}){jax.tree_util.keystr(path)}" if path else what
        try:
            shape = leaf.shape
        except AttributeError:
            raise TypeError(
                f"`{where}` is a {type(leaf).__name__}, but a support set is arrays: make each "
                "list one array, such as `np.asarray(labels)`."
            ) from None
        if 0 in shape:
            raise ValueError(
                f"`{where}` has the shape {list(shape)}: it is empty, and there is nothing to "
                "adapt to. Pass an example at least."
            )
    if not leaves:
        raise ValueError(
            f"`{what}` is {support!r:.80}, which holds no arrays: there is nothing to adapt to. "
            "Pass the examples of a task, such as (inputs, labels)."
        )


def check_eta_of(what: str, eta: Eta, shapes: Eta) -> None:
    """Raise ValueError for an eta of another algorithm or model.

    Args:
      what: the algorithm's class: "MAML".
      eta: the meta-parameters, arrays.
      shapes: those that the algorithm initialises, arrays or their shapes.
    """
    way_out = (
        f"Pass the eta that this {what} has learned (`Trainer.learned(state)`), or build it with "
        "the model that this eta is of"
    )
    ours, theirs = (dict(zip(paths(t), jax.tree.leaves(t), strict=True)) for t in (shapes, eta))
    for path, leaf in ours.items():
        if path in theirs and jnp.shape(theirs[path]) != jnp.shape(leaf):
            raise ValueError(
                f"`{what}.adapt(eta=)` is of another model: {path} has the shape "
                f"{list(jnp.shape(theirs[path]))}, and in this one {list(jnp.shape(leaf))}. "
                f"{way_out}."
            )
    missing, extra = (sorted(a.keys() - b.keys()) for a, b in ((ours, theirs), (theirs, ours)))
    if missing or extra:
        lacks = [f"lacks {', '.join(missing)}"] if missing else []
        has = [f"has {', '.join(extra)}, which this one has not"] if extra else []
        raise ValueError(
            f"`{what}.adapt(eta=)` is of another model or algorithm: it {' and '.join(lacks + has)}"
            f". {way_out}."
        )
    structures = jax.tree.structure(eta), jax.tree.structure(shapes)
    if structures[0] != structures[1]:  # type: ignore[operator]
        raise ValueError(
            f"`{what}.adapt(eta=)` is a {type(eta).__name__} with the right leaves, and it is a "
            f"{type(shapes).__name__}, a tree like that of `{what}.init(key)`: {structures[1]}."
        )
