"""Meta-gradient health: what is found before training, and what is said when it fails."""

import dataclasses
import inspect
import math
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from metalearn import Algorithm, Episode, Forward, MixedFlow, Reverse, Tasks, Trainer, Unroll
from metalearn.algorithms import MAML, squared_error
from metalearn.datasets import Sinusoid
from metalearn.diagnostics.health import ROOT, HealthError, HealthWarning, Report
from metalearn.experiments.benchmarks import optimizers as table
from metalearn.models import Functions
from metalearn.optimizers.differentiable import differentiable_at_zero
from metalearn.training.faults import NonFiniteError
from tests.helpers.command_line import SINUSOID, call
from tests.helpers.inner_optimizers import (
    FINITE,
    NAN,
    NAN_AT_ALL_ZERO,
    NAN_AT_ZERO,
    UNDEFINED_AT_ALL_ZERO,
    documented,
)
from tests.helpers.selection import quick

TASKS = Sinusoid(shots=3, queries=3)
KEY = jax.random.key(0)
ON = "--config.health=True"
HEALTHY = (
    "Health: the meta-gradient is finite, with a zero in every inner gradient too, and with all of "
    "them zero."
)
# Inner steps until an optimizer shows itself; those that are not here: 1.
STEPS = {"adopt": 2, "dadapt_adamw": 2, "radam": 3}


def network(activation, offset=0.0):
    """[n, 1] -> [n, 1]; the first of three units is shifted by `offset`."""

    def init(key):
        w, v = jax.random.normal(key, (2, 1, 3))
        return {"w": w, "b": jnp.array([[offset, 0.1, 0.2]]), "v": v.reshape(3, 1)}

    def apply(params, x):
        hidden = x @ params["w"] + jnp.broadcast_to(params["b"], (len(x), 3))
        return activation(hidden) @ params["v"]

    return Functions(init, apply)


# Of each group of optimizers one is quick.
QUICK = ("sgd", "adam", "clipped", "dog")


def one_of_each(names):
    return quick(names, lambda name: name in QUICK)


# One leaf of three: each optimizer compiles its own program.
SMALL = Functions(
    lambda key: jax.random.normal(key, (1, 3)), lambda w, x: jnp.tanh(x @ w).sum(1, keepdims=True)
)
DEAD = network(jax.nn.relu, offset=-1e3)


def trainer(optimizer, model=SMALL, engine=None, inner_steps=2, **options):
    maml = MAML(model, squared_error, optimizer, inner_steps=inner_steps, **options)
    return Trainer(maml, engine or Reverse(), tasks_per_step=2)


