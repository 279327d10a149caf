"""Reading TensorFlow Datasets (TFDS) without TensorFlow and without a network.

TFDS separates preparing a dataset (download, parse, write records: once) from reading
it. In the array_record file format, reading is random access by index and needs no
TensorFlow. A dataset that is not there is refused at once, with the command that
prepares it: TFDS itself would look for a network for minutes first. One of which a file
is missing, cut short or overwritten is refused by the name of the file.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# What `python -m metalearn.datasets.prepare` prepares, without TensorFlow.
PREPARED_HERE = ("omniglot",)


class DatasetNotPreparedError(FileNotFoundError):
    """A TFDS dataset is not on this disk in a form that can be read without TensorFlow."""


class DamagedDatasetError(OSError):
    """A TFDS dataset is on this disk, but a file of it is missing or cannot be read."""


def open_source(
    name: str, split: str, *, data_dir: str | None = None, undecoded: Sequence[str] = ()
) -> Records:
    """Open a split of a prepared TFDS dataset for random access.

    Args:
      name: the dataset's name in TFDS, such as "omniglot" or "mnist".
      split: a split or slice of one, such as "train" or "train[:100]".
      data_dir: where datasets are; None is TFDS's rule, $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      undecoded: features to leave as stored (an image as its PNG bytes, far faster).

    Raises:
      DatasetNotPreparedError: if the dataset is not there; it says how to get it.
      DamagedDatasetError: if a file of it is missing; and when a record cannot be read.
      ValueError: if TFDS knows no such dataset or split.
    """
    builder = builder_of(name, data_dir)
    check_prepared(builder)
    return source(builder, split, undecoded)


def builder_of(name: str, data_dir: str | None = None) -> Any:
    """Return TFDS's builder of a dataset.

    Raises:
      ValueError: where TFDS knows no dataset of that name.
      DamagedDatasetError: where there is one, but its description cannot be read.
    """
    import tensorflow_datasets as tfds

    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    return described(name, root, lambda: tfds.builder(name, data_dir=data_dir))


def described(name: str, root: pathlib.Path, make: Callable[[], Any]) -> Any:
    """Return the builder that `make` returns. See `builder_of`."""
    from google.protobuf import json_format

    reading = ValueError, AssertionError, ImportError, RuntimeError, OSError, json_format.Error
    try:
        return make()
    except reading as error:
        why = str(error).partition("\n")[0]
        if name.isidentifier() and (root / name).is_dir():
            raise _damaged(name, root / name, root, "its description", why) from error
        raise ValueError(
            f"TFDS has no dataset called {name!r} ({why}). They are listed at "
            "https://www.tensorflow.org/datasets/catalog, and those of your own are found where "
            "they are prepared: pass data_dir= or set TFDS_DATA_DIR."
        ) from error


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a split, read at random; those that cannot be read are refused by file."""

    builder: Any  # TFDS's
    split: str
    stored: Any  # its data source

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} records, and none has the index {index}.")
        return self._reading(self.stored.__getitem__, index)

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """Return several records at once."""
        return self._reading(self.stored.__getitems__, indices)

    @property
    def dataset_info(self) -> Any:
        """Return what TFDS knows of the dataset, its `features` among it."""
        return self.stored.dataset_info

    def _reading(self, read: Any, what: Any) -> Any:
        try:
            return read(what)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise _damaged_part(self.builder, f"its split {self.split!r}", str(error)) from error


def source(builder: Any, split: str, undecoded: Sequence[str] = ()) -> Records:
    """Open a split of a TFDS builder whose dataset is known to be prepared."""
    import tensorflow_datasets as tfds

    decoders = {feature: tfds.decode.SkipDecoding() for feature in undecoded}
    _check_files(builder, split)
    return Records(builder, split, builder.as_data_source(split=split, decoders=decoders))


def _check_files(builder: Any, split: str) -> None:
    """Raise unless a split is one of a dataset's, and all of its files are there."""
    if not builder.info.splits:
        raise _damaged_part(builder, "dataset_info.json", "it is missing or empty")
    try:
        files = builder.info.splits[split].filepaths
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"The dataset {builder.name!r} has no split {split!r}. There are: "
            f"{', '.join(sorted(builder.info.splits))}; and slices, such as 'train[:100]'."
        ) from error
    for file in files:
        if not file.is_file():
            raise _damaged_part(builder, file.name, "there is no such file")


def _damaged_part(builder: Any, what: str, why: str) -> DamagedDatasetError:
    folder = pathlib.Path(builder.data_dir)
    root = folder.parents[len(builder.info.full_name.split("/")) - 1]  # name/config/version
    return _damaged(builder.name, folder, root, what, why)


def _damaged(name: str, folder: Any, root: Any, what: str, why: str) -> DamagedDatasetError:
    return DamagedDatasetError(
        f"The dataset {name!r} in {folder} is damaged: {what} cannot be read ({why}). Delete that "
        f"directory and prepare it again, with: {_command(name, root)}."
    )


def examples(records: Any, at_a_time: int = 1024) -> Iterator[Mapping[str, Any]]:
    """Iterate over a source, reading many records per call: far faster than one by one."""
    for start in range(0, len(records), at_a_time):
        yield from records.__getitems__(range(start, min(start + at_a_time, len(records))))


def check_prepared(builder: Any) -> None:
    """Raise `DatasetNotPreparedError` unless a TFDS builder's dataset can be read as it is."""
    found = builder.data_path.exists() and builder.is_prepared()
    if found and builder.info.file_format.value == "array_record":
        return
    if not found and builder.data_path.exists():
        raise _damaged_part(builder, "dataset_info.json", "it is missing or empty")
    name, where = builder.name, builder.data_dir_root
    if found:
        raise DatasetNotPreparedError(
            f"The dataset {name!r} in {where} is stored as {builder.info.file_format.value}, which "
            f"only TensorFlow reads; metalearn reads array_record. Prepare it a second time, into "
            f"another directory: {_command(name, 'ANOTHER_DIR')}, and pass data_dir=ANOTHER_DIR."
        )
    raise DatasetNotPreparedError(
        f"The dataset {name!r} is not prepared: there is no {builder.data_dir}. Prepare it once "
        f"with: {_command(name, where)}; or, if it is elsewhere, pass data_dir= or set the "
        f"environment variable TFDS_DATA_DIR before Python starts."
    )


def _command(name: str, data_dir: Any) -> str:
    if name in PREPARED_HERE:
        return f"python -m metalearn.datasets.prepare {name} --data-dir={data_dir}"
    return f"tfds build {name} --data_dir={data_dir} --file_format=array_record"
