"""One small instance of everything pluggable. `test_conformance.py` runs all pairs.

A new algorithm, engine, model adapter or task distribution gets its case here; a test
fails until it has one. Names are test ids.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn import (
    ES,
    PES,
    SAMA,
    Episode,
    Forward,
    Implicit,
    InverseVariance,
    MixedFlow,
    Reverse,
    Tasks,
    Truncated,
)
from metalearn._utils.trees import is_differentiable
from metalearn.algorithms import (
    CAVIA,
    COMLN,
    FDS,
    MAML,
    R2D2,
    DataRater,
    DataWeights,
    ExampleWeights,
    Gradient,
    Hyperparameter,
    LearnedLoss,
    LearnedOptimizer,
    LearningRates,
    LossWeights,
    MAMLPlusPlus,
    MetaCurvature,
    MetaNTK,
    Momenta,
    PerParameter,
    PointwiseMLP,
    ProtoNet,
    Reptile,
    StepFeatures,
    Supervised,
    TokenWeights,
    TunedRule,
    cross_entropy,
    mean_one,
    sgd,
    squared_error,
    weighted_cross_entropy,
)
from metalearn.datasets import (
    ClassIndex,
    Corruption,
    FewShot,
    GivenTasks,
    HeldOut,
    HostFewShot,
    HostHeldOut,
    HostText,
    HostTrainingRuns,
    MetaTrainingRuns,
    Quadratics,
    SideBySide,
    Sinusoid,
    TaskStream,
    Text,
    Tokenizer,
    TrainingRuns,
    UnequalFewShot,
)
from metalearn.model import Model
from metalearn.models import (
    NNX,
    Equinox,
    Functions,
    Haiku,
    Linen,
    LoRA,
    Precision,
    Trainable,
    haiku_networks,
    linen_networks,
    nnx_networks,
    train_flag,
    with_params,
)
from metalearn.tasks import AtOuterStep, WithConstants, fetched
from tests.helpers import equinox_networks

IMAGE = (4, 4, 1)
WAYS = 2
LIBRARIES = ("linen", "nnx", "haiku")  # the package has networks of each
ADAPTED = (*LIBRARIES, "equinox")


@dataclasses.dataclass(frozen=True)
class Float64(Model):
    """A model computed in float64, whatever its library initialises with.

    Its parameters begin on a coarse grid: drawn in float32 inside one compiled program and
    another they may differ in the last bit, which no comparison in float64 would forgive.
    """

    model: Model

    def init(self, key):
        params, state = to_float64(self.model.init(key))
        return jax.tree.map(lambda x: jnp.round(1024 * x) / 1024, params), state

    def apply(self, params, state, inputs, **mode):
        return self.model.apply(params, state, to_float64(inputs), **mode)


def to_float64(tree):
    return jax.tree.map(lambda x: x.astype(float) if is_differentiable(x) else x, tree)


def _functions() -> Model:
    def init(key):
        w, v = jax.random.normal(key, (2, 4))
        return {"body": w[None], "head": v[:, None]}

    return Functions(init, lambda params, x: jnp.tanh(x @ params["body"]) @ params["head"])


def mlp(library: str, width: int = 1) -> Model:
    """A tanh network from [n, width] to [n, width], by default of 10 parameters."""
    if library == "equinox":
        return Equinox(lambda key: equinox_networks.MLP(width, key=key))
    inputs, size = jax.ShapeDtypeStruct((1, width), jnp.float32), {"outputs": width, "hidden": (3,)}
    smooth = {"activation": jnp.tanh}
    if library == "linen":
        return Linen(linen_networks.MLP(**size, **smooth), inputs, train_flag)
    if library == "nnx":
        return NNX(lambda rngs: nnx_networks.MLP(width, **size, **smooth, rngs=rngs), train_flag)
    return Haiku(
        lambda x, train: haiku_networks.MLP(**size, **smooth)(x, train), inputs, train_flag
    )


def conv_net(library: str, image=IMAGE, outputs=WAYS, filters=2, blocks=1, **options) -> Model:
    """A ConvNet, by default of 30 parameters, 4 of them of batch normalisation."""
    if library == "equinox":
        size = {"image": image, "outputs": outputs, "filters": filters, **options}
        return Equinox(lambda key: equinox_networks.ConvNet(**size, key=key))
    inputs = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    size = {"outputs": outputs, "filters": filters, "blocks": blocks, **options}
    if library == "linen":
        return Linen(linen_networks.ConvNet(**size), inputs, train_flag)
    if library == "nnx":
        return NNX(lambda rngs: nnx_networks.ConvNet(image, **size, rngs=rngs), train_flag)
    return Haiku(lambda x, train: haiku_networks.ConvNet(**size)(x, train), inputs, train_flag)


@dataclasses.dataclass(frozen=True)
class Tokenwise(Model):
    """A network [n, 4] -> [n, 4], applied to every token of [batch, S] on its own."""

    model: Model

    def init(self, key):
        return self.model.init(key)

    def apply(self, params, state, inputs, **mode):
        rows = jax.nn.one_hot(inputs, 4).reshape(-1, 4)
        outputs, state = self.model.apply(params, state, to_float64(rows), **mode)
        return outputs.reshape(*inputs.shape, -1), state


@dataclasses.dataclass(frozen=True)
class Rating(Model):
    """A network [n, 4] -> [n, 4] as a rater of (inputs, targets) [batch, S], by their parities."""

    model: Model

    def init(self, key):
        return self.model.init(key)

    def apply(self, params, state, examples, **mode):
        pairs = (2 * (examples[0] % 2) + examples[1] % 2).reshape(-1)
        outputs, state = self.model.apply(
            params, state, to_float64(jax.nn.one_hot(pairs, 4)), **mode
        )
        return outputs.reshape(*examples[0].shape, 4)[..., 0].mean(1), state


def _pretrained(model: Model) -> Model:
    return with_params(model, model.init(jax.random.key(1))[0])


MODELS: dict[str, Model] = {
    "Functions": _functions(),
    "Precision": Precision(_functions(), compute=jnp.bfloat16),
    "LoRA": LoRA(_functions(), 1),
    "Trainable": Trainable(_pretrained(_functions()), "head"),
    "Pretrained": _pretrained(_functions()),
    **{f"{library}-MLP": mlp(library) for library in ADAPTED},
    **{f"{library}-ConvNet": conv_net(library, momentum=0.5) for library in ADAPTED},
}

_INDEX = ClassIndex(
    np.random.default_rng(0).integers(0, 256, (5, 6, *IMAGE), np.uint8), np.full(5, 6, np.int32)
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Run(Tasks):
    """A training run: T support sets of a few-shot distribution, one a step."""

    tasks: Tasks
    steps: int = dataclasses.field(default=3, metadata={"static": True})

    def sample(self, key):
        episodes = jax.vmap(self.tasks.sample)(jax.random.split(key, self.steps))
        return Episode(episodes.support, jax.tree.map(lambda x: x[0], episodes.query))


TASKS = {
    "FewShot": FewShot.create(_INDEX, ways=WAYS, shots=2, queries=3),
    "Sinusoid": Sinusoid(shots=3, queries=4),
    "Text": Text.create(
        *("abacadbdcabcdd" * 4, "dabacabbdabcadcd"),
        length=3,
        inner_steps=3,
        batch=4,
        queries=3,
        probes=2,
        pieces=4,
        corruption=Corruption(0.5, ("shuffled", "repeated")),
        tokenizer=Tokenizer(lambda text: np.array([ord(c) - ord("a") for c in text]), 4),
    ),
    "TrainingRuns": TrainingRuns.create(np.eye(5, dtype=np.float32), np.arange(5), validation=2),
    "Quadratics": Quadratics(3),
    "WithConstants": WithConstants(Quadratics(3), ()),
    "AtOuterStep": AtOuterStep(Quadratics(3), jnp.zeros((), jnp.int32)),
    "SideBySide": SideBySide({"bowl": Quadratics(2), "wave": Sinusoid()}),
    "MetaTrainingRuns": MetaTrainingRuns.create(Quadratics(3), Sinusoid(), queries=2),
    "HeldOut": HeldOut.create(
        np.eye(3, dtype=np.float32), np.arange(3), np.ones((2, 3), np.float32), [0, 1]
    ),
}

_EXAMPLES = np.asarray(_INDEX.examples).reshape(30, *IMAGE), np.repeat(np.arange(5), 6)
_HOST = HostFewShot.create(*_EXAMPLES, ways=WAYS, shots=2, queries=3)
_EPISODES = [TASKS["FewShot"].sample(jax.random.key(i)) for i in range(3)]
TASKS |= {
    "HostFewShot": _HOST,
    "HostText": HostText.create(
        *(np.arange(40) % 4, np.arange(9) % 4),
        length=3,
        inner_steps=2,
        batch=4,
        queries=3,
        vocabulary=4,
    ),
    "HostTrainingRuns": HostTrainingRuns.create(
        np.eye(5, dtype=np.float32), np.arange(5), validation=2
    ),
    "HostHeldOut": HostHeldOut.create(
        *(np.eye(3, dtype=np.float32), np.arange(3)),
        test_source=np.ones((2, 3), np.float32),
        test_targets=np.array([0, 1]),
    ),
    "Fetched": _HOST.fetch(jax.random.split(jax.random.key(0), 2)),
    "GivenTasks": GivenTasks.create(_EPISODES),
    "TaskStream": TaskStream(_EPISODES),
    "UnequalFewShot": UnequalFewShot.create(TASKS["FewShot"], fewest_ways=2, fewest_shots=1),
}

ENGINES = {
    "Reverse": Reverse(),
    "Reverse-step": Reverse(remat="step"),
    "Reverse-segments": Reverse(remat="segments"),
    "Reverse-nested": Reverse(remat="nested"),
    "Reverse-peel": Reverse(remat="step", peel=True),
    "Forward": Forward(),
    "Forward-chunk": Forward(chunk=4),
    "MixedFlow": MixedFlow(),
    "MixedFlow-none": MixedFlow(remat="none"),
    "MixedFlow-host": MixedFlow(store="host"),
    "MixedFlow-segments": MixedFlow(remat="segments"),
    "MixedFlow-nested": MixedFlow(remat="nested", segment=2, peel=False),
}

# Engines that estimate: they agree with the others in the mean alone.
ESTIMATORS = {
    "ES": ES(pairs=2),
    "PES": PES(),
    "InverseVariance": InverseVariance(ES(pairs=2)),
    "InverseVariance-PES": InverseVariance(PES(pairs=2), Reverse(remat="step")),
}

# Engines that approximate: of a learned initialisation they see nothing, and refuse it.
APPROXIMATE = {
    "Implicit": Implicit(iterations=20),
    "Implicit-params": Implicit("neumann", iterations=3, variables="params|statistics"),
    "Truncated": Truncated(1),
    "Truncated-difference": Truncated(1, finite_difference=0.01),
    "SAMA": SAMA(),
}


@dataclasses.dataclass(frozen=True)
class AlgorithmCase:
    """An algorithm but for its model: that comes from each library."""

    make: Callable[..., Any]  # model, objective -> Algorithm
    network: str = "MLP"
    exact: bool = True  # whether engines return the derivative of the loss
    run: bool = False  # whether the support set is [T, batch, ...], a batch a step

    def problem(self, library: str) -> tuple[Any, Any]:
        """Return (algorithm, tasks)."""
        if self.network == "language":
            return self.make(Float64(Tokenwise(mlp(library, width=4)))), TASKS["Text"]
        if self.network == "rated language":
            network = mlp(library, width=4)
            return self.make(Float64(Tokenwise(network)), Float64(Rating(network))), TASKS["Text"]
        if self.network == "classifier":
            return self.make(Float64(mlp(library, width=5))), TASKS["TrainingRuns"]
        if self.network == "context":
            return self.make(Float64(mlp(library, width=3))), TASKS["Sinusoid"]
        model = Float64(MODELS[f"{library}-{self.network}"])
        objective, tasks = cross_entropy, TASKS["FewShot"]
        if self.network == "MLP":
            objective, tasks = squared_error, TASKS["Sinusoid"]
        return self.make(model, objective), _Run(tasks) if self.run else tasks


def _maml(optimizer=None, **options):
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    return functools.partial(MAML, optimizer=optimizer, **{"inner_steps": 2, **options})


def _learning_rates(model, objective):
    optimizer = optax.adam(1.0, eps_root=1e-4)
    return LearningRates(model, objective, optimizer, initial=0.05)


def _reptile(model, objective):
    return Reptile(model, objective, optax.sgd(0.1), inner_steps=3, batch=2)


def _maml_plus_plus(outer_step=None, **options):
    def make(model, objective):
        algorithm = MAMLPlusPlus(model, objective, **{"inner_steps": 3, **options})
        if outer_step is None:
            return algorithm
        return algorithm.at_outer_step(jnp.asarray(outer_step, jnp.int32))

    return make


def _cavia(model):
    """A network whose inputs are one number and two of context; one of its outputs counts."""

    def first(outputs, targets):
        return squared_error(outputs[:, :1], targets)

    return CAVIA(model, first, context=2, rate=0.3)


def _meta_curvature(model, objective):
    return MetaCurvature(model, objective, rate=0.1, inner_steps=2)


def _learned_loss(model, objective):
    return LearnedLoss(model, objective, optax.sgd(0.2), inner_steps=2, hidden=(3,))


def _comln(model, objective):
    """A flow from zero in two steps; the embedding has batch statistics."""
    return COMLN(model, WAYS, objective, time=0.5, inner_steps=2, batch_norm="running")


def _meta_ntk(model, objective):
    return MetaNTK(model, objective, scale=None if objective is squared_error else 5.0)


def _closed_form(build, **options):
    """A classifier whose head is a function of the support set: T = 0."""
    return lambda model, objective: build(model, WAYS, objective, **options)


def _fds(model):
    learned = {
        "learning_rate": Hyperparameter(1e-3, 10.0, (0.3, 0.5), windows=2, space="log"),
        "momentum": Hyperparameter(0.0, 1.0, 0.5, space="logit"),
        "label_smoothing": Hyperparameter(-1.0, 1.0, 0.1, windows=(0, 1, 3)),
        "class_weights": Hyperparameter(0.0, 9.0, 1.0, shape=(5,)),
    }
    return FDS(model, learned, 3, 2, sgd, weighted_cross_entropy)


def _learned_optimizer(model):
    """A network of 12 weights on top of Adam with a learned rate."""
    rate = Hyperparameter(1e-3, 1.0, 0.1, space="log")
    base = TunedRule(functools.partial(optax.adam, eps_root=1e-4), {"learning_rate": rate})
    features = Gradient(), Momenta((0.5,)), StepFeatures((3,))
    rule = PerParameter(features, PointwiseMLP(hidden=(2,)), step_scale=0.1, base=base)
    return LearnedOptimizer(Supervised(model, batch=2), rule, inner_steps=3)


def _loss_weights(weighting, **options):
    optimizer = optax.adam(0.3, eps_root=1e-4)
    return functools.partial(LossWeights, weighting=weighting, optimizer=optimizer, **options)


def _data_rater(model, rater):
    return DataRater(model, rater, optax.adam(0.3, eps_root=1e-4))


def _data_weights(model):
    return DataWeights(model, 5, inner_steps=3, batch=2, optimizer=optax.sgd(0.3, momentum=0.9))


def _lora(model, objective):
    """Low-rank terms of a pretrained network, which adapt from a learned start."""
    model = LoRA(_pretrained(model), 1)
    chosen = {"adapted": "^lora", "learned": "^lora"}
    return MAML(model, objective, optax.sgd(0.1), inner_steps=2, **chosen)


def _trainable_rates(model, objective):
    """Learned rates of the last layer of a pretrained network."""
    return _learning_rates(Trainable(_pretrained(model), "head"), objective)


ALGORITHMS = {
    "MAML": AlgorithmCase(_maml()),
    # Adam divides by sqrt(v), whose derivative is infinite at zero: hence eps_root.
    "MAML-adam": AlgorithmCase(_maml(optax.adam(0.05, eps_root=1e-4), inner_steps=3)),
    "Meta-SGD": AlgorithmCase(_maml(optax.sgd(1.0), learned_rates=0.1)),
    "LoRA": AlgorithmCase(_lora),
    "Trainable": AlgorithmCase(_trainable_rates, run=True),
    "ANIL": AlgorithmCase(_maml(adapted="head")),
    "first-order": AlgorithmCase(_maml(first_order=True), exact=False),
    "example-weights": AlgorithmCase(
        _loss_weights(ExampleWeights(hidden=(3,)), normalize=mean_one), "language", exact=False
    ),
    "token-weights": AlgorithmCase(
        _loss_weights(
            TokenWeights(("loss", "position", "source"), (2,), sources=4), through_features=True
        ),
        "language",
    ),
    "running": AlgorithmCase(
        _maml(optax.sgd(0.1, momentum=0.9), inner_steps=3, batch_norm="running"), "ConvNet"
    ),
    "iMAML": AlgorithmCase(_maml(proximal=2.0)),
    "mini-batches": AlgorithmCase(_maml(inner_steps=3, batch=2)),
    "Reptile": AlgorithmCase(_reptile, exact=False),
    "MAML++": AlgorithmCase(_maml_plus_plus(per_step="norm"), "ConvNet"),
    "MAML++-annealing": AlgorithmCase(_maml_plus_plus(3, multi_step=10)),
    "CAVIA": AlgorithmCase(_cavia, "context"),
    "MetaCurvature": AlgorithmCase(_meta_curvature),
    "LearnedLoss": AlgorithmCase(_learned_loss),
    "LearnedLoss-classes": AlgorithmCase(_learned_loss, "ConvNet"),
    "COMLN": AlgorithmCase(_comln, "ConvNet"),
    "MetaNTK": AlgorithmCase(_meta_ntk),
    "MetaNTK-classes": AlgorithmCase(_meta_ntk, "ConvNet"),
    "ProtoNet": AlgorithmCase(_closed_form(ProtoNet), "ConvNet"),
    "R2D2": AlgorithmCase(_closed_form(R2D2, batch_norm="running"), "ConvNet"),
    "LearningRates": AlgorithmCase(_learning_rates, run=True),
    "FDS": AlgorithmCase(_fds, "classifier"),
    "LearnedOptimizer": AlgorithmCase(_learned_optimizer, "classifier"),
    "DataWeights": AlgorithmCase(_data_weights, "classifier"),
    "DataRater": AlgorithmCase(_data_rater, "rated language"),
    "LearningRates-ConvNet": AlgorithmCase(_learning_rates, "ConvNet", run=True),
}
# Exercised in full for every library; the transductive ConvNet for linen alone.
CONV_MAML = AlgorithmCase(_maml(), "ConvNet")

# Training runs on the host become `FetchedRuns` for an algorithm, here of rows [n, 5].
TASKS["FetchedRuns"] = fetched(
    TASKS["HostTrainingRuns"],
    jax.random.split(jax.random.key(0), 2),
    0,
    _fds(mlp("linen", width=5)),
)
