"""A type checker for jaxtyping that checks arrays: their shapes and kinds of numbers, nothing else.

Other arguments are left to the checks of the functions themselves, whose messages have tests.
"""

import functools
import inspect
import typing

from jaxtyping import AbstractArray


def check_arrays(function):
    """Return the function with its annotated arrays checked, among arguments and in the result."""
    signature, hints = inspect.signature(function), function.__annotations__

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            check(name, value, hints.get(name))
        result = function(*args, **kwargs)
        check("the result", result, hints.get("return"))
        return result

    return checked


def check(name, value, hint):
    """Raise TypeError if a value is annotated as an array, or a tuple of them, and is another."""
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        for part, part_hint in zip(value, typing.get_args(hint), strict=False):
            check(name, part, part_hint)
    elif isinstance(hint, type) and issubclass(hint, AbstractArray) and not isinstance(value, hint):
        raise TypeError(f"{name} is {getattr(value, 'dtype', value)}{getattr(value, 'shape', '')}")
