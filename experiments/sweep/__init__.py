"""Sweeps: a search over keys of a config, each trial a run of its own in the sweep's workdir."""
