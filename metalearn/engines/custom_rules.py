"""The derivative rules that an inner loss brings with it, and which of them are derivatives.

`jax.custom_jvp` and `jax.custom_vjp` let a function say what its derivative is, and it need not
be one: straight-through estimators, clipped and reversed gradients, surrogate gradients. The
engines differentiate the inner gradient once more as it stands, whatever it is. Only a short cut
that assumes a symmetric Jacobian (`metalearn.engines.mixed_flow.forward_over_reverse`) has to
know, and this is where it asks. A rule counts as a derivative if

- it is one of JAX's own that are known to be (relu, logaddexp, the determinant, ...);
- or it was tried (`rule_probe`), and is one wherever it was;
- or it cannot be told by trying, and the user declares it to be one.

No rule that was tried and is none is believed, whoever declares it. Rules by implicit
differentiation (`jax.lax.custom_root`, `custom_linear_solve`) are derivatives where their solver
has converged, which no trial can know of another place.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from metalearn._utils.trees import is_differentiable
from metalearn.engines.rule_probe import Trial, Verdict, trial

ALL = "*"

JAX = os.path.join(os.path.dirname(jax.__file__), "_src")


def _of_jax(path: str, *names: str) -> dict[str, tuple[str, ...]]:
    return {os.path.join(JAX, *path.split("/")): names}


# Functions of JAX whose rules are derivatives, at kinks too: they compute the value by the function
# itself. Others are tried like anybody's: hyp1f1, for one, leaves two of its arguments out.
TRUSTED = {
    **_of_jax("nn/functions.py", "relu", "relu6", "_softmax", "log1mexp"),
    **_of_jax("lax/other.py", "logaddexp", "logaddexp2"),
    **_of_jax("numpy/linalg.py", "_det", "_slogdet_lu", "_slogdet_qr", "_slogdet_small"),
    **_of_jax("scipy/special.py", "logit", "xlogy", "xlog1py", "_xlogx", "log_ndtr"),
}
PER_ARGUMENT = os.path.join(JAX, "custom_derivatives.py")  # `defjvps` of such a function
DIRECT_SOLVES = tuple({**_of_jax("numpy/linalg.py"), **_of_jax("lax/linalg.py")})
HIGHER = "jax._src.numpy."
OF_MIXED_FLOW = os.path.join(os.path.dirname(__file__), "mixed_flow")


class Rule(NamedTuple):
    """A function with a derivative rule of its own, and what is known of it."""

    name: str
    place: str  # "file.py:12", or ""
    trial: Trial

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return f"`{self.name}`{place}: {self.trial.reason}"


class Plan(NamedTuple):
    """Of an inner gradient's Jacobian, what may be taken for symmetric."""

    # Why nothing may: rules that are no derivatives, and that what is differentiated passes.
    rules: tuple[Rule, ...]
    # Of the loss's other inputs, those whose derivative does not commute: a rule is none in them.
    backwards: frozenset[int] = frozenset()


def plan(
    jaxpr: core.Jaxpr, theta: Sequence[int], others: Sequence[int], declared: Sequence[str] = ()
) -> Plan:
    """Look at the rules that an inner loss brings.

    Args:
      jaxpr: of the loss; what it closes over is among its inputs.
      theta: the numbers of the inputs that the inner gradient is with respect to.
      others: those of the other inputs that may carry a derivative.
      declared: names of functions whose rules the user says are derivatives; "*" is all.

    Raises:
      ValueError: where a rule is declared to be a derivative that was tried and is none.
    """
    known: dict[Any, Rule] = {}

    def untrue(varied: Iterable[int], check: bool = False) -> tuple[Rule, ...]:
        chosen = set(varied)
        flags = [number in chosen for number in range(len(jaxpr.invars))]
        uses, _ = _uses(jaxpr, flags)
        rules = {}
        for use in uses:
            key = id(use.equation), use.varied
            known.setdefault(key, _rule(use))
            if not _believed(known[key], declared, check):
                rules[str(known[key])] = known[key]
        return tuple(rules.values())

    if not untrue([*theta, *others]):
        return Plan(())
    rules = untrue(theta, check=True)
    if rules:
        return Plan(rules)
    forward = [number for number in others if not untrue([*theta, number])]
    rules = untrue([*theta, *forward])
    return Plan(rules, frozenset(others) - frozenset(forward))


