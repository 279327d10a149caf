"""Learned optimizers: eta is the optimizer that trains the inner model."""
