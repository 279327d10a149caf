"""The adapter of Equinox: the function that builds a module, as a `Model`.

An Equinox module is written for one example, `module(x)`, and its user vmaps it. So does the
adapter, over an axis with a name, which `eqx.nn.BatchNorm` needs: with state s and keys k_i,

    outputs_i, s' = module(inputs_i, s, key=k_i)      i = 1 .. batch

Whether the call takes a state and a key is read off the module: a state if any layer has an
`eqx.nn.StateIndex`, a key if there is an argument `key`. Equinox is an optional dependency,
imported when an adapter is made: `pip install 'metalearn-jax[equinox]'`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.fields import check_fields
from metalearn._utils.trees import is_differentiable
from metalearn.model import Model, library_of
from metalearn.models.adapters import Mode, flag_name, flags, not_wrapped, shown


@dataclasses.dataclass(frozen=True)
class Equinox(Model):
    """An Equinox module, by the function that builds it.

    Params are the floating-point arrays of the module, as a nested dict of its attributes; `module`
    puts them back. State are the arrays of `eqx.nn.State`, and the module's other arrays (integers,
    random keys). What is no array is static.

    `train` sets the `inference` attribute of all submodules (`eqx.nn.inference_mode`), and
    `dropout=False` that of every `eqx.nn.Dropout`.

    Args:
      build: key -> module, or (module, `eqx.nn.State`) as from `eqx.nn.make_with_state`; or the
        class of the module, if it takes a key alone.
      axis: the name of the batch axis that the module is vmapped over, which its batch
        normalisation has as `axis_name`; None: the module takes a batch, and is called as it is.
      mode: the name of the argument of the module's call that sets the mode, too: "train",
        "training", "is_training", "deterministic", "use_running_average" or "inference"; None: the
        one that it has, which the repr shows. Or a function, train -> keyword arguments of the
        call, such as `no_flag`.
    """

    build: Callable[[jax.Array], Any]
    axis: str | None = "batch"
    mode: Mode | str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "build")
        eqx = _equinox()
        is_module = isinstance(self.build, type) and issubclass(self.build, eqx.Module)
        if not callable(self.build) or (library_of(self.build) and not is_module):
            raise TypeError(not_wrapped("Equinox(build=)", self.build, "equinox"))
        try:
            _ = self._takes_keyword
        except TypeError as error:
            name = getattr(self.build, "__name__", type(self.build).__name__)
            raise TypeError(
                f"`Equinox(build=)` is called with one argument, a random key, which `{name}` does "
                f"not take ({error}). Write `Equinox(lambda key: {name}(..., key=key))`."
            ) from error

    def __repr__(self) -> str:
        return shown(self, self._flag)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state)."""
        return self._split(*self._built(key))

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
        module, variables = self.module(params, state)
        module = _equinox().nn.inference_mode(module, value=not train)
        if not dropout:
            module = _without_dropout(module)
        names = inspect.signature(type(module).__call__).parameters
        arguments = flags(self.mode, self._flag, train)

        def call(x: Any, variables: Any, key: Any) -> tuple[Any, Any]:
            with_key = {"key": key} if "key" in names else {}
            if variables is None:
                return module(x, **with_key, **arguments), None
            return module(x, variables, **with_key, **arguments)

        if self.axis is None:
            outputs, new = call(inputs, variables, key)
        else:
            batch = jax.tree.leaves(inputs)[0].shape[0]
            keys = None if key is None else jax.random.split(key, batch)
            outputs, new = self._over_examples(call)(inputs, variables, keys)
        _, new_state = self._split(module, new)
        return outputs, new_state

    def module(self, params: Any, state: Any = ()) -> tuple[Any, Any]:
        """Return (the Equinox module with these arrays, its `eqx.nn.State`; None without one).

        Args:
          params: from `init`, or adapted.
          state: from `init`, or from `apply`. It may be left away for a module without state.
        """
        skeleton, variables = self._skeleton
        leaves, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
        state = state or {}
        merged = []
        for path, leaf in leaves:
            if _is_array(leaf):
                source = params if is_differentiable(leaf) else state["arrays"]
                for name in _names(path):
                    source = source[name]
                merged.append(source)
            else:
                merged.append(leaf)
        if variables is not None:
            _, markers = variables.tree_flatten()
            values = [state["state"][name] for name in _marked(markers)]
            variables = type(variables).tree_unflatten(markers, values)
        return jax.tree.unflatten(treedef, merged), variables

    @functools.cached_property
    def _takes_keyword(self) -> bool:
        """Whether `build` takes its key by name alone."""
        try:
            signature = inspect.signature(self.build)
        except ValueError:  # a function without a signature
            return False
        try:
            signature.bind(None)
            return False
        except TypeError:
            signature.bind(key=None)
            return True

    def _built(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (module, `eqx.nn.State`), or (module, None) where no layer has a state."""
        eqx = _equinox()
        built = self.build(key=key) if self._takes_keyword else self.build(key)  # type: ignore[call-arg]
        module, variables = built if isinstance(built, tuple) else (built, None)
        module = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, module)
        if variables is not None:
            return module, variables
        module, variables = eqx.nn.make_with_state(lambda: module)()
        return module, variables if variables.tree_flatten()[1] else None

    @functools.cached_property
    def _skeleton(self) -> tuple[Any, Any]:
        """The module and its state, with shapes in place of arrays."""
        return _equinox().filter_eval_shape(self._built, jax.random.key(0))

    @functools.cached_property
    def _flag(self) -> str | None:
        """The argument of the call that sets the mode."""
        if callable(self.mode):
            return None
        cls = type(self._skeleton[0])
        names = inspect.signature(cls.__call__).parameters
        own = self.mode is None and "inference" in names and names["inference"].default is None
        if own:  # as in Equinox's own layers: None takes the attribute, which is set already
            return None
        return flag_name(f"Equinox(build={cls.__name__})", self.mode, cls.__call__)

    def _split(self, module: Any, variables: Any) -> tuple[Any, Any]:
        """Return (params, state) of a module and its `eqx.nn.State`."""
        params: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(module):
            if _is_array(leaf):
                _put(params if is_differentiable(leaf) else others, _names(path), leaf)
        state = {"arrays": others} if others else {}
        if variables is not None:
            values, markers = variables.tree_flatten()
            state["state"] = dict(zip(_marked(markers), values, strict=True))
        return params, state or ()

    def _over_examples(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call` over a batch of inputs, with one state for all; errors name the way out."""

        def mapped(inputs: Any, variables: Any, keys: Any) -> Any:
            axes = (0, None, None if keys is None else 0)
            over = jax.vmap(call, axes, out_axes=(0, None), axis_name=self.axis)
            try:
                return over(inputs, variables, keys)
            except NameError as error:
                if "unbound axis name" not in str(error):
                    raise
                raise NameError(
                    f"A layer of the module reduces over an axis of another name than the "
                    f"adapter's, {self.axis!r} ({error}). Say its name: `Equinox(..., axis=...)`, "
                    "as in the layer's `axis_name`."
                ) from error
            except ValueError as error:
                if "out_axes" not in str(error):
                    raise
                raise ValueError(
                    "The state after a call differs from example to example, but a model has one "
                    "state for a batch. Take the mean over the batch in the layer, "
                    f"`jax.lax.pmean(value, {self.axis!r})`; or let the module take a batch: "
                    "`Equinox(..., axis=None)`."
                ) from error

        return mapped


def _equinox() -> Any:
    """Import Equinox, which is optional."""
    try:
        import equinox
    except ImportError as error:
        raise ImportError(
            "`metalearn.models.Equinox` adapts modules of Equinox, which is not installed. "
            "`pip install 'metalearn-jax[equinox]'`."
        ) from error
    return equinox


def _without_dropout(module: Any) -> Any:
    """Return the module with every `eqx.nn.Dropout` in evaluation mode."""
    nn = _equinox().nn

    def is_dropout(part: Any) -> bool:
        return isinstance(part, nn.Dropout)

    return jax.tree.map(
        lambda part: nn.inference_mode(part) if is_dropout(part) else part,
        module,
        is_leaf=is_dropout,
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _names(path: Iterable[Any]) -> list[str]:
    """Return the entries of a path of JAX as texts: attributes, indices, keys."""
    return [jax.tree_util.keystr((entry,), simple=True) for entry in path]


def _put(tree: dict[str, Any], names: list[str], leaf: Any) -> None:
    *folders, last = names
    for name in folders:
        tree = tree.setdefault(name, {})
    tree[last] = leaf


def _marked(markers: Iterable[Any]) -> list[str]:
    """Return a name for each value of a state: its marker if that is a text, or its number."""
    return [m if isinstance(m, str) else str(i) for i, m in enumerate(markers)]
