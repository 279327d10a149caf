"""Prepare a dataset once, without TensorFlow: python -m metalearn.datasets.prepare NAME.

Downloads only files that are not in the download directory yet, so a machine without a network
needs a copy of that directory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from metalearn._utils.checks import pick


def _omniglot(data_dir: str | None) -> Any:
    from metalearn.datasets import omniglot_builder

    return omniglot_builder.builder(data_dir)


BUILDERS: dict[str, Callable[[str | None], Any]] = {"omniglot": _omniglot}


def prepare(name: str, data_dir: str | None = None, download_dir: str | None = None) -> str:
    """Prepare a dataset for TFDS as array_record, and return its directory.

    Args:
      name: one of `BUILDERS`.
      data_dir: the directory of datasets; None is TFDS's default, $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      download_dir: the directory of downloaded files, in TFDS's layout; None is
        `downloads` in `data_dir`.

    Returns:
      The directory of the prepared dataset. One that is already prepared is left unchanged.

    Raises:
      ValueError: if there is no such dataset.
    """
    builder = pick(BUILDERS, name, "dataset to prepare")(data_dir)
    builder.download_and_prepare(download_dir=download_dir, file_format="array_record")
    return str(builder.data_dir)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: NAME [--data-dir=DIR] [--download-dir=DIR]."""
    description = "Prepare a dataset for TFDS, without TensorFlow."
    parser = argparse.ArgumentParser("python -m metalearn.datasets.prepare", None, description)
    parser.add_argument("name", help=f"one of: {', '.join(BUILDERS)}")
    parser.add_argument("--data-dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--download-dir", help="default: `downloads` in the data directory")
    arguments = parser.parse_args(argv)
    try:
        directory = prepare(arguments.name, arguments.data_dir, arguments.download_dir)
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.name} is prepared in {directory}")


if __name__ == "__main__":
    main()