@pytest.fixture(autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def checked(trainer):
    return trainer.check_health(trainer.init(KEY), TASKS)


@pytest.mark.parametrize("name", one_of_each(FINITE))
def test_these_optimizers_are_healthy(name):
    report = checked(trainer(FINITE[name], inner_steps=1))
    assert report.healthy and str(report) == HEALTHY


@pytest.mark.parametrize("name", one_of_each(NAN_AT_ZERO))
def test_these_optimizers_are_healthy_but_for_a_zero_gradient(name):
    report = checked(trainer(NAN_AT_ZERO[name], inner_steps=STEPS.get(name, 1)))
    assert report.errors == () and len(report.warnings) == 1
    assert re.match(
        "The meta-gradient becomes NaN or infinite where an inner gradient is exactly zero .*"
        r"`eta.params` \(1 of 1 leaves\).*eps_root=1e-8.*differentiable_at_zero",
        report.warnings[0],
    )


@pytest.mark.parametrize("name", one_of_each(NAN_AT_ALL_ZERO))
def test_these_optimizers_are_healthy_but_for_a_gradient_of_zeros_alone(name):
    report = checked(trainer(NAN_AT_ALL_ZERO[name], inner_steps=1))
    assert report.errors == () and len(report.warnings) == 1
    assert re.match(
        "The meta-gradient becomes NaN or infinite where every inner gradient is exactly zero "
        r"\(a task whose support is masked\), in `eta.params` \(1 of 1 leaves\)\. The inner "
        r"optimizer takes a norm of a gradient that is all zero.*`eps_root` does not mend that: "
        "wrap it.*differentiable_at_zero",
        report.warnings[0],
    )


@pytest.mark.parametrize("name", one_of_each(NAN))
def test_these_optimizers_are_not_healthy_at_all(name):
    report = checked(trainer(NAN[name], inner_steps=STEPS.get(name, 1)))
    assert report.warnings == () and len(report.errors) == 1
    assert "differentiable_at_zero" in report.errors[0]
    assert re.search(
        "no zero in any inner gradient too.*negative.*`eps_root` does not", str(report)
    )


@pytest.mark.parametrize("name", UNDEFINED_AT_ALL_ZERO)
def test_an_update_that_is_nan_where_a_gradient_is_zero_is_told_from_its_derivative(name):
    for optimizer in (each := UNDEFINED_AT_ALL_ZERO[name], differentiable_at_zero(each)):
        report = checked(trainer(optimizer, inner_steps=1))
        assert report.errors == () and len(report.warnings) == 1
        expected = (
            "where every inner gradient is exactly zero.*update itself is not finite.*No deriv"
        )
        assert re.search(expected, report.warnings[0])


@pytest.mark.slow
def test_the_optimizers_said_to_take_eps_root_do_and_are_mended_by_it():
    named = re.search(r"takes that \((.*) of optax do\)", ROOT)[1].replace(" and", ",").split(", ")
    assert len(named) == 5
    for name in named:
        make = getattr(optax, name)
        assert "eps_root" in inspect.signature(make).parameters
        assert name in NAN_AT_ZERO
        assert checked(trainer(make(0.1, eps_root=1e-8), inner_steps=1)).healthy


@pytest.mark.parametrize("name", one_of_each({**NAN_AT_ZERO, **NAN_AT_ALL_ZERO, **NAN}))
def test_the_wrapper_mends_every_kind_of_optimizer(name):
    optimizer = differentiable_at_zero({**NAN_AT_ZERO, **NAN_AT_ALL_ZERO, **NAN}[name])
    report = checked(trainer(optimizer, inner_steps=STEPS.get(name, 1)))
    if name in ("prodigy", "dadapt_adamw"):  # their update is 0 / 0 where all is zero
        assert "update itself is not finite" in report.warnings[0]
    else:
        assert report.healthy


@pytest.mark.parametrize(
    "engine",
    quick([Reverse(), Forward(), MixedFlow()], lambda engine: engine == MixedFlow()),
    ids=repr,
)
def test_adam_with_a_dead_unit_is_an_error_that_names_the_way_out(engine):
    report = checked(trainer(optax.adam(0.1), DEAD, engine))
    with pytest.raises(
        HealthError, match=r"^On the first task the meta-gradient is not finite in "
    ):
        report.raise_errors()
    for part in ("`eta.params['w']`", "(3 of 3 leaves)", "`eps_root=1e-8`", "(optimizer)`"):
        assert part in report.errors[0]
    assert str(report).startswith("Error: On the first task")


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optax.adam(0.1, eps_root=1e-8), id="eps_root"),
        # Of Adam on a smaller model it is quick.
        pytest.param(differentiable_at_zero(optax.adam(0.1)), id="wrapper", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_both_ways_out_mend_a_dead_unit(optimizer):
    assert checked(trainer(optimizer, DEAD, MixedFlow())).healthy


def test_a_check_looks_at_the_first_inner_steps_alone():
    """A loop that diverges later is the affair of training, which says where."""
    growing = optax.sgd(lambda count: jnp.where(count < 5, 0.1, jnp.nan))
    assert checked(trainer(growing, inner_steps=9)).healthy


def test_an_inner_loop_that_diverges_is_an_error_with_its_step():
    wild = optax.sgd(lambda count: jnp.where(count < 1, 0.1, jnp.nan))
    report = checked(trainer(wild, inner_steps=4))
    assert re.match(
        "On the first task the inner loss or its gradient is not finite from inner step 3 of 4 on "
        r"\(inner loss: first \d.*, last nan; 50% finite\)\. The inner loop diverges.*lower",
        report.errors[0],
    )


@dataclasses.dataclass(frozen=True)
class OfItself(Algorithm):
    """A step that calls `jax.grad`, though it is given a `grad`; theta_0 is `start`."""

    start: float = 1.0
    grad: bool = False

    def init(self, key):
        return jnp.ones(())

    def batches(self, episode, key):
        return jnp.arange(3)

    def unroll(self, episode, key):
        def step(eta, theta, t, grad):
            slope = (grad if self.grad else jax.grad)(lambda theta: (theta**2).sum())(theta)
            return theta - 0.1 * eta * slope

        start = jnp.full(2, self.start)
        return Unroll(lambda eta: start, step, lambda eta, theta: (theta.sum(), {}))


@pytest.mark.parametrize(("grad", "notes"), [(True, 0), (False, 1)])
def test_gradients_that_a_step_takes_by_itself_are_noted_and_not_called_probed(grad, notes):
    report = checked(Trainer(OfItself(grad=grad), Reverse(), tasks_per_step=1))
    assert report.healthy and len(report.notes) == notes
    assert (HEALTHY in str(report)) == grad
    assert ("No inner gradient is taken by the `grad`" in str(report)) != grad


def test_a_state_that_is_nan_from_the_start_is_not_called_a_loop_that_diverges():
    report = checked(Trainer(OfItself(math.nan, grad=True), Reverse(), tasks_per_step=1))
    (error,) = report.errors
    assert "from inner step 1 of 3 on" in error and "that `Unroll.init` returns" in error
    assert "diverges" not in error


@dataclasses.dataclass(frozen=True)
class Saturated(Algorithm):
    """A head of prototypes, far apart: the softmax is sure, and inner gradients vanish."""

    def init(self, key):
        return {"w": jax.random.normal(key, (4, 16)), "rate": jnp.float32(0.1)}

    def batches(self, episode, key):
        return jnp.arange(2)

    def unroll(self, episode, key):
        x = jax.random.normal(jax.random.key(1), (5, 4))

        def features(w):
            return jax.nn.relu(4.0 * x @ w)

        def init(eta):
            centres = features(eta["w"])
            return {"w": eta["w"], "head": 2 * centres.T, "bias": -(centres**2).sum(-1)}

        def loss(theta):
            bias = jnp.broadcast_to(theta["bias"], (5, 5))
            logits = features(theta["w"]) @ theta["head"] + bias
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(5)).mean()

        def step(eta, theta, t, grad):
            return jax.tree.map(lambda p, g: p - eta["rate"] * g, theta, grad(loss)(theta))

        def outer(eta, theta):
            return features(theta["w"]).var() + (theta["head"] ** 2).sum(), {}

        return Unroll(init, step, outer)


