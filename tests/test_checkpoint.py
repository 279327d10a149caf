"""Checkpoints: all of a run comes back, bit for bit, or a message says why it cannot."""

import importlib.metadata
import platform
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metalearn
from metalearn.checkpoint import ChangedConfigError, Checkpoints, difference
from metalearn.train_state import TrainState


class Eta(NamedTuple):
    params: Any
    rates: Any


def a_state(seed=0, step=3) -> TrainState:
    """A state with a leaf of every kind there is, after one update so that none is zero."""
    key = jax.random.key(seed)
    w, b, low = jax.random.normal(key, (3, 2))
    params = {"w": w.at[0].set(-0.0), "b": [b, None], "low": low.astype(jnp.bfloat16)}
    eta = Eta(params, (jnp.float32(1e-40), jnp.arange(2, dtype=jnp.float16)))
    schedule = optax.cosine_decay_schedule(1e-3, 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    _, state = optimizer.update(eta, optimizer.init(eta), eta)
    return TrainState(jnp.asarray(step, jnp.int32), eta, state, jax.random.fold_in(key, 7))


def bits(tree):
    """The leaves of a pytree, as (path, type, bytes)."""

    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p), leaf.shape, str(leaf.dtype), raw(leaf)) for p, leaf in leaves]


@pytest.fixture
def opened(tmp_path):
    """A function that opens the checkpoints of one run; all are closed at the end."""
    made = []

    def open_(config=None, **options):
        made.append(Checkpoints(tmp_path / "run", config, **options))
        return made[-1]

    yield open_
    for checkpoints in made:
        checkpoints.close()


def saved(opened, config=None, state=None, loggers=None):
    checkpoints = opened(config)
    state = a_state() if state is None else state
    checkpoints.save(state, int(state.step), loggers or {})
    checkpoints.close()
    return state


def test_the_whole_train_state_comes_back_bit_for_bit(opened):
    state = saved(opened)
    other = a_state(seed=1, step=0)
    assert bits(other) != bits(state)
    restored, _ = opened().restore(other)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    drawn = [jax.random.bits(s.key, (4,)).tolist() for s in (restored, state)]
    assert drawn[0] == drawn[1]


def test_a_state_is_restored_from_shapes_alone(opened):
    state = saved(opened)
    assert bits(opened().restore_state(jax.eval_shape(lambda: state))) == bits(state)


def test_the_record_holds_the_config_the_versions_the_step_and_what_loggers_said(opened):
    config = {"seed": 3, "model": {"hidden": (40, 40)}}
    saved(opened, config, loggers={"WandbLogger": {"wandb_id": "abc"}})
    record = opened(config).record()
    assert record["config"] == {"seed": 3, "model": {"hidden": [40, 40]}}
    assert record["step"] == 3 and record["schema"] == 2
    libraries = ("jax", "jaxlib", "optax", "flax", "dm-haiku", "orbax-checkpoint")
    assert record["versions"] == {
        "metalearn": metalearn.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }
    _, loggers = opened(config).restore(a_state())
    assert loggers == {"WandbLogger": {"wandb_id": "abc"}}


def test_a_run_with_another_config_is_refused_with_the_difference(opened, tmp_path):
    old = {"seed": 0, "gone": 1.5, "model": {"name": "mlp", "hidden": (40, 40)}}
    new = {"seed": 0, "model": {"name": "mlp", "hidden": (40, 20)}, "chunk": None}
    saved(opened, old)
    expected = (
        f"The run in {tmp_path / 'run'} was started with another config:\n"
        "  config.chunk: '(absent)' -> None\n"
        "  config.gone: 1.5 -> '(absent)'\n"
        "  config.model.hidden: [40, 40] -> [40, 20]\n"
        "Give it the config it had, or train the new one in another workdir."
    )
    with pytest.raises(ChangedConfigError, match=f"^{re.escape(expected)}$"):
        opened(new).restore(a_state())


def test_the_same_config_is_the_same_whether_it_has_tuples_or_lists(opened):
    state = saved(opened, {"hidden": (40, 40)})
    restored, _ = opened({"hidden": [40, 40]}).restore(a_state(seed=1))
    assert bits(restored) == bits(state)


def test_differences_are_found_at_any_depth_and_in_the_order_of_keys():
    old = {"b": {"c": {"d": 1}}, "a": 1, "same": {"x": [1]}}
    assert difference(old, {"b": 2, "a": "1", "same": {"x": [1]}}) == [
        "config.a: 1 -> '1'",
        "config.b: {'c': {'d': 1}} -> 2",
    ]


def test_a_checkpoint_of_a_newer_schema_is_refused_by_name(opened, tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr("metalearn.checkpoint.SCHEMA", 3)
        newer.setattr("metalearn.__version__", "99.1")
        saved(opened)
    expected = (
        f"The checkpoint in {tmp_path / 'run'} has schema 3, and this version of metalearn reads "
        "schema 2. Resume it with metalearn 99.1, which wrote it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        opened().restore(a_state())


def test_the_last_few_checkpoints_are_kept_and_the_newest_is_restored(opened, tmp_path):
    checkpoints = opened(keep=2)
    for step in range(1, 6):
        checkpoints.save(a_state(step=step), step, {})
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["4", "5"]
    assert opened().latest() == 5
    assert int(opened().restore(a_state())[0].step) == 5


def test_an_empty_directory_returns_the_state_it_was_given(opened):
    state, checkpoints = a_state(), opened({"seed": 0})
    restored, loggers = checkpoints.restore(state)
    assert restored is state and loggers == {}
    assert checkpoints.latest() is None and checkpoints.record() is None
