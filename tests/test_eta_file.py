"""Meta-parameters go out to a file under the user's own names, and into any model's parameters."""

import re
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metalearn import Trainer, load_eta, save_eta
from metalearn.algorithms import MAML, save_optimizer
from metalearn.models import NNX, Haiku, Linen
from tests.helpers.checkpoints import bits
from tests.helpers.update_rules import RULES

KEY = jax.random.key(0)
X = jnp.ones((1, 2))


class Learned(NamedTuple):
    params: dict
    rates: list


def eta():
    params = {"mlp/~/linear_0": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3, jnp.bfloat16)}}
    return Learned(params, [jnp.float32(1e-40), jnp.arange(2, dtype=jnp.float16)])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "eta.safetensors"


def test_an_eta_comes_back_as_nested_dictionaries_of_its_own_keys(path):
    save_eta(path, eta())
    loaded = load_eta(path)
    layer = loaded["params"]["mlp/~/linear_0"]  # a key with slashes is one key
    assert layer["b"].dtype == jnp.bfloat16 and isinstance(layer["w"], np.ndarray)
    assert loaded["rates"].keys() == {0, 1} and loaded["rates"][1].dtype == np.float16
    assert sorted(map(tuple, [b[1:] for b in bits(loaded)])) == sorted(b[1:] for b in bits(eta()))


def test_an_eta_comes_back_in_its_own_structure(path):
    save_eta(path, eta())
    shapes = jax.eval_shape(eta)
    assert bits(load_eta(path, like=eta())) == bits(load_eta(path, like=shapes)) == bits(eta())


def test_an_eta_that_is_one_array_comes_back_as_one(path):
    save_eta(path, jnp.arange(3.0))
    assert load_eta(path).tolist() == [0, 1, 2]
    assert load_eta(path, like=jnp.zeros(3)).tolist() == [0, 1, 2]


def test_complex_numbers_of_64_bits_are_kept_and_of_128_refused(path):
    save_eta(path, {"w": jnp.ones(2, jnp.complex64)})
    assert load_eta(path)["w"].dtype == np.complex64
    with pytest.raises(
        ValueError, match="safetensors cannot hold an array of this eta: .*complex12"
    ):
        save_eta(path, {"w": np.ones(2, np.complex128)})
    assert load_eta(path)["w"].dtype == np.complex64  # the file of before is still there


def linen_mlp():
    model = nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(1)])
    return Linen(model, jax.ShapeDtypeStruct(X.shape, X.dtype))


def nnx_mlp(rngs):
    return nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.tanh, nnx.Linear(3, 1, rngs=rngs))


def haiku_mlp(x):
    return hk.nets.MLP([3, 1])(x)


def learned(model):
    """The eta of MAML around a model, and what the model answers with it."""
    algorithm = MAML(model, learned_rates=0.1, optimizer=optax.sgd(1.0))
    eta = Trainer(algorithm).init(KEY).eta
    _, state = model.init(KEY)
    return eta, model.apply(eta.params, state, X, train=False)[0]


def test_an_eta_goes_into_the_parameters_of_a_linen_module(path):
    eta, expected = learned(linen_mlp())
    save_eta(path, eta)
    module = linen_mlp().module
    variables = module.init(jax.random.key(1), X)
    params = load_eta(path, like=variables["params"])
    assert (module.apply({"params": params}, X) == expected).all()


def test_an_eta_goes_into_an_nnx_module(path):
    eta, expected = learned(NNX(nnx_mlp))
    save_eta(path, eta)
    module = nnx_mlp(nnx.Rngs(1))
    nnx.update(module, load_eta(path, like=nnx.state(module, nnx.Param)))
    assert (module(X) == expected).all()


def test_an_eta_goes_into_the_parameters_of_a_haiku_function(path):
    eta, expected = learned(Haiku(haiku_mlp, jax.ShapeDtypeStruct(X.shape, X.dtype)))
    save_eta(path, eta)
    network = hk.without_apply_rng(hk.transform(haiku_mlp))
    params = load_eta(path, like=network.init(jax.random.key(1), X))
    assert (network.apply(params, X) == expected).all()