def test_an_asymmetry_of_rounding_alone_is_a_note():
    learner = Trainer(Saturated(), MixedFlow(), tasks_per_step=1)
    state = dataclasses.replace(learner.init(KEY), eta=Saturated().init(KEY))
    report = learner.check_health(state, TASKS)
    (note,) = report.notes
    assert report.healthy and "not symmetric" in note and "that of `Reverse()` to" in note


class Parts(NamedTuple):
    used: jax.Array
    cut: jax.Array
    unused: dict


@dataclasses.dataclass(frozen=True)
class Partly(Algorithm):
    """Some of eta leads nowhere; `gate` closes the path from `used`, but only at eta_0."""

    gate: float = 1.0
    every: int = 1

    def init(self, key):
        return Parts(jnp.ones(2), jnp.ones(()), {"deep": jnp.ones(3)})

    def batches(self, episode, key):
        return jnp.arange(8)

    def unroll(self, episode, key):
        def step(eta, theta, t, grad):
            slope = grad(lambda theta: (theta**2).sum())(theta)
            rate = jnp.where(
                t % self.every == self.every - 1, eta.used, jax.lax.stop_gradient(eta.used)
            )
            return theta - 0.1 * rate * slope * jax.lax.stop_gradient(eta.cut)

        return Unroll(
            lambda eta: jnp.ones(2), step, lambda eta, theta: (self.outer(eta, theta), {})
        )

    def outer(self, eta, theta):
        return theta.sum()


@dataclasses.dataclass(frozen=True)
class Gated(Partly):
    """A product with a factor that is zero at first: its partner's derivative is zero there."""

    def init(self, key):
        return Parts(jnp.ones(2), jnp.zeros(()), {"deep": jnp.ones(3)})

    def outer(self, eta, theta):
        return theta.sum() + eta.cut * eta.unused["deep"].sum()


def test_a_leaf_of_eta_that_no_path_leads_to_is_named():
    report = checked(Trainer(Partly(), Reverse(), tasks_per_step=1))
    assert report.errors == () and len(report.warnings) == 1
    expected = r"exactly zero in `eta.cut`, `eta.unused\['deep'\]` \(2 of 3 leaves\), .*no path"
    with pytest.warns(HealthWarning, match=expected):
        report.warn()
    report.raise_errors()  # a warning is none


def test_a_derivative_that_is_zero_at_the_initial_eta_alone_is_no_trouble():
    assert checked(Trainer(Gated(), Reverse(), tasks_per_step=1)).healthy


