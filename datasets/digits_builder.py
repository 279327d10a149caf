"""scikit-learn's handwritten digits as a TFDS dataset, prepared without a network.

1,797 digits of 8 x 8 pixels, values 0 to 16, half a megabyte shipped inside scikit-learn (a part of
UCI's Optical Recognition of Handwritten Digits, Alpaydin & Kaynak 1998). Prepared in a second in
the cache directory, without output; several processes may do so at once, and the result of the
first to finish is used.

Importing this module imports TFDS.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets.public_api as tfds

from metalearn.datasets.reading import described


class SklearnDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[misc,call-arg]
    """`sklearn_digits`: image [8, 8, 1] uint8 in 0..16, label 0..9."""

    name = "sklearn_digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)
        label = tfds.features.ClassLabel(num_classes=10)
        return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's 8 x 8 handwritten digits.",
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = data.images.astype(np.uint8)[..., None]
        for i, (image, label) in enumerate(zip(images, data.target, strict=True)):
            yield i, {"image": image, "label": int(label)}


def prepared(root: pathlib.Path) -> SklearnDigits:
    """Return the builder of `sklearn_digits` in `root`, prepared first if necessary."""
    if not _target(root).exists():
        _prepare(root, _target(root))
    return described(SklearnDigits.name, root, lambda: SklearnDigits(data_dir=str(root)))


def _target(root: pathlib.Path) -> pathlib.Path:
    return root / SklearnDigits.name / str(SklearnDigits.VERSION)


def discard(root: pathlib.Path) -> None:
    """Remove the prepared dataset in `root`, complete or not."""
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        with contextlib.suppress(FileNotFoundError):  # another process was first
            os.rename(_target(root), pathlib.Path(scratch) / "damaged")


def _prepare(root: pathlib.Path, target: pathlib.Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        draft = SklearnDigits(data_dir=scratch)
        with _quiet():
            draft.download_and_prepare(file_format="array_record")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(draft.data_dir, target)
        except OSError:  # another process was first, with an equal copy
            if not target.exists():
                raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the output and the progress bars of TFDS."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
