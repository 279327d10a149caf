"""Reading safetensors files: the arrays and the metadata of one, or what is wrong with it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping

import numpy as np


def read_tensors(
    path: pathlib.Path, check: Callable[[Mapping[str, str]], None], again: str, foreign: str
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return (metadata, arrays by name) of a safetensors file.

    Args:
      path: of the file.
      check: called with the metadata before arrays are read; raises for a file of another kind.
      again: how to write such a file again, for a message: "export it again".
      foreign: the end of a message on arrays of a type that NumPy has not.

    Raises:
      ValueError: for a file that is no safetensors file, or is damaged, or has arrays of a type
        that NumPy has not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            check(metadata)
            return metadata, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a safetensors file, or is damaged or cut short ({error}). Copy it "
            f"again, or {again}."
        ) from error
    except (AttributeError, TypeError) as error:  # a type of 8 bits, for instance
        raise ValueError(
            f"{path} has arrays of a type that NumPy has not ({error}), and {foreign}"
        ) from error
