"""Loggers: where the metrics of a run go."""

from metalearn.loggers.base import Logger, Record
from metalearn.loggers.console import ConsoleLogger
from metalearn.loggers.jsonl import JsonlLogger, Line, read_lines, unreadable
from metalearn.loggers.wandb import WandbLogger

__all__ = [
    "ConsoleLogger",
    "JsonlLogger",
    "Line",
    "Logger",
    "Record",
    "WandbLogger",
    "read_lines",
    "unreadable",
]
