"""Tuners of the hyperparameters of a training run, FDS and others, with the same budget."""
