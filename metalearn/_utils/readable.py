"""Readable defaults: what `help`, a signature and a repr show for functions and optimizers.

The repr of a function, and of an optax optimizer, is an address, which tells a reader nothing and
differs from process to process. `readable`, over a dataclass, shows the name of a function;
`described` builds an optimizer that shows how it was built:

    >>> described(optax.sgd, 0.4)
    sgd(0.4)

And tables of text, `aligned`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import optax

T = TypeVar("T")

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def described(
    make: Callable[..., optax.GradientTransformation], *args: Any, **options: Any
) -> optax.GradientTransformation:
    """Return `make(*args, **options)`, an optax optimizer whose repr is that call."""
    optimizer = make(*args, **options)
    values = [*map(repr, args), *(f"{name}={value!r}" for name, value in options.items())]
    text = f"{make.__name__}({', '.join(values)})"
    kind: Any = type(type(optimizer).__name__, (type(optimizer),), {"__repr__": lambda self: text})
    return kind(*optimizer)


def readable(cls: type[T]) -> type[T]:
    """Decorate a dataclass: its repr and its signature show functions by name.

    >>> @readable
    ... @dataclasses.dataclass(frozen=True)
    ... class Network:
    ...     activation: Callable = re.sub
    >>> Network(), inspect.signature(Network)
    (Network(activation=sub), <Signature (activation: 'Callable' = sub) -> None>)
    """
    fields = [field for field in dataclasses.fields(cls) if field.repr]  # type: ignore[arg-type]

    def shown(self: Any) -> str:
        values = (f"{field.name}={show(getattr(self, field.name))}" for field in fields)
        return f"{type(self).__qualname__}({', '.join(values)})"

    cls.__repr__ = shown  # type: ignore[method-assign, assignment]
    init: Any = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)
    parameters = [
        parameter.replace(default=_Shown(parameter.default))
        if _is_named(parameter.default)
        else parameter
        for parameter in signature.parameters.values()
    ]
    init.__signature__ = signature.replace(parameters=parameters)
    return cls


def show(value: Any) -> str:
    """Return the repr of a value, of a function its name; no address in either.

    >>> show(functools.partial(optax.adam, eps=1e-6)), show({"loss": re.sub})
    ('partial(adam, eps=1e-06)', "{'loss': sub}")
    """
    if isinstance(value, functools.partial):
        options = [f"{name}={show(option)}" for name, option in value.keywords.items()]
        return f"partial({', '.join([show(value.func), *map(show, value.args), *options])})"
    if _is_named(value):
        return value.__name__
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {show(item)}' for key, item in value.items())}}}"
    return ADDRESS.sub("", repr(value))


def _is_named(value: Any) -> bool:
    """Say whether a value is a function, or like `jax.jit` something that took its name."""
    return callable(value) and not isinstance(value, type) and hasattr(value, "__name__")


class _Shown(NamedTuple):
    """A default of a signature, for its repr; a call is a call of the default."""

    value: Any

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.value(*args, **options)

    def __repr__(self) -> str:
        return show(self.value)


def aligned(rows: Sequence[Sequence[str]], left: int | None = None) -> list[str]:
    """Return the lines of a table.

    Args:
      rows: of cells, all of one length.
      left: how many columns are aligned to the left, the others to the right; None: all.

    >>> aligned([("name", "n"), ("a", "10")], left=1)
    ['name   n', 'a     10']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = list(zip(row, widths, strict=True))
        split = len(cells) if left is None else left
        padded = [cell.ljust(width) for cell, width in cells[:split]]
        padded += [cell.rjust(width) for cell, width in cells[split:]]
        lines.append("  ".join(padded).rstrip())
    return lines
