"""Reading TensorFlow Datasets (TFDS) without TensorFlow and without a network.

TFDS separates preparing a dataset (download, parse, write records: once) from reading
it. In the array_record file format, reading is random access by index and needs no
TensorFlow. A dataset that is not there is refused at once, with the command that
prepares it: TFDS itself would look for a network for minutes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What `python -m metalearn.datasets.prepare` prepares, without TensorFlow.
PREPARED_HERE = ("omniglot",)


class DatasetNotPreparedError(FileNotFoundError):
    """A TFDS dataset is not on this disk in a form that can be read without TensorFlow."""


def open_source(
    name: str, split: str, *, data_dir: str | None = None, undecoded: Sequence[str] = ()
) -> Sequence[Mapping[str, Any]]:
    """Open a split of a prepared TFDS dataset for random access.

    Args:
      name: the dataset's name in TFDS, such as "omniglot" or "mnist".
      split: a split or slice of one, such as "train" or "train[:100]".
      data_dir: where datasets are; None is TFDS's rule, $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      undecoded: features to leave as stored (an image as its PNG bytes, far faster).

    Raises:
      DatasetNotPreparedError: if the dataset is not there; it says how to get it.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    check_prepared(builder)
    return source(builder, split, undecoded)


def source(builder: Any, split: str, undecoded: Sequence[str] = ()) -> Sequence[Mapping[str, Any]]:
    """Open a split of a TFDS builder whose dataset is known to be prepared."""
    import tensorflow_datasets as tfds

    decoders = {feature: tfds.decode.SkipDecoding() for feature in undecoded}
    return builder.as_data_source(split=split, decoders=decoders)


def examples(records: Any, at_a_time: int = 1024) -> Iterator[Mapping[str, Any]]:
    """Iterate over a source, reading many records per call: far faster than one by one."""
    for start in range(0, len(records), at_a_time):
        yield from records.__getitems__(range(start, min(start + at_a_time, len(records))))


def check_prepared(builder: Any) -> None:
    """Raise `DatasetNotPreparedError` unless a TFDS builder's dataset can be read as it is."""
    found = builder.data_path.exists() and builder.is_prepared()
    if found and builder.info.file_format.value == "array_record":
        return
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
