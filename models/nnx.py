"""The adapter of Flax NNX: the function that builds a module, as a `Model`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from metalearn._utils.fields import check_fields
from metalearn.model import Model, library_of
from metalearn.models.adapters import WORDS, Mode, flag_name, flags, not_wrapped, shown

# Kinds of variables that are state in Flax, which no call may add; `sow` may use any other kind.
STATE = (nnx.Param, nnx.BatchStat, nnx.Cache, nnx.RngState)
RATES: dict[Any, str] = {nnx.Dropout: "rate", nnx.MultiHeadAttention: "dropout_rate"}
PER_CALL = (nnx.Intermediate, nnx.Perturbation)  # kinds of variables that last for one call


@dataclasses.dataclass(frozen=True)
class NNX(Model):
    """An NNX module, by the function that builds it.

    Params are the `nnx.Param` variables; state is every other variable that `build` creates
    (running statistics, random streams). Both are plain nested dicts. Variables that a call adds
    by `sow` or `perturb` are dropped after it.

    `train` sets the mode of the module by its own `train()` or `eval()`, which set `deterministic`
    and `use_running_average` in all submodules, also where `build` has set them. Boolean attributes
    with another of the usual names (`metalearn.models.adapters`) are set too, and the arguments of
    `set_view` methods. `apply(train=True, dropout=False)` sets the rates of `nnx.Dropout` and of
    flax's attention to 0; it cannot detect a dropout written by hand.

    Args:
      build: random streams -> module; or the class of the module.
      mode: the name of the argument of the module's call that sets the mode, too: "train",
        "training", "is_training", "deterministic", "use_running_average" or "inference"; None: the
        one that it has, which the repr shows. Or a function, train -> keyword arguments of the
        call, such as `no_flag`.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    mode: Mode | str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "build")
        is_module = isinstance(self.build, type) and issubclass(self.build, nnx.Module)
        if not callable(self.build) or (library_of(self.build) and not is_module):
            raise TypeError(not_wrapped("NNX(build=)", self.build, "nnx"))
        try:
            if is_module:  # the signature of an NNX class itself is (*args, **kwargs)
                inspect.signature(self.build.__init__).bind(None, None)  # type: ignore[misc]
            else:
                inspect.signature(self.build).bind(None)
        except TypeError as error:
            name = getattr(self.build, "__name__", type(self.build).__name__)
            raise TypeError(
                f"`NNX(build=)` is called with one argument, the random streams, which `{name}` "
                f"does not take ({error}). Write `NNX(lambda rngs: {name}(..., rngs=rngs))`."
            ) from error
        except ValueError:
            pass  # a function without a signature
        if is_module:
            _ = self._flag

    def __repr__(self) -> str:
        return shown(self, self._flag)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state)."""
        _, params, state = _split(self.build(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(
        self,
        params: Any,
        state: Any,
        inputs: Any,
        *,
        train: bool,
        dropout: bool = True,
        key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Return (outputs, new state)."""
        module, built = self._merge(params, state)
        module = _in_mode(module, train)
        if not dropout:
            _switch_dropout_off(module)
        if key is not None:
            streams: dict[str, Any] = _streams(module, key)
            nnx.reseed(module, policy="match_shape", **streams)  # of stacked layers, one key each
        arguments = flags(self.mode, self._flag, train)
        with warnings.catch_warnings():
            # Flax warns that sown values stay in the module. Here the module is dropped.
            warnings.filterwarnings("ignore", r"(?s)\s*Using 'Module\.(sow|perturb)\(\)' outside")
            outputs = module(inputs, **arguments)
        _, _, new = _split(module)
        return outputs, nnx.to_pure_dict(_built_variables(new, built))

    @functools.cached_property
    def _flag(self) -> str | None:
        """The argument of the call that sets the mode."""
        if callable(self.mode):
            return None
        cls = self.build
        if not isinstance(cls, type):
            cls = type(nnx.eval_shape(lambda: self.build(nnx.Rngs(0))))
        return flag_name(f"NNX(build={cls.__name__})", self.mode, cls.__call__)

    def _merge(self, params: Any, state: Any) -> tuple[Any, nnx.State]:
        """Return (the module with these arrays, the shapes of the state that `build` creates)."""
        abstract = nnx.eval_shape(lambda: self.build(nnx.Rngs(0)))
        graph, param_slots, state_slots = _split(abstract)
        nnx.replace_by_pure_dict(param_slots, params)
        nnx.replace_by_pure_dict(state_slots, state)
        return nnx.merge(graph, param_slots, state_slots), state_slots


def _split(module: Any) -> tuple[Any, nnx.State, nnx.State]:
    """Return (structure, the `nnx.Param` variables, all other variables but the sown ones)."""
    nnx.pop(module, PER_CALL)
    graph, params, others = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    return graph, params, others


def _in_mode(module: Any, train: bool) -> Any:
    """Return the module in the mode of `train`."""
    kind = type(module)  # its methods: an attribute `train` would hide them
    kind.train(module) if train else kind.eval(module)
    words = {word: value == train for word, value in WORDS.items()}
    for _, part in nnx.iter_modules(module):
        for word, value in words.items():
            if isinstance(vars(part).get(word), bool):
                setattr(part, word, value)
    return nnx.view(module, raise_if_not_found=False, **words)


def _switch_dropout_off(module: Any) -> None:
    """Set the dropout rates of all layers of Flax to 0, whatever the arguments of their calls."""
    for _, part in nnx.iter_modules(module):
        for kind, rate in RATES.items():
            if isinstance(part, kind):
                setattr(part, rate, 0.0)


def _streams(module: Any, key: jax.Array) -> dict[str, jax.Array]:
    """Return a key for each random stream of the module, by name."""
    parts = (part for _, part in nnx.iter_graph(module) if isinstance(part, nnx.RngStream))
    names = sorted({part.key.tag for part in parts} - {"default"})
    others = {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}
    return {"default": key, **others}


def _built_variables(new: nnx.State, built: nnx.State) -> nnx.State:
    """Return the variables that `build` creates; ValueError if a call has created state."""
    known = {path for path, _ in nnx.to_flat_state(built)}
    flat = nnx.to_flat_state(new)
    for path, variable in flat:
        if path not in known and isinstance(variable, STATE):
            raise ValueError(
                f"A call of the module makes a `{type(variable).__name__}` of its own, "
                f"{'/'.join(map(str, path))}, and a model's state is there from the beginning. "
                "Make it in the module's `__init__`."
            )
    return nnx.from_flat_state([pair for pair in flat if pair[0] in known])
