"""One step of a user's optax optimizer: what it may ask for, and where its result is judged.

Some optimizers look at more than the gradient: Polyak's step size is the loss over the squared
gradient, a plateau is one of losses, a line search evaluates the loss at points of its own. optax
hands that to `update` by name, so an inner loop passes

    value     L(theta_t) (), from the evaluation that the gradient came from, differentiated
              like the gradient itself: a step size that depends on it is in the meta-gradient
    grad      the gradient, once more
    value_fn  params -> L(params) (), one more evaluation for each call
    grad_fn   params, i -> gradient, for `optax.contrib.sam(opaque_mode=True)`
    obj_fn    value_fn by another name, for `optax.contrib.sophia`

each to those that take it. Some optimizers train at one point and are judged at another:
`evaluation_params` says which that is. An optimizer that an inner or the outer loop cannot serve
is refused when its state is made.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from metalearn._utils.trees import nodes
from metalearn.optimizers.averaged import JUDGED_APART, Averaged, including
from metalearn.unroll import ExampleMean

LINE_SEARCHES = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)
OBJECTIVES = (contrib.HutchinsonState, contrib.SophiaState)
_FURTHER: tuple[tuple[Any, str, str], ...] = (
    (
        LINE_SEARCHES,
        "a line search",
        "`optax.lbfgs(learning_rate, linesearch=None)`, or `optax.adam`",
    ),
    (OBJECTIVES, "an estimate of the Hessian (`optax.contrib.sophia`)", "`optax.adam`"),
    (contrib.SAMState, "`optax.contrib.sam(opaque_mode=True)`", "opaque_mode=False"),
)


_SURPLUS = r"(?:unexpected keyword argument|multiple values for argument) '(\w+)'"
_MISSING = r"missing \d+ required keyword-only arguments?: (.*)"


class Evaluated(NamedTuple):
    """What a step knows of its inner loss: all that `update` hands to an optimizer."""

    grads: Any  # like params
    value: jax.Array  # (), the loss
    aux: Any  # of the loss; () where it has none
    value_fn: Callable[[Any], jax.Array]  # params -> loss ()
    grad_fn: Callable[[Any, Any], Any]  # params, number of the call -> gradient


def evaluate(
    grad: Callable[..., Any], loss: Callable[..., Any], params: Any, *others: Any
) -> Evaluated:
    """Take an inner gradient, and the loss's value from the same evaluation.

    Args:
      grad: the one that a step receives.
      loss: params, *others -> (loss (), aux), or an `ExampleMean` of a loss without an aux.
      params: what to differentiate with respect to, any pytree.
      others: further arguments of the loss.
    """
    if isinstance(loss, ExampleMean):
        return _evaluate_mean(grad, loss, params, *others)

    def twice(*args: Any) -> tuple[jax.Array, Any]:
        value, aux = loss(*args)
        return value, (value, aux)

    differentiate = grad(twice, has_aux=True)
    grads, (value, aux) = differentiate(params, *others)
    return Evaluated(
        grads,
        value,
        aux,
        lambda params: loss(params, *others)[0],
        lambda params, _: differentiate(params, *others)[0],
    )


def _evaluate_mean(
    grad: Callable[..., Any], mean: ExampleMean, params: Any, *others: Any
) -> Evaluated:
    """Do the same for a mean over examples, whose aux has an entry for each."""

    def twice(*args: Any) -> tuple[jax.Array, jax.Array]:
        value = mean.loss(*args)
        return value, value

    differentiate = grad(ExampleMean(twice), has_aux=True)
    grads, values = differentiate(params, *others)
    return Evaluated(
        grads,
        values.mean(),
        (),
        lambda params: mean(params, *others),
        lambda params, _: differentiate(params, *others)[0],
    )


def start(optimizer: Any, params: Any) -> Any:
    """Return the state of an inner optimizer; `params` are the model's own tree.

    Raises:
      ValueError: for an optimizer that an inner loop cannot serve, with the way out.
    """
    state = optimizer.init(params)
    _refuse_lookahead(state, "An inner loop")
    return state


def update(optimizer: Any, evaluated: Evaluated, state: Any, params: Any) -> tuple[Any, Any]:
    """Take one step of an inner optimizer: (updates, state).

    Args:
      optimizer: any of optax, or what has its `init` and `update`.
      evaluated: from `evaluate`, at these params.
      state: from `start`, or from the step before.
      params: theta_t, the model's own tree; what does not adapt is an `optax.MaskedNode`.

    Raises:
      TypeError: where the optimizer asks for something else, with the way out.
    """
    extra = {"value": evaluated.value, "grad": evaluated.grads, "value_fn": evaluated.value_fn}
    if any(nodes(state, OBJECTIVES)):
        extra["obj_fn"] = evaluated.value_fn
    if any(nodes(state, contrib.SAMState)):
        extra["grad_fn"] = evaluated.grad_fn
    passes = "An inner loop passes value, grad and value_fn"
    return _call(optimizer, evaluated.grads, state, params, extra, passes)


def evaluation_params(state: Any, params: Any) -> Any:
    """Return the parameters that a run is judged by: those that its optimizer says.

    `averaged` is judged at the average of its iterates. `optax.contrib.schedule_free` takes
    gradients at an interpolation, and is judged at the average (`schedule_free_eval_params`);
    `optax.contrib.sam` moves to adversarial points and comes back.
    All others are judged at `params`, which these return.

    Args:
      state: of the optimizer.
      params: where the gradients are taken.

    Raises:
      ValueError: where such a state is of another tree than `params`.
    """
    for inner in nodes(state, (Averaged, *JUDGED_APART)):
        if isinstance(inner, Averaged):
            params = _merged(_with_last(inner), inner.average, params, "averaged")
            continue
        if isinstance(inner, contrib.ScheduleFreeState):
            params = _merged(_averaged(inner), inner.z, params, "optax.contrib.schedule_free")
            continue
        if inner.cache is not None:
            params = _merged(_came_from(inner), inner.cache, params, "optax.contrib.sam")
        params = evaluation_params(inner.opt_state, params)
    return params


def interpolations(state: Any) -> list[jax.Array]:
    """Return the b1 () of each `optax.contrib.schedule_free` inside an optimizer's state."""
    return [inner.b1 for inner in nodes(state, contrib.ScheduleFreeState)]


