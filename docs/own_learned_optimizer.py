"""The parts of a learned optimizer, each of one's own: tasks, problem, feature, rule.

python docs/own_learned_optimizer.py trains it for a few outer steps and writes rule.safetensors.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from metalearn import Episode, Tasks, Trainer, Truncation
from metalearn.algorithms import (
    Feature,
    Gradient,
    Hyperparameter,
    LearnedOptimizer,
    PerParameter,
    PointwiseMLP,
    Problem,
    StepLoss,
    TunedRule,
    UpdateRule,
    load_optimizer,
    save_optimizer,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HalfSpaces(Tasks):
    """Points on two sides of a random plane; what is no array is static."""

    points: int = dataclasses.field(default=64, metadata={"static": True})

    def sample(self, key):
        normal, *keys = jax.random.split(key, 3)
        plane = jax.random.normal(normal, (3,))
        inputs = [jax.random.normal(k, (self.points, 3)) for k in keys]
        return Episode(*((x, (x @ plane > 0).astype(x.dtype)) for x in inputs))


@dataclasses.dataclass(frozen=True)
class Logistic(Problem):
    """Logistic regression on batches of them."""

    batch: int = 8

    def init(self, key):
        return 0.1 * jax.random.normal(key, (3,)), ()  # theta, and no mutable state

    def batches(self, support, steps, key):  # the rows of these steps
        keys = jax.vmap(lambda step: jax.random.fold_in(key, step))(steps)
        return jax.vmap(lambda k: jax.random.randint(k, (self.batch,), 0, len(support[1])))(keys)

    def loss(self, params, statistics, support, batch, key):
        value, _ = self.validate(params, statistics, (support[0][batch], support[1][batch]))
        return StepLoss(value, value, statistics)

    def validate(self, params, statistics, query):
        inputs, labels = query
        return optax.sigmoid_binary_cross_entropy(inputs @ params, labels).mean(), {}


@dataclasses.dataclass(frozen=True)
class Agreement(Feature):
    """Whether a gradient points where the mean of those before it did: one value."""

    decay: float = 0.9

    def size(self, directions):
        return 1

    def init(self, param):
        return jnp.zeros_like(param)

    def __call__(self, slot, tensor):
        now = self.decay * slot + (1 - self.decay) * tensor.grad
        return now, jnp.tanh(100 * tensor.grad * slot)[None]  # [size, *shape]


@dataclasses.dataclass(frozen=True)
class Decaying(UpdateRule):
    """SGD whose learning rate falls, or rises, exponentially: eta is two numbers."""

    def init(self, key):
        return {"log_rate": jnp.log(jnp.asarray(0.1)), "slope": jnp.zeros(())}

    def optimizer(self, eta):
        return optax.with_extra_args_support(
            optax.sgd(lambda step: jnp.exp(eta["log_rate"] + eta["slope"] * step / 100))
        )


BASE = TunedRule(optax.sgd, {"learning_rate": Hyperparameter(1e-4, 1.0, 0.1, space="log")})
RULES = {
    "network": PerParameter((Gradient(), Agreement()), PointwiseMLP((4,)), base=BASE),
    "decaying": Decaying(),
}


def train(rule, steps=5):
    """Return what is learned in a few outer steps."""
    learner = LearnedOptimizer(Logistic(), rule, inner_steps=20)
    trainer = Trainer(learner, optimizer=optax.adam(0.01), truncation=Truncation(5))
    return trainer.fit(HalfSpaces(), steps, key=jax.random.key(0), progress=False).eta


if __name__ == "__main__":
    for rule in RULES.values():
        save_optimizer("rule.safetensors", rule, train(rule))
        print(load_optimizer("rule.safetensors", known=(Agreement, Decaying)))
