"""Reading TensorFlow Datasets (TFDS) without TensorFlow and without a network.

TFDS separates preparing a dataset (download, parse, write records: once) from reading
it. In the array_record file format, reading is random access by index and needs no
TensorFlow. A missing dataset is refused at once, with the command that prepares it: TFDS itself
would try the network for minutes first. If a file of a dataset is missing, truncated or
overwritten, the error names the file.

The description of a dataset names the Python class of each feature, and TFDS would import the
module of an unknown class. A dataset that names classes outside TFDS is refused before TFDS opens
it, so that reading a dataset executes no code that came with it.

Decoded arrays are cached between runs (`cached`). Decoding 32,460 drawings takes seconds and
reading the decoded array milliseconds, so the array is stored as one .npy file. The file is written
under a temporary name and then renamed, so concurrent processes never read an incomplete one; its
name contains everything that the content depends on, so an outdated one is never read. A file that
cannot be read (truncated by a full disk, for instance), or holds an array of another type or shape
than requested, is built again, with a warning. Arrays of Python objects (pickle), which can execute
code, are refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# The datasets that `python -m metalearn.datasets.prepare` prepares, without TensorFlow.
PREPARED_HERE = ("omniglot",)

# The files from which TFDS builds the features of a dataset, and the keys of their classes.
DESCRIPTIONS = ("features.json", "dataset_info.json")
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
FOLDERS = ("", "*/", "*/*/")  # a dataset is in NAME/[CONFIG/]VERSION


class DatasetNotPreparedError(FileNotFoundError):
    """A TFDS dataset is missing, or in a file format that only TensorFlow reads."""


class DamagedDatasetError(OSError):
    """A file of a prepared TFDS dataset is missing or cannot be read."""


def open_source(
    name: str, split: str, *, data_dir: str | None = None, undecoded: Sequence[str] = ()
) -> Records:
    """Open a split of a prepared TFDS dataset for random access.

    Args:
      name: the dataset's name in TFDS, such as "omniglot" or "mnist".
      split: a split or slice of one, such as "train" or "train[:100]".
      data_dir: the directory of datasets; None is TFDS's default, $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      undecoded: features to return as stored (an image as its PNG bytes, far faster).

    Raises:
      DatasetNotPreparedError: if the dataset is missing, with the command that prepares it.
      DamagedDatasetError: if a file is missing, or names a class outside TFDS; and if a record
        cannot be read.
      ValueError: if TFDS knows no such dataset or split.
    """
    builder = builder_of(name, data_dir)
    check_prepared(builder)
    return source(builder, split, undecoded)


def builder_of(name: str, data_dir: str | None = None) -> Any:
    """Return TFDS's builder of a dataset.

    Raises:
      ValueError: if TFDS knows no dataset of that name.
      DamagedDatasetError: if the description of the dataset cannot be read, or names a class
        outside TFDS.
    """
    import tensorflow_datasets as tfds

    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    # With data_dir TFDS reads only the directory whose classes have been checked.
    return described(name, root, lambda: tfds.builder(name, data_dir=str(root)))


def described(name: str, root: pathlib.Path, make: Callable[[], Any]) -> Any:
    """Return the builder that `make` returns. See `builder_of`."""
    from google.protobuf import json_format
    from tensorflow_datasets.core import naming

    # TypeError and those after it: for descriptions that are JSON of another structure.
    errors: tuple[type[Exception], ...] = (
        *(ValueError, AssertionError, ImportError, RuntimeError, OSError, json_format.Error),
        *(TypeError, LookupError, AttributeError),
    )
    try:
        parsed, options = naming.parse_builder_name_kwargs(name)
    except errors as error:
        raise _unknown(name, str(error).partition("\n")[0]) from error
    if parsed.namespace:
        raise _unknown(name, "a name with a namespace is of datasets that are not on this disk")
    if options.get("config") in (".", ".."):
        raise _unknown(name, "no config has such a name")
    _check_classes(name, root, parsed.name)
    try:
        return make()
    except errors as error:
        why = str(error).partition("\n")[0]
        if (root / parsed.name).is_dir():
            raise _damaged(name, root / parsed.name, root, "its description", why) from error
        raise _unknown(name, why) from error


def _unknown(name: str, why: str) -> ValueError:
    return ValueError(
        f"TFDS has no dataset called {name!r} ({why}). They are listed at "
        "https://www.tensorflow.org/datasets/catalog, and those of your own are found where "
        "they are prepared: pass data_dir= or set TFDS_DATA_DIR."
    )


def _check_classes(name: str, root: pathlib.Path, folder: str) -> None:
    """Raise DamagedDatasetError if a dataset names a class outside TFDS, which TFDS would import.

    All configs and versions are checked, as TFDS chooses which of them it opens.
    """
    for pattern in (part + file for part in FOLDERS for file in DESCRIPTIONS):
        for path in sorted((root / folder).glob(pattern)):
            try:
                text = path.read_text("utf-8", errors="replace")
                foreign = next((c for c in _classes(text) if not _of_tfds(c)), None)
            except RecursionError as error:
                raise _damaged(name, path.parent, root, path.name, "nested too deeply") from error
            except (ValueError, OSError):
                continue  # not JSON: TFDS refuses the file itself
            if foreign is not None:
                raise DamagedDatasetError(
                    f"The dataset {name!r} in {path.parent} names the class {foreign[:200]!r} in "
                    f"{path.name}, and to read it TFDS would import that module, and so run it. "
                    "metalearn runs no code that a dataset names: the features of one are classes "
                    "of `tensorflow_datasets.` only. Delete that directory if you do not know "
                    "where it comes from. Data of your own: prepare them with features of TFDS, or "
                    "read them with TFDS yourself and make arrays of them."
                )


def _classes(text: str) -> Iterator[str]:
    """Yield the names of classes in a description, including JSON inside its strings."""
    pairs = json.JSONDecoder(object_pairs_hook=_Pairs)  # duplicate keys are kept
    pending: list[Any] = [pairs.decode(text)]
    while pending:
        value = pending.pop()
        if isinstance(value, _Pairs):
            yield from (v for k, v in value if k in CLASS_KEYS and isinstance(v, str) and "." in v)
            pending += [v for _, v in value]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            try:
                pending.append(pairs.decode(value))
            except ValueError:
                continue  # a string that is not JSON


class _Pairs(list):  # type: ignore[type-arg]
    """The key-value pairs of a JSON object."""


def _of_tfds(name: str) -> bool:
    """Say whether a class is in a module of TFDS, without importing the module."""
    import tensorflow_datasets as tfds

    if not re.fullmatch(r"tensorflow_datasets(\.[A-Za-z_][A-Za-z0-9_]*){2,}", name):
        return False
    module = pathlib.Path(tfds.__file__).parent.joinpath(*name.split(".")[1:-1])
    return module.with_suffix(".py").is_file() or (module / "__init__.py").is_file()


@dataclasses.dataclass(frozen=True)
class Records:
    """Random access to the records of a split; an error for a damaged record names the dataset.

    Args:
      builder: TFDS's builder of the dataset.
      split: the split, or a slice of one.
      stored: TFDS's data source of the split.
    """

    builder: Any
    split: str
    stored: Any

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} records, and none has the index {index}.")
        return self._read(self.stored.__getitem__, index)

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """Return several records at once."""
        return self._read(self.stored.__getitems__, indices)

    @property
    def dataset_info(self) -> Any:
        """TFDS's description of the dataset, such as its `features`."""
        return self.stored.dataset_info

    def _read(self, read: Callable[[Any], Any], index: Any) -> Any:
        try:
            return read(index)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise _damaged_part(self.builder, f"its split {self.split!r}", str(error)) from error


