"""A tiny problem for tuners, whose programs are compiled once."""

import functools

import jax
import jax.numpy as jnp

from metalearn.algorithms import FDS, Hyperparameter, cross_entropy, sgd
from metalearn.datasets import HeldOut, TrainingRuns, read_images
from metalearn.experiments.tuners.problem import TuningProblem
from metalearn.models import Functions

T = 12
KEY = jax.random.key(0)


class Compiled(TuningProblem):
    """A problem that compiles each of its programs once for all tests."""

    validator = functools.cache(TuningProblem.validator)


def network():
    def init(key):
        return {"w": 0.1 * jax.random.normal(key, (64, 10)), "b": jnp.zeros((1, 10))}

    return Functions(init, lambda p, x: x.reshape(len(x), -1) @ p["w"] + p["b"])


def smoothed(outputs, targets, smoothing=0.0):
    loss, metrics = cross_entropy(outputs, targets)
    return loss - smoothing * jax.nn.log_softmax(outputs).mean(), metrics


def problem_of(hyperparameters, horizon=T, kind=Compiled, **settings):
    algorithm = FDS(network(), hyperparameters, horizon, 8, **{"optimizer": sgd, **settings})
    images, labels = (x[:80] for x in read_images("digits"))
    final = HeldOut.create(images[20:], labels[20:], images[:20], labels[:20])
    return kind(algorithm, TrainingRuns.create(images, labels, validation=20), final)


@functools.cache
def problem():
    hyperparameters = {
        "learning_rate": Hyperparameter(1e-3, 1.0, start=0.01, windows=3, space="log"),
        "momentum": Hyperparameter(0.0, 0.95, windows=2),
        "smoothing": Hyperparameter(0.0, 0.5, start=0.1),
    }
    return problem_of(hyperparameters, objective=smoothed, eval_steps=2 * T)
