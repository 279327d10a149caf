"""The memory of a device, and amounts of memory as text."""

from __future__ import annotations

import os
import pathlib
import re

import jax

from metalearn._utils.checks import nearest

UNITS = {
    **{"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")  # Linux: the limit of a container


def device_memory(device: jax.Device | None = None) -> int:
    """Return the bytes of memory of a device: the limit of its allocator, or the host's memory."""
    device = device or jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return int(limit) if limit else host_memory()


def host_memory() -> int:
    """Return the bytes of memory of this machine, or of its container if that is less."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    return min(installed, int(limit)) if limit.isdecimal() else installed


def parse_bytes(text: str) -> int:
    """Parse an amount of memory: "40GiB" (binary), "512MB" (decimal), "1.5e9" (bytes).

    >>> parse_bytes("40GiB"), parse_bytes("512 MB"), parse_bytes("1.5e9")
    (42949672960, 512000000, 1500000000)
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE]\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    unit = match[2].lower() if match else ""
    if match is None or (unit and unit not in units):
        hint = nearest(match[2], UNITS) if match else ""
        raise ValueError(
            f"{text!r} is no amount of memory.{hint} Write a number and a unit, such as 40GiB or "
            f"512MB, or a number of bytes. Units: {', '.join(UNITS)}."
        )
    return int(float(match[1]) * units.get(unit, 1))


def show_bytes(count: float) -> str:
    """Format an amount of memory.

    >>> show_bytes(512), show_bytes(1536), show_bytes(3 * 2**30)
    ('512 B', '1.5 KiB', '3.0 GiB')
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((i for i in range(len(units)) if count < 1024 ** (i + 1)), len(units) - 1)
    return f"{count / 1024**power:.{1 if power else 0}f} {units[power]}"
