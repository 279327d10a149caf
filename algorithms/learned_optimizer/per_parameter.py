"""A learned optimizer: a small network with shared weights, applied to every parameter.

    x_t = features of g_0 .. g_t, theta_t and t                  metalearn.algorithms: Feature
    d, m = network(eta, x_t)                                     metalearn.algorithms: Network
    u_t = base(g_t, ...) - step_scale d exp(magnitude_scale m)

As all parameters share the weights, an optimizer trained on small models can be applied to large
ones (Andrychowicz et al. 2016, arXiv:1606.04474; Metz et al. 2022, arXiv:2203.11860). The two
scales make it trainable: outputs of about one are small steps.

- base: the update that the network corrects, such as a `TunedRule` of Adam. A network alone starts
  without useful updates, and its training may diverge; with a nominal term it starts as, and stays
  close to, a working optimizer (STAR, Harrison et al. 2022, arXiv:2209.11208).
- factors: features of one value that multiply the network's term: `ParameterScale` makes steps
  relative to the tensor, `ReciprocalRoot` preconditions them as STAR does.

Memory: the slots of the features, which are residuals of every inner step in reverse mode, and one
matrix [parameters, features] per tensor for the matmuls. Tensors have any rank and floating-point
dtype; masked leaves (`optax.MaskedNode`, None) are left unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.fields import check_fields
from metalearn._utils.trees import precision
from metalearn.algorithms.learned_optimizer.features import (
    FactoredMoments,
    Feature,
    Gradient,
    Momenta,
    ParameterValue,
    SecondMoments,
    StepFeatures,
    Tensor,
    evaluate,
    init_slots,
    width,
)
from metalearn.algorithms.learned_optimizer.networks import Network, PointwiseMLP
from metalearn.algorithms.learned_optimizer.update_rule import UpdateRule, check_params
from metalearn.unroll import Eta

DEFAULT_FEATURES = (
    Gradient(),
    Momenta(),
    SecondMoments(),
    FactoredMoments(),
    ParameterValue(),
    StepFeatures(),
)


class PerParameterState(NamedTuple):
    """The state of `PerParameter`. Trees have the structure of the parameters.

    steps: (), int32: updates so far.
    slots: tree, for each tensor the slots of every feature.
    factors: tree, for each tensor the slots of every factor.
    hidden: tree, for each tensor the recurrent state of the network.
    base: the state of the base.
    """

    steps: jax.Array
    slots: Any
    factors: Any
    hidden: Any
    base: Any


@dataclasses.dataclass(frozen=True)
class PerParameter(UpdateRule):
    """Learn a network that updates every parameter. eta: {"network": ..., "base": ...}.

    Updates have each parameter's dtype and are computed in float32, or float64 for float64
    parameters.

    Args:
      features: the inputs of the network.
      network: from features to a direction d and a magnitude m.
      step_scale: of the step d exp(magnitude_scale m).
      magnitude_scale: of m.
      base: an UpdateRule whose update the network corrects, such as a `TunedRule`; None: zero.
      factors: features of one value, by which the network's step is multiplied.
    """

    features: tuple[Feature, ...] = DEFAULT_FEATURES
    network: Network = PointwiseMLP()
    step_scale: float = 1e-3
    magnitude_scale: float = 1e-3
    base: UpdateRule | None = None
    factors: tuple[Feature, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "features", "network", "base")
        parts = [*self.features, *self.factors] if isinstance(self.features, tuple) else [None]
        if not all(isinstance(part, Feature) for part in parts):
            raise TypeError(
                "`PerParameter(features=, factors=)` take tuples of features, such as "
                f"`(Gradient(), Momenta())`, not {self.features!r} and {self.factors!r}."
            )
        if not isinstance(self.network, Network):
            raise TypeError(
                f"`PerParameter(network=)` takes a network, such as `PointwiseMLP()`, not "
                f"{self.network!r}."
            )
        if self.base is not None and not isinstance(self.base, UpdateRule):
            raise TypeError(
                f"`PerParameter(base=)` takes an UpdateRule, not {type(self.base).__name__}. Of an "
                "optax optimizer: `TunedRule(optax.adam, {'learning_rate': Hyperparameter(...)})`."
            )
        if not self.features:
            raise ValueError("A network needs features: give it one, such as `Gradient()`.")
        for factor in self.factors:
            if factor.size(0) != 1:
                raise ValueError(
                    f"A factor is a feature of one value, and {factor} has {factor.size(0)}. Take "
                    "one such as `ParameterScale()`."
                )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Return the network's weights, and the eta of the base where there is one."""
        network, base = jax.random.split(key)
        eta = {"network": self.network.init(network, width(self.features))}
        return eta if self.base is None else {**eta, "base": self.base.init(base)}

    def optimizer(self, eta: Eta) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer. Its derivative is finite where gradients are exactly zero."""
        base = optax.with_extra_args_support(
            optax.set_to_zero() if self.base is None else self.base.optimizer(eta["base"])
        )

        def init(params: Any) -> PerParameterState:
            check_params(params, "PerParameter")
            params = jax.tree.map(jnp.asarray, params)
            return PerParameterState(
                jnp.zeros((), jnp.int32),
                jax.tree.map(functools.partial(init_slots, self.features), params),
                jax.tree.map(functools.partial(init_slots, self.factors), params),
                jax.tree.map(lambda p: self.network.start(p.shape, precision(p)), params),
                base.init(params),
            )

        def update(
            grads: Any, state: PerParameterState, params: Any = None, **extra: Any
        ) -> tuple[Any, PerParameterState]:
            check_params(params, "PerParameter")
            nominal, base_state = base.update(grads, state.base, params, **extra)
            update_tensor = functools.partial(self._update, eta["network"], state.steps)
            trees = nominal, grads, state.slots, state.factors, state.hidden
            results = jax.tree.map(update_tensor, params, *trees)

            def part(i: int) -> Any:
                return jax.tree.map(lambda _, result: result[i], params, results)

            steps = optax.safe_increment(state.steps)
            return part(0), PerParameterState(steps, part(1), part(2), part(3), base_state)

        return optax.GradientTransformationExtraArgs(init, update)

    def _update(
        self, weights: Any, step: jax.Array, param: Any, nominal: Any, grad: Any, *slots: Any
    ) -> tuple[jax.Array, Any, Any, Any]:
        """Return a tensor's update, and its next slots, factors' slots and recurrent state.

        `slots` are the tensor's (slots of features, slots of factors, recurrent state).
        """
        dtype = precision(param)
        nominal, grad, wide = (jnp.asarray(x, dtype) for x in (nominal, grad, param))
        tensor = Tensor(grad, wide, step, jnp.zeros((0, *grad.shape), dtype))
        feature_slots, x = evaluate(self.features, slots[0], tensor)
        weights = jax.tree.map(lambda w: jnp.asarray(w, dtype), weights)
        outputs, hidden = self.network.apply(weights, slots[2], jnp.moveaxis(x, 0, -1))
        change = self.step_scale * outputs[..., 0] * jnp.exp(self.magnitude_scale * outputs[..., 1])
        factors = []
        for factor, slot in zip(self.factors, slots[1], strict=True):
            slot, value = factor(slot, tensor)
            factors.append(slot)
            change = change * value[0]
        update = (nominal - change).astype(jnp.result_type(param))
        return update, feature_slots, tuple(factors), hidden
