"""Which optimizers of optax a meta-gradient passes through, and which need a remedy.

    python -m metalearn.experiments.benchmarks.optimizers [--only adam contrib.muon]

Eight inner steps on loss(p) = sum(a (p - t)^2), a matrix and a vector, outer loss sum((p - 1)^2),
and its derivative by reverse mode in the first p and in the weights a. Three sets of weights make
three kinds of inner gradient:

    ordinary   no entry is zero
    a zero     one entry of each leaf is exactly zero: a dead ReLU, a padded token
    all zero   every entry is: a task whose support is masked

Each optimizer is tested unchanged, with `eps_root=1e-8` if it has this argument, and wrapped in
`metalearn.optimizers.differentiable_at_zero`, in float32. A cell is "finite", or the kinds for
which the meta-gradient is not, or for which the update is not ("update"). The last column shows, in
float64, whether the wrapped optimizer has bit-equal values, and equal derivatives up to rounding
wherever they are finite.

Optimizers that need the loss (`value`, `grad`, `value_fn`) receive it. Those with a while loop have
no reverse mode, and are tested by forward mode.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from metalearn.experiments.benchmarks.horizons import table
from metalearn.optimizers.differentiable import differentiable_at_zero

STEPS = 8
RATE = 0.1
EPS_ROOT = 1e-8
SAME = 1e-8  # largest error of a derivative, by its largest entry

Make = Callable[..., optax.GradientTransformation]


class Row(NamedTuple):
    """An optimizer to test.

    make: () -> optimizer; with the argument `eps_root` if the optimizer has it.
    extra: the names of the extra arguments of its update.
    """

    make: Make
    extra: tuple[str, ...] = ()


def rated(make: Make, *args: Any, **kwargs: Any) -> Row:
    """Return an optimizer with its arguments, by default a learning rate."""
    return Row(functools.partial(make, *(args or (RATE,)), **kwargs))


def scaling(make: Make, *args: Any, **kwargs: Any) -> Row:
    """Return a transformation of gradients, followed by a step along its result."""

    @functools.wraps(make)
    def chained(**more: Any) -> optax.GradientTransformation:
        return optax.chain(make(*args, **kwargs, **more), optax.sgd(RATE))

    return Row(chained)


def optimizers() -> dict[str, Row]:
    """Return every optimizer, clipping and scaling of optax and optax.contrib, by name."""
    plain = (
        "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb "
        "lars lion nadam nadamw novograd optimistic_adam optimistic_adam_v2 "
        "optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd signum sm3 yogi"
    )
    scalings = (
        "centralize identity normalize_by_update_norm scale_by_adadelta scale_by_adam "
        "scale_by_adamax scale_by_adan scale_by_amsgrad scale_by_belief "
        "scale_by_distance_over_gradients scale_by_factored_rms scale_by_lbfgs scale_by_lion "
        "scale_by_novograd scale_by_optimistic_gradient scale_by_param_block_norm "
        "scale_by_param_block_rms scale_by_radam scale_by_rms scale_by_rss scale_by_sign "
        "scale_by_sm3 scale_by_stddev scale_by_trust_ratio scale_by_yogi"
    )
    of_contrib = (
        "acprop ademamix adopt cocob dadapt_adamw dog dowg galore madgrad muon prodigy "
        "schedule_free_adamw schedule_free_sgd simplified_ademamix"
    )
    scalings_of_contrib = (
        "normalize scale_by_acprop scale_by_ademamix scale_by_adopt scale_by_cocob "
        "scale_by_galore scale_by_simplified_ademamix"
    )
    value = ("value",)
    rows = {name: rated(getattr(optax, name)) for name in plain.split()}
    rows |= {
        "adafactor, factored": rated(optax.adafactor, min_dim_size_to_factor=2),
        "lbfgs, no line search": rated(optax.lbfgs, linesearch=None),
        "lbfgs": Row(optax.lbfgs, ("value", "grad", "value_fn")),
        "noisy_sgd": rated(optax.noisy_sgd, seed=0),
        "polyak_sgd": rated(optax.polyak_sgd)._replace(extra=value),
        "rmsprop, centered": rated(optax.rmsprop, centered=True),
        "rmsprop, eps outside": rated(optax.rmsprop, eps_in_sqrt=False),
        "sgd, momentum": rated(optax.sgd, momentum=0.9),
    }
    rows |= {name: scaling(getattr(optax, name)) for name in scalings.split()}
    rows |= {
        "adaptive_grad_clip": scaling(optax.adaptive_grad_clip, 0.1),
        "add_decayed_weights": scaling(optax.add_decayed_weights, 0.1),
        "add_noise": scaling(optax.add_noise, 0.01, 0.55, seed=0),
        "apply_every": scaling(optax.apply_every, 2),
        "apply_if_finite": Row(lambda: optax.apply_if_finite(optax.adam(RATE), 2)),
        "clip": scaling(optax.clip, 1.0),
        "clip_by_block_rms": scaling(optax.clip_by_block_rms, 1.0),
        "clip_by_global_norm": scaling(optax.clip_by_global_norm, 1.0),
        "ema": scaling(optax.ema, 0.9),
        "keep_params_nonnegative": scaling(optax.keep_params_nonnegative),
        "MultiSteps": Row(lambda: optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation()),
        "scale_by_backtracking_linesearch": Row(
            lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
            ("value", "grad", "value_fn"),
        ),
        "scale_by_polyak": scaling(optax.scale_by_polyak)._replace(extra=value),
        "scale_by_rprop": Row(functools.partial(optax.scale_by_rprop, RATE)),
        "scale_by_zoom_linesearch": Row(
            lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)),
            ("value", "grad", "value_fn"),
        ),
        "trace": scaling(optax.trace, 0.9),
        "zero_nans": scaling(optax.zero_nans),
    }
    named = {name: rated(getattr(contrib, name)) for name in of_contrib.split()}
    named |= {name: scaling(getattr(contrib, name)) for name in scalings_of_contrib.split()}
    ascent = optax.chain(contrib.normalize(), optax.sgd(0.05))
    named |= {
        "mechanize": Row(lambda: contrib.mechanize(optax.sgd(RATE))),
        "momo": rated(contrib.momo)._replace(extra=value),
        "momo_adam": rated(contrib.momo_adam)._replace(extra=value),
        "reduce_on_plateau": Row(
            lambda: optax.chain(optax.sgd(RATE), contrib.reduce_on_plateau()), value
        ),
        "sam": Row(lambda: contrib.sam(optax.sgd(RATE), ascent)),
        "scale_by_madgrad": Row(functools.partial(contrib.scale_by_madgrad, RATE)),
        "schedule_free": Row(lambda: contrib.schedule_free(optax.sgd(RATE), RATE)),
        "sophia": rated(contrib.sophia)._replace(extra=("obj_fn",)),
        "split_real_and_imaginary": Row(lambda: contrib.split_real_and_imaginary(optax.adam(RATE))),
    }
    return rows | {f"contrib.{name}": row for name, row in named.items()}


# Not tested. These have the derivative of their parts, or of a constant factor, or are tested as a
# part (scale_by_muon takes only matrices):
MADE_OF_OTHERS = frozenset(
    "chain conditionally_mask conditionally_transform contrib.scale_by_muon flatten freeze "
    "inject_hyperparams inject_stateful_hyperparams masked measure_with_ema multi_transform "
    "named_chain partition scale scale_by_learning_rate scale_by_schedule selective_transform "
    "set_to_zero snapshot stateless stateless_with_tree_map with_extra_args_support".split()
)
# these take a gradient per example, or parameters of their own:
NOT_INNER = frozenset(("contrib.dpsgd", "contrib.differentially_private_aggregate", "lookahead"))

START = {"w": np.arange(1.0, 7.0).reshape(3, 2) / 7, "b": np.array([0.3, -0.2])}
TARGET = {"w": np.arange(6.0, 0.0, -1.0).reshape(3, 2) / 3, "b": np.array([-0.4, 0.7])}
KINDS: dict[str, dict[str, np.ndarray]] = {
    "ordinary": {name: np.ones_like(x) for name, x in START.items()},
    "a zero": {name: 1.0 - (np.arange(x.size) == 0).reshape(x.shape) for name, x in START.items()},
    "all zero": {name: np.zeros_like(x) for name, x in START.items()},
}


def trained(
    optimizer: optax.GradientTransformation, extra: Sequence[str], params: Any, weights: Any
) -> Any:
    """Return the parameters after `STEPS` steps from `params`."""
    extended = optax.with_extra_args_support(optimizer)
    target, factors = (
        jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), tree, params)
        for tree in (TARGET, weights)
    )

    def loss(params: Any) -> jax.Array:
        terms = jax.tree.map(lambda p, t, a: (a * (p - t) ** 2).sum(), params, target, factors)
        return jnp.stack(jax.tree.leaves(terms)).sum()

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        known = {"value": value, "grad": grads, "value_fn": loss, "obj_fn": loss}
        arguments = {name: known[name] for name in extra}
        updates, next_state = extended.update(grads, state, params, **arguments)
        next_state = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), next_state, state)
        return (optax.apply_updates(params, updates), next_state), None

    state = jax.tree.map(jnp.asarray, extended.init(params))
    return jax.lax.scan(step, (params, state), None, STEPS)[0][0]


class Outcome(NamedTuple):
    """The result of an optimizer for one kind of inner gradient.

    params: after the last step, flat.
    slopes: d outer loss / d (first parameters, weights), flat.
    """

    params: np.ndarray
    slopes: np.ndarray


def outcomes(
    optimizer: optax.GradientTransformation, extra: Sequence[str], dtype: Any, forward: bool = False
) -> dict[str, Outcome]:
    """Return the outcome for each kind of inner gradient, by reverse or forward mode."""

    def outer(params: Any, weights: Any) -> tuple[jax.Array, Any]:
        last = trained(optimizer, extra, params, weights)
        terms = jax.tree.map(lambda p: ((p - 1) ** 2).sum(), last)
        return jnp.stack(jax.tree.leaves(terms)).sum(), last

    results = {}
    differentiate = jax.jacfwd if forward else jax.jacrev
    differentiated = jax.jit(differentiate(outer, argnums=(0, 1), has_aux=True))
    for kind, weights in KINDS.items():
        inputs = jax.tree.map(lambda x: jnp.asarray(x, dtype), (START, weights))
        slopes, last = differentiated(*inputs)
        results[kind] = Outcome(_flat(last), _flat(slopes))
    return results


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def finite(by_kind: Mapping[str, Outcome]) -> str:
    """Say for which kinds of inner gradient an update and its derivative are finite."""
    bad = {
        kind: "update" if not np.isfinite(outcome.params).all() else "derivative"
        for kind, outcome in by_kind.items()
        if not (np.isfinite(outcome.params).all() and np.isfinite(outcome.slopes).all())
    }
    if not bad:
        return "finite"
    if len(bad) == len(by_kind) and set(bad.values()) == {"derivative"}:
        return "NaN always"
    return "NaN: " + ", ".join(
        kind if what == "derivative" else f"{kind} (update)" for kind, what in bad.items()
    )


def same(ours: Mapping[str, Outcome], theirs: Mapping[str, Outcome], rounding: float = 0.0) -> str:
    """Say whether values are equal up to `rounding`, and derivatives where they are finite."""
    for kind, expected in theirs.items():
        if not np.allclose(ours[kind].params, expected.params, rounding, rounding, equal_nan=True):
            return f"other values: {kind}"
        if np.isfinite(expected.slopes).all():
            error = np.abs(ours[kind].slopes - expected.slopes).max()
            if not error <= SAME * np.abs(expected.slopes).max():
                return f"other derivatives: {kind}, {error:.1g}"
    return "same"


COLUMNS = ("as it is", "eps_root=1e-8", "wrapped", "asks for", "wrapped against as it is")


def cells(row: Row, rounding: float = 0.0) -> list[str]:
    """Return the cells of an optimizer's row.

    Args:
      row: the optimizer.
      rounding: by how much values with and without the wrapper may differ; 0: bit-equal.
    """
    forward = not has_reverse_mode(row)

    def tried(optimizer: optax.GradientTransformation, dtype: Any) -> dict[str, Outcome]:
        return outcomes(optimizer, row.extra, dtype, forward)

    takes = "eps_root" in inspect.signature(row.make).parameters
    wrapped = differentiable_at_zero(row.make())
    with jax.enable_x64(True):
        values = tried(wrapped, jnp.float64), tried(row.make(), jnp.float64)
        compared = same(*values, rounding)
    return [
        finite(tried(row.make(), jnp.float32)),
        finite(tried(row.make(eps_root=EPS_ROOT), jnp.float32)) if takes else "",
        finite(tried(wrapped, jnp.float32)),
        ", ".join(row.extra + ("forward mode",) * forward),
        compared,
    ]


def has_reverse_mode(row: Row) -> bool:
    """Say whether the optimizer's update is differentiated backwards; a while loop is not."""
    try:
        params = jax.tree.map(jnp.float32, START)
        jax.eval_shape(
            jax.jacrev(lambda p: trained(row.make(), row.extra, p, KINDS["ordinary"])), params
        )
    except ValueError as error:
        if "Reverse-mode differentiation does not work for lax.while_loop" in str(error):
            return False
        raise
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Test every optimizer and print a Markdown table."""
    rows = optimizers()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(rows), choices=list(rows), metavar="NAME")
    options = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)
    jax.config.update("jax_disable_most_optimizations", True)  # small programs, compiled once
    print(f"optax {optax.__version__}, jax {jax.__version__}\n", flush=True)
    print(table("optimizer", COLUMNS, {}), flush=True)
    for name in options.only:
        print(f"| `{name}` | {' | '.join(cells(rows[name]))} |", flush=True)


if __name__ == "__main__":
    main()
