"""`metalearn doctor`: what it finds, and that it fails where something must work and does not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from metalearn import ES, MixedFlow, Reverse
from metalearn.experiments.build.registry import ENGINES
from metalearn.experiments.commands import doctor
from metalearn.experiments.commands.doctor import Finding, compared, of_configs, wandb_state
from tests.helpers.command_line import call


@dataclasses.dataclass(frozen=True)
class Wrong(MixedFlow):
    """An engine that is off by a thousandth."""

    def value_and_grad(self, unroll, eta, batches, state=()):
        outputs, grads = super().value_and_grad(unroll, eta, batches, state)
        return outputs, jax.tree.map(lambda g: 1.001 * g, grads)


class Broken(MixedFlow):
    """An engine that fails."""

    def value_and_grad(self, unroll, eta, batches, state=()):
        raise RuntimeError("no such kernel\nand more")


def chosen(monkeypatch, **engines):
    """Let the doctor know these engines alone; return what it finds of them."""
    monkeypatch.setattr(doctor, "ENGINES", engines)
    return {finding.name: finding for finding in doctor.engines()}


@pytest.mark.slow
def test_exact_engines_agree_and_reverse_agrees_with_central_differences(monkeypatch):
    found = chosen(monkeypatch, mixed_flow=MixedFlow, reverse=Reverse)
    assert all(finding.works for finding in found.values())
    assert "Reverse(): differs from central differences by" in found["reverse"].text
    assert "MixedFlow(): differs from reverse by" in found["mixed_flow"].text
    assert "compiled in" in found["reverse"].text


def test_an_engine_that_is_wrong_or_fails_is_named(monkeypatch):
    found = chosen(monkeypatch, reverse=Reverse, wrong=Wrong, broken=Broken)
    assert not found["wrong"].works and "differs from reverse by 1e-03" in found["wrong"].text
    assert found["broken"] == Finding("broken", "RuntimeError: no such kernel", works=False)


def test_an_estimate_is_judged_by_its_direction():
    expected = jnp.array([1.0, 2.0])
    assert compared(ES(), 3 * expected, expected)[1]
    assert not compared(ES(), -expected, expected)[1]
    assert not compared(ES(), jnp.array([jnp.nan, 1.0]), expected)[1]
    assert not compared(MixedFlow(), jnp.array([jnp.nan, 1.0]), expected)[1]


@pytest.mark.slow
def test_every_engine_works_here():
    found = list(doctor.engines())
    assert {finding.name for finding in found} == {*ENGINES}
    assert all(finding.works for finding in found), found


def test_datasets_of_configs_are_named_with_the_command_that_prepares_them(monkeypatch):
    assert of_configs()["omniglot"] == ["maml_omniglot"]
    assert of_configs()["cifar100"] == ["protonet_cifar_fs", "r2d2_fc100"]
    assert {"tiny_shakespeare", "fashion_mnist"} <= {*of_configs()}
    # Which are part of the installation, and a folder of the user's own.
    assert not {"digits", "mini_imagenet"} & {*of_configs()}
    monkeypatch.setattr(doctor, "of_configs", lambda: {"cifar10": ["mine"]})
    found = {finding.name: finding for finding in doctor.datasets()}
    assert all(finding.works for finding in found.values())  # those that lack are no fault
    assert "read: 5,752 examples" in found["digits"].text
    assert "not prepared. Once: tfds build cifar10 --data_dir=" in found["cifar10"].text


@pytest.mark.parametrize(
    ("variables", "state"),
    [
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "disabled, by $WANDB_MODE"),
        ({"WANDB_API_KEY": "k"}, "online: logged in by an environment variable"),
        ({"NETRC": "here"}, "online: logged in to api.wandb.ai"),
        ({"NETRC": "here", "WANDB_BASE_URL": "https://own.example"}, "offline: not logged in."),
        ({"NETRC": "nowhere"}, "offline: not logged in."),
        ({"NETRC": "damaged"}, "offline: not logged in."),
    ],
)
def test_the_state_of_wandb_is_told_without_asking_anyone(variables, state, tmp_path):
    (tmp_path / "here").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / "damaged").write_text("machine\nlogin")
    if "NETRC" in variables:
        variables = variables | {"NETRC": str(tmp_path / variables["NETRC"])}
    assert wandb_state(variables).startswith(state)


def test_the_command_prints_what_it_finds_and_exits_with_1_where_something_is_broken(
    monkeypatch, capsys
):
    monkeypatch.setattr(doctor, "datasets", lambda: [])  # tested above
    monkeypatch.setattr(doctor, "ENGINES", {"reverse": Reverse})
    assert call("doctor") == 0
    shown = capsys.readouterr().out
    for text in (f"jax               {jax.__version__}", "\n  cpu:0 ", "\n  W&B ", "GiB free"):
        assert text in shown
    assert shown.endswith("Everything that must work does.\n")
    monkeypatch.setattr(doctor, "ENGINES", {"reverse": Reverse, "wrong": Wrong})
    assert call("doctor") == 1
    shown = capsys.readouterr().out
    assert "FAILED: Wrong(): differs from reverse by 1e-03" in shown
    assert shown.endswith("These must work and do not: wrong.\n")
