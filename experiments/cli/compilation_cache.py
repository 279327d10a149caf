"""Compiled programs kept between two starts of the command line.

XLA's output for a program that took a third of a second or more is kept in the cache directory
($METALEARN_CACHE, or ~/.cache/metalearn), in a folder for each machine: what is compiled for one
CPU may not run on another. The key of a program is JAX's: its code, the versions of JAX and XLA,
the devices and the compiler's flags. A program that is found is the one that was compiled, so
results are the same bits. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from metalearn.datasets.reading import cache_dir

FOLDER = "jax_compilation_cache_dir"
SETTINGS: dict[str, Any] = {
    FOLDER: None,
    "jax_persistent_cache_min_compile_time_secs": 0.3,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@contextlib.contextmanager
def kept_programs(wanted: bool = True) -> Iterator[None]:
    """Use the cache inside the context.

    A cache that the user has set up ($JAX_COMPILATION_CACHE_DIR) stays as it is. There is none
    where several processes share a run, or where the directory cannot be written to.
    """
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    if not wanted or before[FOLDER] or jax.process_count() > 1:
        yield
        return
    try:
        folder = cache_dir() / "compiled" / (platform.node() or "localhost")
    except OSError:
        yield
        return
    _configure({**SETTINGS, FOLDER: str(folder)})
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX opens the cache once, at the first program