def source(builder: Any, split: str, undecoded: Sequence[str] = ()) -> Records:
    """Open a split of a TFDS builder whose dataset has been checked by `check_prepared`."""
    import tensorflow_datasets as tfds

    decoders = {feature: tfds.decode.SkipDecoding() for feature in undecoded}
    _check_files(builder, split)
    return Records(builder, split, builder.as_data_source(split=split, decoders=decoders))


def _check_files(builder: Any, split: str) -> None:
    """Raise an error unless the dataset has this split, and all files of it exist."""
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
        f"directory and prepare it again, with: {prepare_command(name, root)}."
    )


def examples(records: Any, chunk: int = 1024) -> Iterator[Mapping[str, Any]]:
    """Iterate over a source, reading `chunk` records per call: far faster than single records."""
    for start in range(0, len(records), chunk):
        yield from records.__getitems__(range(start, min(start + chunk, len(records))))


def check_prepared(builder: Any) -> None:
    """Raise DatasetNotPreparedError unless the dataset of a TFDS builder can be read."""
    prepared = builder.data_path.exists() and builder.is_prepared()
    if prepared and builder.info.file_format.value == "array_record":
        return
    if not prepared and builder.data_path.exists():
        raise _damaged_part(builder, "dataset_info.json", "it is missing or empty")
    name, where = builder.name, builder.data_dir_root
    if prepared:
        raise DatasetNotPreparedError(
            f"The dataset {name!r} in {where} is stored as {builder.info.file_format.value}, which "
            f"only TensorFlow reads; metalearn reads array_record. Prepare it a second time, into "
            f"another directory: {prepare_command(name, 'ANOTHER_DIR')}, and pass "
            "data_dir=ANOTHER_DIR."
        )
    raise DatasetNotPreparedError(
        f"The dataset {name!r} is not prepared: there is no {builder.data_dir}. Prepare it once "
        f"with: {prepare_command(name, where)}; or, if it is elsewhere, pass data_dir= or set the "
        f"environment variable TFDS_DATA_DIR before Python starts."
    )