def test_an_eta_goes_into_an_equinox_module(path):
    trained, fresh = (eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(n)) for n in (0, 1))
    save_eta(path, {"net": eqx.filter(trained, eqx.is_inexact_array)})
    module = load_eta(path, like=fresh)  # its activations, which are no arrays, are its own
    assert (module(X[0]) == trained(X[0])).all() and module.activation is fresh.activation


def test_arrays_take_the_types_of_the_parameters_they_go_into(path):
    save_eta(path, {"w": jnp.ones(2)})
    assert load_eta(path, like={"w": jnp.zeros(2, jnp.bfloat16)})["w"].dtype == jnp.bfloat16


def test_names_and_shapes_that_do_not_match_are_listed(path):
    save_eta(
        path, {"params": {"head": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}, "rate": X}
    )
    like = {"head": {"kernel": jnp.ones((3, 4))}, "body": {"scale": jnp.ones(7)}}
    expected = (
        f"The parameters `like` are not those in the part 'params' of {path}:\n"
        "  not in the file: body/scale [7]\n"
        "  in the file alone: head/bias [5]\n"
        "  head/kernel has shape [3, 5] in the file and [3, 4] in `like`\n"
        "Give parameters of the model that was trained, of the same sizes."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        load_eta(path, like=like)


def test_a_long_list_of_names_is_cut(path):
    save_eta(path, {f"layer_{n:02}": jnp.ones(1) for n in range(20)})
    like = {f"block_{n:02}": jnp.ones(1) for n in range(20)}
    with pytest.raises(ValueError, match=r"alone: layer_00 \[1\], .* layer_07 \[1\] and 12 more\n"):
        load_eta(path, like=like)


def test_a_train_state_is_no_eta(path):
    state = Trainer(MAML(linen_mlp())).init(KEY)
    with pytest.raises(
        TypeError, match="`save_eta` takes eta, not the whole train state: `trainer."
    ):
        save_eta(path, state)


def test_two_arrays_of_one_name_are_refused(path):
    with pytest.raises(ValueError, match="Two arrays of eta have the path 'a/b'. Rename one of"):
        save_eta(path, {"a": {"b": X}, "a/b": X})


def test_a_file_that_is_not_there_is_refused_with_what_writes_one(path):
    with pytest.raises(
        FileNotFoundError, match=r"There is no file .*\. `metalearn export --workdi"
    ):
        load_eta(path)


def test_a_file_of_another_kind_is_refused(path):
    save_file({"w": np.ones(2)}, path)
    with pytest.raises(
        ValueError, match="is a safetensors file, but no eta of metalearn. `safeten"
    ):
        load_eta(path)
    path.write_bytes(b"not a file of ours")
    with pytest.raises(ValueError, match="is not a safetensors file, or is damaged or cut short"):
        load_eta(path)
    save_file(
        {"w": np.ones(2)}, path, {"format": "metalearn eta", "schema": "9", "metalearn": "7.0"}
    )
    with pytest.raises(
        ValueError, match="has schema 9, and this metalearn .* Load it with metalearn"
    ):
        load_eta(path)


@pytest.mark.parametrize(
    "keys", ['{"w": ["v"], "x": []}', '{"w": "w"}', '{"w": [{}]}', "[]", '{"w": 3}']
)
def test_a_file_whose_names_are_not_those_of_its_arrays_is_refused(path, keys):
    metadata = {"format": "metalearn eta", "schema": "1", "keys": keys}
    save_file({"w": np.ones(2)}, path, metadata)
    with pytest.raises(
        ValueError, match="is damaged: the names in its metadata are not those of its"
    ):
        load_eta(path)


def test_an_array_inside_an_array_is_refused(path):
    metadata = {"format": "metalearn eta", "schema": "1", "keys": '{"a": ["a"], "b": ["a", "b"]}'}
    save_file({"a": np.ones(2), "b": np.ones(2)}, path, metadata)
    with pytest.raises(ValueError, match="is damaged: 'b' lies inside an array"):
        load_eta(path)


def test_a_learned_optimizer_is_refused_with_what_loads_it(path):
    rule = next(iter(RULES.values()))
    save_optimizer(path, rule, rule.init(KEY))
    with pytest.raises(
        ValueError, match="holds a learned optimizer, which `metalearn.algorithms.load"
    ):
        load_eta(path)
