"""Seeds: different ones are different runs, and those below 2^32 draw what they always drew."""

import re

import jax
import numpy as np
import pytest

from metalearn.datasets import Corruption, Images, with_label_noise
from metalearn.experiments import build
from metalearn.experiments.build import key_of
from metalearn.experiments.cli import arguments, values
from metalearn.experiments.commands import run
from tests.helpers.command_line import SINUSOID
from tests.helpers.small_configs import small

pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
BELOW = (0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1)
ABOVE = (2**32, 2**32 + 7, 2**33, 2**63 - 1)


def bits(key):
    return tuple(np.ravel(jax.random.key_data(key)).tolist())


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("seed", BELOW)
def test_a_seed_of_32_bits_is_the_key_that_jax_makes_of_it(seed, wide):
    with jax.enable_x64(wide):
        assert bits(key_of(seed)) == bits(jax.random.key(seed))


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_no_two_seeds_are_one_key(kind):
    with jax.default_prng_impl(kind):
        assert len({bits(key_of(seed)) for seed in BELOW + ABOVE}) == len(BELOW + ABOVE)


@pytest.mark.parametrize("seed", ABOVE)
def test_a_seed_is_the_same_key_with_64_bit_numbers_and_without(seed):
    with jax.enable_x64(True):
        wide = bits(key_of(seed))
    with jax.enable_x64(False):
        assert bits(key_of(seed)) == wide


def test_numpys_integers_are_seeds():
    for seed in (np.int32(7), np.uint8(7), np.int64(2**40), np.uint64(2**40)):
        assert bits(key_of(seed)) == bits(key_of(int(seed)))


@pytest.mark.parametrize(
    "seed",
    [-1, -(2**32), 2**63, 2**64, 10**400, True, False, 3.0, "3", None, np.True_],
    ids=lambda seed: str(seed)[:30],
)
def test_what_is_no_seed_of_its_own_is_refused(seed):
    with pytest.raises(ValueError, match=re.escape(f"seed={seed!s:.80} is no seed: those are int")):
        key_of(seed)


def test_test_tasks_of_seeds_that_differ_in_their_upper_half_differ():
    config = small("maml_sinusoid")
    plain = build.to_json(config)
    splits = build.splits(plain["dataset"])
    trainer = build.trainer(plain, splits)
    state = trainer.init(jax.random.key(0), splits.train)
    losses = [run.test(trainer, state, splits, seed, 2)["loss"].mean for seed in (0, 2**32, 0)]
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("name", arguments.packaged())
def test_seeds_of_a_config_go_from_0_to_63_bits(name):
    plain = build.to_json(small(name))
    for seed in (0, 2**32, 2**63 - 1):
        values.check(plain | {"seed": seed})
    for seed in (-1, -(2**32)):
        with pytest.raises(ValueError, match=f"config.seed is {seed}, but it is 0 or more"):
            values.check(plain | {"seed": seed})


@pytest.mark.parametrize("seed", ["-1", "-4294967296"])
def test_a_negative_seed_is_refused_on_the_command_line(refused, tmp_path, seed):
    message = refused(*SINUSOID, f"--workdir={tmp_path / 'run'}", f"--config.seed={seed}")
    assert message == f"config.seed is {seed}, but it is 0 or more."


@pytest.mark.parametrize("seed", [True, -1, 2**32, 1.5, "1"])
def test_a_seed_of_numpys_generators_is_one_of_its_own_range(seed):
    with pytest.raises(ValueError, match="`Corruption` got seed=.*from 0 to 4294967295"):
        Corruption(seed=seed)


def test_seeds_of_label_noise_do_not_collide_at_32_bits():
    images = Images(np.zeros((99, 1, 1, 1), np.uint8), np.arange(99, dtype=np.int32) % 3)
    one, other = (with_label_noise(images, 0.5, seed).labels for seed in (1, 2**32 + 1))
    assert (one != other).any()
    with pytest.raises(ValueError, match=r"`with_label_noise\(seed=True\)`: it is an integer"):
        with_label_noise(images, 0.5, True)