def start_outer(optimizer: Any, eta: Any) -> Any:
    """Return the state of an outer optimizer.

    Raises:
      ValueError: for an optimizer that asks for the outer loss at further points, or for
        parameters of its own, with the way out.
    """
    state = optimizer.init(eta)
    _refuse_lookahead(state, "The Trainer")
    for kinds, name, way_out in _FURTHER:
        refused = [s for s in nodes(state, kinds) if not _is_transparent(s)]
        if refused:
            raise ValueError(
                f"The outer optimizer contains {name}, which takes the outer loss or its gradient "
                f"at further points, and an outer step has those at eta alone. Take {way_out}."
            )
    return state


def update_outer(
    optimizer: Any, grads: Any, state: Any, eta: Any, value: jax.Array
) -> tuple[Any, Any]:
    """Take one step of the outer optimizer, with the outer loss () if it takes it."""
    extra = {"value": value, "grad": grads}
    return _call(optimizer, grads, state, eta, extra, "The Trainer passes value and grad")


def _call(
    optimizer: Any, grads: Any, state: Any, params: Any, extra: dict[str, Any], passes: str
) -> tuple[Any, Any]:
    """Call `update` with those extra arguments that it takes."""
    extra = {name: extra[name] for name in extra if _takes(optimizer.update, name)}
    while True:
        try:
            return optimizer.update(grads, state, params, **extra)
        except TypeError as error:
            # A chain takes everything and hands it on to parts that do not, such as `sam`.
            surplus = re.search(_SURPLUS, str(error))
            if surplus and surplus[1] in extra:
                del extra[surplus[1]]
                continue
            missing = re.search(_MISSING, str(error))
            if missing is None:
                raise
            raise TypeError(
                f"The optimizer's `update` asks for {missing[1]}. {passes} to an optimizer whose "
                "`update` takes them, by name or as `**extra_args` (of `optax.MultiSteps`, pass "
                "the object itself). Anything else has to be a part of the optimizer, or of an "
                "`Algorithm` of your own."
            ) from error


def _takes(update: Callable[..., Any], name: str) -> bool:
    extra = list(inspect.signature(update).parameters.values())[3:]  # after those all take
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in extra)


def _is_transparent(state: Any) -> bool:
    return isinstance(state, contrib.SAMState) and state.cache is not None


def _refuse_lookahead(state: Any, who: str) -> None:
    if any(nodes(state, optax.LookaheadState)):
        raise ValueError(
            f"{who} carries one set of parameters, but `optax.lookahead` moves two, fast and slow "
            "ones (`optax.LookaheadParams`), and is judged by the slow. Take the fast optimizer "
            "by itself or, for an average of its iterates, `metalearn.optimizers.averaged`."
        )


def _with_last(state: Averaged) -> Callable[[Any, Any], Any]:
    include = including(state)
    return lambda average, last: include(average, last).astype(jnp.result_type(last))


def _averaged(state: Any) -> Callable[[Any, Any], Any]:
    def averaged(z: Any, y: Any) -> Any:
        return ((y - (1 - state.b1) * z) / state.b1).astype(jnp.result_type(y))

    return averaged


def _came_from(state: Any) -> Callable[[Any, Any], Any]:
    def came_from(kept: Any, now: Any) -> Any:
        return jnp.where(state.steps_since_sync == 0, now, kept)

    return came_from


def _merged(function: Callable[..., Any], kept: Any, params: Any, name: str) -> Any:
    """Apply a function to what an optimizer keeps and params, where it is not masked."""

    def one(kept: Any, param: Any) -> Any:
        if _is_masked(kept):
            return param
        if not jax.tree_util.all_leaves([param]) or jnp.shape(kept) != jnp.shape(param):
            raise ValueError("of another structure, or of other shapes")
        return function(kept, param)

    try:
        return jax.tree.map(one, kept, params, is_leaf=_is_masked)
    except ValueError as error:
        raise ValueError(
            f"`{name}` is judged at parameters of its own, which it keeps as another tree than "
            "the model's (inside `optax.flatten`, say), so they cannot be told apart. Put it on "
            "the outside, or leave the wrapper away."
        ) from error


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
