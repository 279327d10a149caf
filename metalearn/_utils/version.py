"""The version of the distribution, which setup.cfg and checkpoints read."""

__version__ = "0.1.0"
