"""Tuners of a training run's hyperparameters, FDS among them, on one problem and one budget."""