def _believed(rule: Rule, declared: Sequence[str], check: bool) -> bool:
    """Say whether a rule counts as a derivative."""
    if rule.trial.verdict is Verdict.DERIVATIVE:
        return True
    if rule.name not in declared and ALL not in declared:
        return False
    if check and rule.trial.verdict is Verdict.NO_DERIVATIVE:
        raise ValueError(
            f"`true_rules` declares the rule of `{rule.name}` a true derivative, but "
            f"{rule.trial.reason}. Take it out of `true_rules`: its inner gradients are then "
            "differentiated as they stand, by reverse over reverse."
        )
    return rule.trial.verdict is Verdict.UNKNOWN and rule.trial.forward


def listed(rules: Sequence[Rule]) -> str:
    """Return the rules as a message names them."""
    return "; ".join(map(str, rules))


def check_names(engine: str, names: Any) -> None:
    """Raise ValueError unless `names` is a tuple of names of functions."""
    if isinstance(names, tuple) and all(isinstance(name, str) and name for name in names):
        return
    raise ValueError(
        f"`{engine}(true_rules={names!r})`: it is a tuple of names of functions whose derivative "
        "rules are true derivatives, such as true_rules=('flash_attention',), or ('*',) for all."
    )


class _Use(NamedTuple):
    """Where a rule is used."""

    jaxpr: core.Jaxpr
    equation: core.JaxprEqn
    varied: tuple[bool, ...]  # which inputs of the equation are differentiated


def _uses(jaxpr: core.Jaxpr, varied: Sequence[bool]) -> tuple[list[_Use], list[bool]]:
    """Return where a jaxpr, and what it calls, uses rules that are not known to be derivatives.

    Also which outputs depend on its varied inputs by way of floating-point numbers: none is left
    out, some may not.
    """
    depends = dict(zip(jaxpr.invars, varied, strict=True))
    uses: list[_Use] = []

    def flag(atom: Any) -> bool:
        is_variable = not isinstance(atom, core.Literal)
        return is_variable and depends.get(atom, False) and is_differentiable(atom.aval)

    for equation in jaxpr.eqns:
        flags = [flag(atom) for atom in equation.invars]
        outputs = [any(flags)] * len(equation.outvars)
        if equation.primitive.name == "stop_gradient":
            outputs = [False] * len(outputs)
        elif _brings_rule(equation):
            if any(flags) and not _trusted(equation):
                uses.append(_Use(jaxpr, equation, tuple(flags)))
        elif any(flags):
            inside, outputs = _inside(equation, flags)
            uses += inside
        depends.update(zip(equation.outvars, outputs, strict=True))
    return uses, [flag(atom) for atom in jaxpr.outvars]


def _inside(equation: core.JaxprEqn, flags: list[bool]) -> tuple[list[_Use], list[bool]]:
    """Return `_uses` of what an equation calls."""
    called = list(core.jaxprs_in_params(equation.params))
    uses: list[_Use] = []
    outputs = [any(flags)] * len(equation.outvars)
    name = equation.primitive.name
    if name == "scan":
        (body,) = called
        carried = _unstacked(equation.outvars, body.outvars)
        consts = _unstacked(equation.invars, body.invars) - carried
        while True:  # until no more of what is carried depends
            uses, after = _uses(body, flags)
            carry = [a or b for a, b in zip(flags[consts:], after[:carried], strict=False)]
            if carry == flags[consts : consts + carried]:
                return uses, after
            flags = [*flags[:consts], *carry, *flags[consts + carried :]]
    for jaxpr in called:
        inputs = flags[1:] if name == "cond" else flags
        known = name in ONE_TO_ONE and len(inputs) == len(jaxpr.invars)
        inside, after = _uses(jaxpr, inputs if known else [True] * len(jaxpr.invars))
        uses += inside
        if known and len(called) == 1:
            outputs = after
    return uses, outputs


