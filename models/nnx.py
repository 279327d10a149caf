"""A Flax NNX module as a `Model`."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from metalearn._utils.fields import check_fields
from metalearn.model import Model, library_of
from metalearn.models.checks import not_wrapped
from metalearn.models.mode import WORDS, Mode, usual_flags

# What flax takes for state, and no call may add to; a `sow` may be of any other kind.
STATE = (nnx.Param, nnx.BatchStat, nnx.Cache, nnx.RngState)
PASSING = (nnx.Intermediate, nnx.Perturbation)  # of one call alone, wherever they come from


@dataclasses.dataclass(frozen=True)
class NNX(Model):
    """An NNX module, by the function that builds it.

    Params are the `nnx.Param` variables; state is every other variable that `build` makes (running
    statistics, random streams). Both are plain nested dicts. What a call adds by `sow` or `perturb`
    is dropped after it.

    The module is put into the mode of `train` by its own `train()` or `eval()`, which set
    `deterministic` and `use_running_average` in all of it, whatever `build` has set. Attributes of
    the other usual names (`metalearn.models.mode.WORDS`) that are True or False follow, and so does
    what a `set_view` takes. Arguments of the call are those of `mode`; None passes those with the
    usual names, and `no_flag` none.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    mode: Mode | None = None  # what the call takes when training; None: by the usual names

    def __post_init__(self) -> None:
        check_fields(self, "build")
        is_module = isinstance(self.build, type) and issubclass(self.build, nnx.Module)
        if not callable(self.build) or (library_of(self.build) and not is_module):
            raise TypeError(not_wrapped("NNX(build=)", self.build, "nnx"))
        try:
            if is_module:  # whose own signature is that of any class of the library
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
            pass  # of a function without a signature

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state)."""
        _, params, state = _split(self.build(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(
        self, params: Any, state: Any, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Return (outputs, new state)."""
        module, built = self._merge(params, state)
        module = _in_mode(module, train)
        if key is not None:
            streams: dict[str, Any] = _streams(module, key)
            nnx.reseed(module, **streams)
        flags = usual_flags(type(module).__call__, train) if self.mode is None else self.mode(train)
        with warnings.catch_warnings():
            # Flax warns that what is sown stays in the module. Here it does not.
            warnings.filterwarnings("ignore", r"(?s)\s*Using 'Module\.(sow|perturb)\(\)' outside")
            outputs = module(inputs, **flags)
        _, _, new = _split(module)
        return outputs, nnx.to_pure_dict(_of_the_build(new, built))

    def _merge(self, params: Any, state: Any) -> tuple[Any, nnx.State]:
        """Put arrays back into the module, whose structure is built without any."""
        abstract = nnx.eval_shape(lambda: self.build(nnx.Rngs(0)))
        graph, param_slots, state_slots = _split(abstract)
        nnx.replace_by_pure_dict(param_slots, params)
        nnx.replace_by_pure_dict(state_slots, state)
        return nnx.merge(graph, param_slots, state_slots), state_slots


def _split(module: Any) -> tuple[Any, nnx.State, nnx.State]:
    """Return (structure, the `nnx.Param` variables, all others but what was sown)."""
    nnx.pop(module, PASSING)
    graph, params, others = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    return graph, params, others


def _in_mode(module: Any, train: bool) -> Any:
    """Return the module in the mode of `train`."""
    kind = type(module)  # of the class: an attribute `train` would hide the method
    kind.train(module) if train else kind.eval(module)
    words = {word: value == train for word, value in WORDS.items()}
    for _, part in nnx.iter_modules(module):
        for word, value in words.items():
            if isinstance(vars(part).get(word), bool):
                setattr(part, word, value)
    return nnx.view(module, raise_if_not_found=False, **words)


def _streams(module: Any, key: jax.Array) -> dict[str, jax.Array]:
    """Return a key for each random stream of the module, by its name."""
    parts = (part for _, part in nnx.iter_graph(module) if isinstance(part, nnx.RngStream))
    names = sorted({part.key.tag for part in parts} - {"default"})
    others = {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}
    return {"default": key, **others}


def _of_the_build(new: nnx.State, built: nnx.State) -> nnx.State:
    """Return those variables that `build` makes; ValueError where a call has made state."""
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