def test_a_leaf_that_only_a_late_inner_step_reads_is_no_trouble():
    report = checked(Trainer(Partly(every=8), Reverse(), tasks_per_step=1))
    assert "`eta.used`" not in str(report) and "`eta.cut`" in str(report)


def test_a_failing_step_says_which_task_and_from_which_inner_step_on():
    wild = trainer(optax.sgd(lambda count: jnp.where(count < 6, 0.1, jnp.nan)), inner_steps=9)
    expected = (
        r"^`loss` became nan at outer step 1, .* In its task 1 of 2 the inner loss or its gradient "
        r"is not finite from inner step 8 of 9 on .*lower the inner learning rate"
    )
    with pytest.raises(NonFiniteError, match=expected):
        wild.fit(TASKS, 3, key=KEY, progress=False)


def test_a_step_that_fails_beyond_what_is_examined_does_not_blame_the_outer_optimizer():
    rate = optax.sgd(lambda count: jnp.where(count < 6, 0.1, jnp.nan))
    wild = dataclasses.replace(trainer(rate, inner_steps=9), segment=3)
    message = (
        r"The first 3 inner steps from a fresh start, .* have a finite outer loss .* begins in "
        "a later inner step"
    )
    with pytest.raises(NonFiniteError, match=message):
        wild.fit(TASKS, 4, key=KEY, progress=False)


def test_a_failing_meta_gradient_names_the_leaves_and_the_way_out():
    expected = r"outer step 1, .*task 1 of 2 the meta-gradient is not finite in .*\['w'\].*eps_root"
    with pytest.raises(NonFiniteError, match=expected):
        trainer(optax.adam(0.1), DEAD).fit(TASKS, 3, key=KEY, progress=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked(Tasks):
    """Sine waves; targets [n, 2] carry a mask, which leaves some tasks without a support."""

    def sample(self, key):
        support, query = TASKS.sample(key)
        used = jax.random.bernoulli(key).astype(jnp.float32)

        def with_mask(points, mask):
            x, y = points
            return x, jnp.concatenate((y, jnp.broadcast_to(mask, y.shape)), 1)

        return Episode(with_mask(support, used), with_mask(query, 1.0))


def masked_error(outputs, targets):
    return jnp.mean(targets[:, 1:] * (outputs - targets[:, :1]) ** 2), {}


def with_masks(optimizer, engine):
    maml = MAML(SMALL, masked_error, optimizer, inner_steps=2)
    return Trainer(maml, engine, tasks_per_step=4)


CLIPPED = NAN_AT_ALL_ZERO["clipped"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [Reverse(), MixedFlow()],
    ids=["Reverse", "MixedFlow"],
)
def test_a_task_whose_support_is_masked_fails_clipping_and_the_message_mends_it(engine):
    expected = (
        r"task \d of 4 the meta-gradient is not finite in .*though.*The inner optimizer takes a "
        r"norm of a gradient that is all zero.*`eps_root` does not.*"
        r"differentiable_at_zero\(optimizer\)`"
    )
    with pytest.raises(NonFiniteError, match=expected):
        with_masks(CLIPPED, engine).fit(Masked(), 2, key=KEY, progress=False)
    mended = with_masks(differentiable_at_zero(CLIPPED), engine)
    state = mended.fit(Masked(), 2, key=KEY, progress=False)
    assert int(state.step) == 2 and jnp.isfinite(state.eta.params).all()


REASONS = {
    "finite": HEALTHY,
    "NaN always": "no zero in any inner gradient",
    "NaN: all zero": "takes a norm of a gradient that is all zero",
    "NaN: all zero (update)": "update itself is not finite",
}
# The table is of a matrix and a vector, which these leave to Adam; here there is a matrix alone.
MATRICES = ("contrib.galore", "contrib.scale_by_galore", "contrib.muon")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of optax, on its own arguments
@pytest.mark.parametrize(
    "name", [name for name, row in table.optimizers().items() if not row.extra]
)
def test_health_says_of_every_optimizer_what_the_table_says(name):
    optimizer = table.optimizers()[name].make()
    as_it_is, _, wrapped, *_ = dict(documented())[name]
    reason = "An infinite derivative of the inner optimizer"
    expected = REASONS["NaN: all zero"] if name in MATRICES else REASONS.get(as_it_is, reason)
    with jax.numpy_rank_promotion("allow"):  # some of optax's promote
        assert expected in str(checked(trainer(optimizer, inner_steps=4)))
        mended = str(checked(trainer(differentiable_at_zero(optimizer), inner_steps=4)))
    assert REASONS[wrapped] in mended


@pytest.mark.slow
def test_an_update_that_is_nan_on_a_masked_task_is_not_blamed_on_divergence():
    undefined = with_masks(UNDEFINED_AT_ALL_ZERO["normalized"], Reverse())
    with pytest.raises(
        NonFiniteError,
        match="inner loss or its gradient is not finite.*Without the "
        "zeros in its inner gradients it is finite.*update itself.*normalize_by",
    ):
        undefined.fit(Masked(), 2, key=KEY, progress=False)


def test_what_is_recommended_instead_of_a_division_by_zero_is_healthy():
    chained = optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1))
    assert checked(trainer(differentiable_at_zero(chained), inner_steps=1)).healthy