def _unstacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Count a scan's variables that are not stacked over its steps: those come first."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)


ONE_TO_ONE = ("jit", "pjit", "closed_call", "checkpoint", "remat", "remat2", "cond")
RULES = (
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "custom_linear_solve",
    "custom_lin",
    "custom_transpose_call",
    "linear_call",
    "call_hi_primitive",
)


def _brings_rule(equation: core.JaxprEqn) -> bool:
    """Say whether an equation's derivative is not JAX's own; of a primitive, too."""
    return equation.primitive.name in RULES or not _is_of_jax(equation.primitive)


def _is_of_jax(primitive: core.Primitive) -> bool:
    return primitive in _primitives(len(sys.modules))


@functools.lru_cache(maxsize=1)
def _primitives(modules: int) -> frozenset[core.Primitive]:
    """Return the primitives that modules of JAX define; `modules`: how many were imported."""
    del modules
    of_jax = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "jax"]
    values = (value for module in of_jax for value in list(vars(module).values()))
    return frozenset(value for value in values if isinstance(value, core.Primitive))


def _trusted(equation: core.JaxprEqn) -> bool:
    """Say whether an equation's rule is one of JAX's own that are known to be derivatives."""
    name, params = equation.primitive.name, equation.params
    if name == "custom_jvp_call":
        function, rule = _debug_info(params["call_jaxpr"]), params["jvp_jaxpr_fun"].debug_info
        known = function.func_name in TRUSTED.get(_file(function), ())
        return known and _file(rule) in (_file(function), PER_ARGUMENT)
    if name == "custom_linear_solve":
        return _file(_debug_info(params["jaxprs"].solve)) in DIRECT_SOLVES
    if name == "call_hi_primitive":
        return type(_higher(equation)).__module__.startswith(HIGHER)
    return False


def _rule(use: _Use) -> Rule:
    """Return what is known of a rule, where it is used."""
    equation = use.equation
    name, place = _named(equation)
    if equation.primitive.name == "custom_linear_solve" or name in ("_custom_root", "CustomRoot"):
        return Rule(name, place, Trial(Verdict.UNKNOWN, _IMPLICIT))
    if equation.params.get("symbolic_zeros") is True and not _is_inner_gradient(equation):
        return Rule(name, place, Trial(Verdict.UNKNOWN, _SYMBOLIC))
    return Rule(name, place, trial(*use))


def _is_inner_gradient(equation: core.JaxprEqn) -> bool:
    """Return whether an equation is an inner gradient of `MixedFlow`, whose rule is right."""
    info = _debug_info(equation.params.get("call_jaxpr") or equation.params.get("fun_jaxpr"))
    return os.path.dirname(_file(info)) == OF_MIXED_FLOW


_IMPLICIT = "implicit differentiation, a derivative only where the solver has converged"
_SYMBOLIC = "its rule looks at which arguments are differentiated (symbolic_zeros)"


def _named(equation: core.JaxprEqn) -> tuple[str, str]:
    """Return the name of the function that brings a rule, and where it is written."""
    params = equation.params
    if equation.primitive.name == "custom_linear_solve":
        info = _debug_info(params["jaxprs"].solve)
    elif equation.primitive.name == "call_hi_primitive":
        return type(_higher(equation)).__name__, ""
    else:
        info = _debug_info(params.get("call_jaxpr") or params.get("fun_jaxpr"))
    if info is None:
        return equation.primitive.name, ""
    return info.func_name, os.path.basename(_source(info))


def _higher(equation: core.JaxprEqn) -> Any:
    return equation.params["_prim"]


def _debug_info(closed: Any) -> Any:
    return None if closed is None else getattr(closed, "jaxpr", closed).debug_info


def _source(info: Any) -> str:
    """Return "/path/file.py:12" of what debug info describes."""
    return (info.func_src_info or "").rpartition(" at ")[2]


def _file(info: Any) -> str:
    return "" if info is None else _source(info).rpartition(":")[0]
