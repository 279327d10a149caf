"""From a text to tokens: what is read, and how it is cut into integers.

Bytes need no training, no file and no unknown token: 256 of them write any text. A
tokenizer of your own is a function from a string to integers, with its vocabulary's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from metalearn.datasets.reading import examples, open_source


class Tokenizer(NamedTuple):
    """A function from a text to integers in 0 .. vocabulary - 1."""

    encode: Callable[[str], np.ndarray]  # str -> [n] integers
    vocabulary: int

    def __call__(self, text: str) -> np.ndarray:
        """Encode, and raise ValueError where the result is no [n] of such integers."""
        tokens = np.asarray(self.encode(text))
        good = tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
        if not good or (tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocabulary):
            found = f"{tokens.dtype}{list(tokens.shape)}"
            if good:
                found += f" with values from {tokens.min()} to {tokens.max()}"
            raise ValueError(
                f"The tokenizer returned {found}, but tokens are a one-dimensional array of "
                f"integers in 0 .. vocabulary - 1 = {self.vocabulary - 1}. Let `encode` return ids "
                "alone, and `vocabulary` count all of them, special tokens included."
            )
        return tokens


def _utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


BYTES = Tokenizer(_utf8, 256)


def read_text(
    name: str = "tiny_shakespeare",
    split: str = "train",
    *,
    feature: str = "text",
    data_dir: str | None = None,
) -> str:
    r"""Read a text of TensorFlow Datasets, its records joined by newlines.

    Args:
      name: the dataset's name in TFDS, such as "tiny_shakespeare" or "lm1b".
      split: a split or slice of one, such as "train" or "train[:1000]".
      feature: the feature that holds the text.
      data_dir: where datasets are; None is TFDS's rule, $TFDS_DATA_DIR or
        ~/tensorflow_datasets.

    Raises:
      DatasetNotPreparedError: if the dataset is not there; it says how to get it.
      ValueError: if its records have no such feature.
    """
    records = open_source(name, split, data_dir=data_dir)
    return "\n".join(_text(record, name, feature) for record in examples(records))


def _text(record: object, name: str, feature: str) -> str:
    assert isinstance(record, dict)
    value = record.get(feature)
    if not isinstance(value, bytes | str):
        raise ValueError(
            f"The dataset {name!r} has no text feature {feature!r}. Its features are "
            f"{', '.join(sorted(record))}: name the one that holds the text with feature=."
        )
    return value.decode() if isinstance(value, bytes) else value
