"""An outer loop that costs nothing: eta counts its steps."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax

from metalearn import Algorithm, Reverse, Trainer, Unroll
from metalearn.datasets import Sinusoid
from metalearn.loggers import Logger
from tests.helpers.logs import untimed


@dataclasses.dataclass(frozen=True)
class Clock(Algorithm):
    """eta is the number of outer steps taken: its derivative is -1, and the rate is 1.

    `loss_at` and `slope_at` break the loss, or the derivative alone, once eta is there.
    """

    loss_at: float = math.inf
    slope_at: float = math.inf
    broken: float = math.nan

    def init(self, key):
        return jnp.zeros(())

    def unroll(self, episode, key):
        _, y = episode.query

        def loss(eta, state):
            # 0 * d/dx sqrt(x) is nan at x = 0, where the value is 0.
            slope = 0.0 * jnp.sqrt(jnp.maximum(self.slope_at - eta, 0.0))
            slope = jnp.where(jnp.isfinite(self.slope_at), slope, 0.0)
            value = y.mean() - eta + slope
            value = jnp.where(eta >= self.loss_at, self.broken, value)
            return value, {"clock": eta, "size": jnp.abs(y).max()}

        return Unroll(lambda eta: eta, lambda eta, state, batch, grad: state, loss)


class Heard(Logger):
    """Keeps what it hears."""

    def __init__(self):
        self.started, self.rows, self.tables = [], [], []

    def start(self, step, config, record):
        self.started.append((step, config, record))

    def log(self, step, metrics):
        self.rows.append((step, untimed(metrics)))

    def record(self):
        return {"rows": len(self.rows)}

    def finish(self, table=None):
        self.tables.append(table)


TASKS = Sinusoid(shots=2, queries=3)
KEY = jax.random.key(0)


@functools.cache  # and with a trainer its compiled step
def clock(**options):
    return Trainer(Clock(**options), Reverse(), optax.sgd(1.0), tasks_per_step=2)


def fit(trainer, steps, *loggers, **options):
    options = {"progress": False, "log_every": 1, **options}
    return trainer.fit(TASKS, steps, key=KEY, loggers=loggers, **options)


def steps_of(rows, name="loss"):
    return [step for step, metrics in rows if name in metrics]
