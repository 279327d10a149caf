"""Estimators of the meta-gradient from outer losses at perturbed eta."""

from metalearn.engines.estimators.es import ES
from metalearn.engines.estimators.inverse_variance import InverseVariance
from metalearn.engines.estimators.pes import PES

__all__ = ["ES", "PES", "InverseVariance"]
