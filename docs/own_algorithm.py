"""A method of your own in one file: learn where to start, how fast to adapt, how far.

    python docs/own_algorithm.py

Beside the initialisation, eta holds the inner learning rate and the weight decay, which the
inner loss closes over. Nothing here says how the meta-gradient is taken: that is the
`engine` of the Trainer, and any of them will do.
"""

import dataclasses

import jax
import jax.numpy as jnp

from metalearn import Algorithm, Episode, MixedFlow, Trainer, Unroll
from metalearn.datasets import Sinusoid
from metalearn.models import Linen, Model, train_flag
from metalearn.models.linen_networks import MLP


@dataclasses.dataclass(frozen=True)
class TunedAdaptation(Algorithm):
    """Learn the initialisation, the inner learning rate and the inner weight decay."""

    model: Model
    inner_steps: int = 3

    def init(self, key):
        params, _ = self.model.init(key)
        return {"params": params, "log_rate": jnp.log(0.01), "log_decay": jnp.log(1e-3)}

    def unroll(self, episode: Episode, key) -> Unroll:
        def error(params, data):
            outputs, _ = self.model.apply(params, {}, data[0], train=True)
            return jnp.mean((outputs - data[1]) ** 2)

        def step(eta, params, batch, grad):
            def objective(params):
                squares = sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))
                return error(params, episode.support) + jnp.exp(eta["log_decay"]) * squares

            rate = jnp.exp(eta["log_rate"])
            return jax.tree.map(lambda p, g: p - rate * g, params, grad(objective)(params))

        def loss(eta, params):
            return error(params, episode.query), {}

        return Unroll(lambda eta: eta["params"], step, loss)

    def batches(self, episode, key):
        return jnp.arange(self.inner_steps)  # every step reads the whole support set


if __name__ == "__main__":
    network = Linen(MLP(outputs=1), jax.ShapeDtypeStruct((1, 1), jnp.float32), train_flag)
    trainer = Trainer(TunedAdaptation(network), engine=MixedFlow(), tasks_per_step=25)
    state = trainer.fit(Sinusoid(), steps=3000, key=jax.random.key(0))
    print("inner learning rate:", float(jnp.exp(state.eta["log_rate"])))
    print("on new waves:", trainer.evaluate(state.eta, Sinusoid(), jax.random.key(1))["loss"])
