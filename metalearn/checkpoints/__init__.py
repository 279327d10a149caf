"""Checkpoints of a run: saved, verified and restored."""

from metalearn.checkpoints.manager import Checkpoints

__all__ = ["Checkpoints"]