def prepare_command(name: str, data_dir: Any) -> str:
    """Return the command that prepares a dataset."""
    if name in PREPARED_HERE:
        return f"python -m metalearn.datasets.prepare {name} --data-dir={data_dir}"
    return f"tfds build {name} --data_dir={data_dir} --file_format=array_record"


def cache_dir() -> pathlib.Path:
    """Return the cache directory, $METALEARN_CACHE or ~/.cache/metalearn; created if missing.

    Raises:
      OSError: if the directory cannot be created.
    """
    path = pathlib.Path(os.environ.get("METALEARN_CACHE") or "~/.cache/metalearn").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The cache directory {path} cannot be made ({error}), but prepared datasets are kept "
            f"there. Set the environment variable METALEARN_CACHE to a directory you may write to."
        ) from error
    return path


def cached(
    name: str,
    build: Callable[[], np.ndarray],
    dtype: Any = None,
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Return the array `name` from the cache, after building and storing it if it is missing.

    Args:
      name: everything that the content depends on, as a file name.
      build: () -> array.
      dtype: of the array, with its byte order; a file with another is built again. None: any.
      shape: of the array; a file with another is built again. None: any.

    Raises:
      ValueError: if `build` returns an array of another dtype or shape.
    """
    path = cache_dir() / f"{name}.npy"
    if path.exists():
        try:
            return _read(path, dtype, shape)
        except (ValueError, EOFError, OSError, MemoryError, OverflowError, RecursionError) as error:
            damaged(path, str(error))
    array = np.asarray(build(), order="C")
    if wrong := _unlike(array.dtype, array.shape, dtype, shape):
        raise ValueError(f"What was built for {path} is {wrong}.")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        temporary = pathlib.Path(scratch) / path.name
        np.save(temporary, array, allow_pickle=False)
        temporary.replace(path)
    return array


def _read(path: pathlib.Path, dtype: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return the array of a file of `cached`; ValueError if its format or size is another."""
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in headers:
            raise ValueError(f"it is of version {version} of the format, of which none is written")
        stored, fortran, kind = headers[version](file)
        if wrong := _unlike(kind, stored, dtype, shape):
            raise ValueError(f"it is {wrong}")
        if fortran:
            raise ValueError("it is in Fortran order, in which none is written")
        size = file.tell() + kind.itemsize * math.prod(stored)
        if not kind.hasobject and path.stat().st_size != size:
            raise ValueError(f"it has {path.stat().st_size} bytes, and such an array {size}")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def _unlike(
    dtype: np.dtype, shape: tuple[int, ...], expected: Any, other: tuple[int, ...] | None
) -> str:
    """Return "DTYPE[SHAPE], not ..." where an array differs from what is expected; else ""."""
    same = expected is None or dtype == np.dtype(expected)
    if same and other in (None, shape):
        return ""
    wanted = "any type" if expected is None else str(np.dtype(expected))
    return f"{dtype}{list(shape)}, not {wanted}{'' if other is None else list(other)}"


def damaged(path: pathlib.Path, why: str) -> None:
    """Warn that a file in the cache cannot be read and is built again."""
    warnings.warn(f"{path} in the cache cannot be read ({why}): it is built again.", stacklevel=3)