@dataclasses.dataclass(frozen=True)
class OwnRoot(Partly):
    """A norm that `step` takes itself, and a root that `loss` takes of what it drops."""

    eps: float = 0.0
    negative: bool = False

    def init(self, key):
        return {"used": jnp.ones(2)}

    def unroll(self, episode, key):
        def step(eta, theta, t, grad):
            slope = grad(lambda theta: (theta**2).sum())(theta)
            return theta - eta["used"] * slope / (jnp.sqrt((slope**2).sum() + self.eps) + 1)

        def outer(eta, theta):
            x = theta.sum()
            dropped = jnp.sqrt(-1 - x**2 if self.negative else 1 + x**2)
            return jnp.where(x < 99, x, x * dropped), {}

        return Unroll(lambda eta: jnp.ones(2), step, outer)


def test_a_norm_that_step_takes_itself_is_mended_as_the_message_says():
    def report(**options):
        return checked(Trainer(OwnRoot(**options), Reverse(), tasks_per_step=1))

    assert re.search(
        r"every inner gradient is exactly zero.*A norm that `step` takes itself needs "
        r"sqrt\(sum\(g\*\*2\) \+ 1e-12\)",
        str(report()),
    )
    assert report(eps=1e-12).healthy


def test_a_root_of_a_negative_number_in_the_outer_loss_is_not_blamed_on_zeros():
    report = checked(Trainer(OwnRoot(eps=1e-12, negative=True), Reverse(), tasks_per_step=1))
    assert re.search(r"no zero in any.*`loss` take such a root.*where\(used, x, 1\)", str(report))


@pytest.mark.slow
def test_a_failing_outer_optimizer_is_told_from_failing_tasks():
    broken = dataclasses.replace(trainer(optax.sgd(0.1)), optimizer=optax.sgd(math.inf))
    with pytest.raises(NonFiniteError, match=r"`meta_update_norm`.*Each of its tasks.*optimizer"):
        broken.fit(TASKS, 3, key=KEY, progress=False)


@pytest.mark.slow
def test_a_check_on_the_way_warns_and_lets_training_go_on():
    adam = trainer(optax.adam(0.1))
    with pytest.warns(HealthWarning, match="becomes NaN or infinite where") as caught:
        state = adam.fit(TASKS, 5, key=KEY, progress=False, check_every=2)
    assert len(caught) == 3 and int(state.step) == 5  # after steps 2, 4 and the last
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adam.fit(TASKS, 2, key=KEY, progress=False)


def test_a_report_without_findings_neither_raises_nor_warns():
    Report().raise_errors()
    Report().warn()
    assert Report().healthy


# ml-collections loads config files in a way that Python has deprecated.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
def test_the_command_line_checks_a_fresh_run_once_and_can_be_told_not_to(tmp_path, capsys):
    def shown(workdir, *words):
        given = ("--noprogress", "--config.eval_every=0", f"--workdir={tmp_path / workdir}")
        assert call(*SINUSOID, *given, *words) == 0
        return capsys.readouterr().out

    assert HEALTHY in shown("checked", ON)
    assert "Health" not in shown("checked", ON)  # resumed
    assert "Health" not in shown("unchecked")


@pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
def test_the_command_line_stops_before_a_run_that_would_fail(tmp_path, capsys):
    wild = "--config.algorithm.optimizer.learning_rate=1e38"
    assert call(*SINUSOID, ON, "--noprogress", f"--workdir={tmp_path}", wild) == 2
    captured = capsys.readouterr()
    assert "metalearn: On the first task the outer loss is" in captured.err
    assert not (tmp_path / "metrics.jsonl").exists()
