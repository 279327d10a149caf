"""Exported optimizers: one file, the same updates to the bit, and an error for every damage."""

import ast
import collections
import dataclasses
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import metalearn
from metalearn import algorithms
from metalearn.algorithms import (
    Gradient,
    HypergradientRule,
    Hyperparameter,
    Momenta,
    PerParameter,
    PointwiseMLP,
    TunedRule,
    UpdateRule,
    load_optimizer,
    load_rule,
    save_optimizer,
    sgd,
)
from metalearn.algorithms.learned_optimizer.export import digest
from metalearn.algorithms.learned_optimizer.rule_json import CLASSES, OPTIMIZERS, decode, encode
from metalearn.train_state import TrainState
from tests.helpers.selection import quick
from tests.helpers.update_rules import RULES, draw, generic

SCRIPT = Path(__file__).parents[3] / "docs" / "use_exported_optimizer.py"
LEARNED = {"learning_rate": Hyperparameter(1e-4, 1.0, 0.01, space="log")}
RULE = PerParameter((Gradient(),), PointwiseMLP((2,)), base=TunedRule(optax.adam, LEARNED))
NAMES = ["base/learning_rate"] + [f"network/{i}/{name}" for i in (0, 1) for name in "bw"]


@dataclasses.dataclass(frozen=True)
class SignRule(UpdateRule):
    """A rule of a user's own, whose eta is one array."""

    rate: float = 0.1

    def init(self, key):
        return jnp.log(self.rate)

    def optimizer(self, eta):
        return optax.with_extra_args_support(optax.sign_sgd(jnp.exp(eta)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "learned.safetensors"


@pytest.fixture
def saved(path):
    save_optimizer(path, RULE, generic(RULE))
    return path


def contents(path):
    """Return (arrays by name, metadata)."""
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())


def rewrite(path, weights=lambda w: w, metadata=lambda m: m):
    """Change what a file holds, its digest with it."""
    arrays, found = contents(path)
    arrays, found = weights(arrays), metadata(found)
    save_file(arrays, path, {**found, "sha256": digest(found, arrays)})


def refused(path, message, error=ValueError, **options):
    with pytest.raises(error, match=message):
        load_optimizer(path, **options)


# What comes back.


@functools.partial(jax.jit, static_argnums=0)
def moved(optimizer, params):
    """Return the updates of the third step."""
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    return updates


@pytest.mark.parametrize("name", quick(RULES, lambda name: name != "PerParameter-base"))
def test_a_loaded_optimizer_gives_the_same_updates_to_the_bit(path, name):
    rule, params = RULES[name], draw({"scalar": (), "matrix": (2, 3)}, dtype=jnp.float32)
    save_optimizer(path, rule, generic(rule))
    expected, ours = (
        moved(o, params) for o in (rule.optimizer(generic(rule)), load_optimizer(path))
    )
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(ours))


def test_a_loaded_rule_can_be_trained_further(saved):
    rule, eta = load_rule(saved)
    assert rule == RULE
    jax.tree.map(np.testing.assert_array_equal, eta, generic(RULE))
    assert jax.tree.structure(eta) == jax.tree.structure(generic(RULE))


def test_the_file_is_safetensors_with_weights_by_path_and_the_rule_in_its_metadata(saved):
    weights, metadata = contents(saved)
    assert sorted(weights) == NAMES
    assert metadata["schema"] == "1" and metadata["metalearn"] == metalearn.__version__
    rule = json.loads(metadata["rule"])
    assert rule["class"] == "PerParameter"
    assert rule["fields"]["base"]["fields"]["make"] == {"optimizer": "optax.adam"}
    assert os.listdir(saved.parent) == [saved.name]


def test_a_file_is_replaced_whole(saved):
    save_optimizer(saved, RULES["global"], RULES["global"].init(jax.random.key(0)))
    assert load_rule(saved)[0] == RULES["global"]


@pytest.mark.usefixtures("x64")
def test_a_float64_eta_is_kept_and_read_in_the_precision_there_is(path):
    eta = RULES["global"].init(jax.random.key(0))
    save_optimizer(path, RULES["global"], eta)
    assert load_rule(path)[1]["log_rate"].dtype == jnp.float64
    with jax.enable_x64(False):
        assert load_rule(path)[1]["log_rate"].dtype == jnp.float32


def test_a_rule_of_ones_own_is_loaded_where_it_is_known(path):
    save_optimizer(path, SignRule(0.5), jnp.log(0.25))
    assert list(contents(path)[0]) == ["eta"]
    grads = {"w": jnp.array([3.0, -4.0])}
    optimizer = load_optimizer(path, known=(SignRule,))
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    np.testing.assert_allclose(updates["w"], [-0.25, 0.25], rtol=1e-6)
    refused(path, r"holds a 'SignRule', which is no class of metalearn's.*`known=\(SignRule,\)`")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_saved_by_name_and_so_are_partials_of_them(name):
    make = OPTIMIZERS[name]
    assert decode(json.loads(json.dumps(encode(make)))) is make
    partial = functools.partial(make, 0.1, some=(1, None, True, "text"))
    back = decode(json.loads(json.dumps(encode(partial))))
    assert (back.func, back.args, back.keywords) == (
        partial.func,
        partial.args,
        partial.keywords,
    )


def test_every_public_rule_feature_and_network_can_be_saved():
    public = [getattr(algorithms, name) for name in algorithms.__all__]
    bases = algorithms.UpdateRule, algorithms.Feature, algorithms.Network
    found = {c for c in public if inspect.isclass(c) and issubclass(c, bases)} - {*bases}
    assert {*CLASSES.values()} == found | {Hyperparameter}
    assert all(name == cls.__name__ for name, cls in CLASSES.items())


def test_a_field_that_a_file_is_too_old_to_have_takes_its_default(saved):
    rewrite(saved, metadata=lambda m: {**m, "rule": m["rule"].replace('"step_scale": 0.001, ', "")})
    assert "step_scale" not in contents(saved)[1]["rule"]
    assert load_rule(saved)[0] == RULE


# What a script elsewhere does with it.


@pytest.mark.slow
def test_a_script_that_imports_the_loader_alone_trains_models_of_every_library(saved, tmp_path):
    imports = [
        node for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, ast.ImportFrom)
    ]
    ours = [node for node in imports if node.module.startswith("metalearn")]
    assert [(node.module, [n.name for n in node.names]) for node in ours] == [
        ("metalearn.algorithms", ["load_optimizer"])
    ]
    command = [sys.executable, SCRIPT, saved]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"(\w+)_model: ([\d.]+) -> ([\d.]+)", done.stdout)
    assert [name for name, *_ in lines] == ["linen", "nnx", "haiku"]
    assert all(float(after) < 0.5 * float(before) for _, before, after in lines)


# What is refused when it is saved.


def test_an_eta_of_another_rule_is_not_saved(path):
    eta = generic(RULE)
    with pytest.raises(ValueError, match="missing from eta: base/learning_rate. Save an eta with"):
        save_optimizer(path, RULE, {"network": eta["network"]})
    with pytest.raises(ValueError, match="in eta are none of the rule's: extra. Save an eta"):
        save_optimizer(path, RULE, {**eta, "extra": jnp.zeros(2)})
    with pytest.raises(
        ValueError, match=r"base/learning_rate in eta has shape \(2,\), and that of"
    ):
        save_optimizer(path, RULE, {**eta, "base": {"learning_rate": jnp.zeros(2)}})
    with pytest.raises(
        ValueError, match=r"is of bfloat16, and weights.*`jax.tree.map\(jnp.float32"
    ):
        save_optimizer(path, RULE, jax.tree.map(jnp.bfloat16, eta))
    assert not path.exists()


def test_two_weights_of_one_path_are_not_saved(path):
    class Twice(SignRule):
        def init(self, key):
            return {"a/b": jnp.zeros(()), "a": {"b": jnp.zeros(())}}

    with pytest.raises(ValueError, match="Two weights have one path: a/b, a/b. Rename one"):
        save_optimizer(path, Twice(), Twice().init(None))


def test_parts_that_cannot_be_read_back_are_not_saved(path):
    def mine(learning_rate):
        return sgd(learning_rate)

    rule = TunedRule(mine, LEARNED)
    message = r"mine.* cannot be written.*by name \(metalearn.sgd, .*`known=\(MyRule,\)`"
    with pytest.raises(ValueError, match=message):
        save_optimizer(path, rule, rule.init(jax.random.key(0)))
    namesake = dataclasses.make_dataclass("PerParameter", [], bases=(SignRule,), frozen=True)
    with pytest.raises(ValueError, match="class of yours is called 'PerParameter'.*Rename it"):
        save_optimizer(path, namesake(), jnp.zeros(()))


# What is refused when it is loaded.


def network(hidden, name="PointwiseMLP"):
    """A rule with a network, as in a file."""
    made = encode(RULE)
    made["fields"]["network"] = {"class": name, "fields": {"hidden": hidden}}
    return made


def nested(levels):
    made = encode(RULE)
    for _ in range(levels):
        made = {"class": "PerParameter", "fields": {"base": made}}
    return made


LARGE = {
    "layers": (network([2] * 20_000), "holds 5 arrays, .* whose networks have 20001 layers"),
    "layers of two networks": (
        {"class": "PerParameter", "fields": {**network([2] * 20)["fields"], "base": network([2])}},
        "holds 5 arrays, .* whose networks have 23 layers, each with a matrix and a bias",
    ),
    "a width": (
        network([10**9]),
        "arrays of 4 numbers at most, .* network that is 1000000000 wide",
    ),
    "the width of a GRU": (network(10**9, "PointwiseGRU"), "a network that is 1000000000 wide"),
    "a width beyond floats": (network([10**400]), "a network that is 10{400} wide"),
    "rules in rules": (nested(40), "a rule of parts in parts, more than 64 deep, as no rule is"),
    "lists in lists": ("[" * 10**5 + "]" * 10**5, "a rule of parts in parts, more than 64 deep"),
    "a class's name": ({"class": "x" * 10**6, "fields": {}}, "a name of 1000000 characters"),
    "a field's name": ({"class": "TunedRule", "fields": {"x" * 10**6: 1}}, "a name of 1000000"),
}


@pytest.mark.parametrize(("rule", "message"), LARGE.values(), ids=LARGE)
def test_a_rule_larger_than_its_weights_is_refused_before_it_is_built(saved, rule, message):
    text = rule if isinstance(rule, str) else json.dumps(rule)
    rewrite(saved, metadata=lambda m: {**m, "rule": text})
    began = time.process_time()
    refused(saved, f"{message}.*It was not written by `save_optimizer`")
    assert time.process_time() - began < 5  # to build one takes minutes, or all memory


def test_empty_arrays_with_a_long_axis_do_not_vouch_for_a_wide_network(saved):
    rewrite(saved, weights=lambda w: {name: np.zeros((0, 10**9), "f4") for name in w})
    rewrite(saved, metadata=lambda m: {**m, "rule": json.dumps(network([10**9]))})
    refused(saved, "holds arrays of 0 numbers at most, .* network that is 1000000000 wide")


def test_many_names_of_weights_and_long_ones_make_no_long_message(saved):
    rewrite(saved, lambda w: {**w, **{f"{i}{'x' * 9999}": np.zeros(1) for i in range(99)}})
    with pytest.raises(ValueError, match="are none of the rule's: .* and 91 more. It was") as said:
        load_optimizer(saved)
    assert len(str(said.value)) < 1500


def test_deep_and_wide_rules_are_loaded_with_their_weights(path):
    rate = Hyperparameter(1e-5, 1.0, 0.1, space="log")
    rule = TunedRule(
        functools.partial(functools.partial(sgd, momentum=0.5)), {"learning_rate": rate}
    )
    for layers in (0, 3, 50):
        rule = PerParameter((Gradient(),), PointwiseMLP((8,) * layers), base=rule)
    save_optimizer(path, rule, rule.init(jax.random.key(0)))
    assert encode(load_rule(path)[0]) == encode(rule)


def test_a_file_that_is_not_there_is_named(path):
    refused(path, r"no file .*learned.safetensors. `save_optimizer\(path, ", FileNotFoundError)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
def test_a_file_cut_short_is_refused(saved, kept):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(kept * len(whole))])
    refused(saved, "is not a safetensors file, or is damaged or cut short .*Copy it again")


def test_a_text_is_refused(path):
    path.parent.mkdir()
    path.write_text("learning_rate: 0.1\n" * 9)
    refused(path, "is not a safetensors file, or is damaged")


def test_one_flipped_bit_anywhere_is_found(saved):
    whole = saved.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged|schema|did not write it"):
            load_optimizer(saved)


def test_a_flipped_bit_in_a_weight_or_in_the_rule_is_found_by_the_digest(saved):
    whole = saved.read_bytes()
    for place in (len(whole) - 3, whole.index(b"step_scale") + 15):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        saved.write_bytes(damaged)
        refused(saved, "is damaged: its contents do not have the digest it was saved with")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_something_else_are_refused(path, metadata):
    path.parent.mkdir()
    save_file({"w": np.zeros(2)}, path, metadata)
    listed = "format" if metadata else "none"
    refused(path, f"not of an optimizer: `save_optimizer` did not write it. Its metadata: {listed}")


def test_a_later_schema_is_refused_with_the_version_that_reads_it(saved):
    rewrite(saved, metadata=lambda m: {**m, "schema": "7", "metalearn": "9.1"})
    refused(saved, r"has schema 7, and this metalearn \(.*\) reads schema 1. Load it with .* 9.1")


def test_missing_unexpected_and_misshapen_weights_are_named(saved):
    whole = saved.read_bytes()
    rewrite(saved, lambda w: {k: w[k] for k in w if k not in NAMES[:2]})
    refused(saved, "missing from .*: base/learning_rate, network/0/b. It was not written by")
    saved.write_bytes(whole)
    rewrite(saved, lambda w: {**w, "network/2/w": np.zeros(3)})
    refused(saved, "in .* are none of the rule's: network/2/w. It was not written by")
    saved.write_bytes(whole)
    rewrite(saved, lambda w: {**w, "network/1/b": np.zeros(3)})
    refused(saved, r"network/1/b in .* has shape \(3,\), and that of the rule has \(2,\)")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("PerParameter", "PerParametr", "'PerParametr', .*Did you mean 'PerParameter'"),
        ("optax.adam", "optax.adem", "No optimizer that can be loaded is called 'optax.adem'. Did"),
        ("optax.adam", "os.system", "No optimizer that can be loaded is called 'os.system'"),
        ("step_scale", "scale", "PerParameter has the fields features, network, scale, .*Load it"),
        (
            '"make"',
            '"made"',
            "TunedRule has the fields made, hyperparameters, and the one here make",
        ),
        ('{"optimizer"', '{"call"', "This is no part of an update rule: {'call': 'optax.adam'}"),
    ],
)
def test_a_rule_that_is_not_known_here_is_refused(saved, before, after, message):
    rewrite(saved, metadata=lambda m: {**m, "rule": m["rule"].replace(before, after)})
    refused(saved, message)


def test_what_is_known_is_a_class_with_a_name_of_its_own(saved):
    refused(saved, r"`known` holds dataclasses, not .*`known=\(MyRule,\)`", TypeError, known=(sgd,))
    namesake = dataclasses.make_dataclass("Momenta", [])
    refused(saved, "metalearn has a class 'Momenta' too. Rename yours", known=(namesake,))
    assert load_rule(saved, known=(Momenta,))[0] == RULE


def test_a_train_state_or_what_is_no_rule_is_refused_and_so_is_a_directory(tmp_path):
    rule = HypergradientRule()
    eta = rule.init(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), eta, (), jax.random.key(0))
    with pytest.raises(TypeError, match="not the whole train state: `state.eta`"):
        save_optimizer(tmp_path / "a", rule, state)
    with pytest.raises(TypeError, match="takes an UpdateRule, not dict"):
        save_optimizer(tmp_path / "a", eta, rule)
    with pytest.raises(ValueError, match="is a directory. Name the file in it"):
        load_optimizer(tmp_path)


def test_a_class_of_ones_own_may_be_given_alone(tmp_path):
    rule = HypergradientRule()
    save_optimizer(tmp_path / "a", rule, rule.init(jax.random.key(0)))
    load_optimizer(tmp_path / "a", known=HypergradientRule)


# What anybody may have written: a ValueError, or an optimizer.


RULE_TEXT = json.dumps(encode(RULE))


def with_rule(path, value):
    """Make a file hold another rule, its digest right."""
    text = value if isinstance(value, str) else json.dumps(value)
    rewrite(path, metadata=lambda m: {**m, "rule": text})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("3", "holds no update rule, but 3"),
        ("null", "holds no update rule, but None"),
        ('"PerParameter"', "holds no update rule, but 'PerParameter'"),
        ("[]", r"holds no update rule, but \(\)"),
        ("[1, [2]]", r"holds no update rule, but \(1, \(2,\)\)"),
        ('{"optimizer": "optax.adam"}', "holds no update rule, but <function adam"),
        ("{}", "This is no part of an update rule: {}"),
        ("", "The rule in .*learned.safetensors is not JSON: "),
        ("{", "The rule in .* is not JSON: "),
        ('{"class": "TunedRule"}', "This is no part of an update rule: {'class': 'TunedRule'}"),
        ('{"class": 3, "fields": {}}', "'class' of a part of an update rule is not 3"),
        ('{"class": "TunedRule", "fields": []}', r"'fields' of a part of an update .* is not \[\]"),
        ('{"class": "TunedRule", "fields": {}, "x": 1}', "This is no part of an update rule"),
        ('{"class": "TunedRule", "class": "Momenta", "fields": {}}', "'class' is set twice"),
        ('{"class": "Momenta", "fields": {"decays": 3}}', "No Momenta can be made of what the"),
        ('{"mapping": 3}', "'mapping' of a part of an update rule is not 3"),
        ('{"mapping": {"a": 1}}', "holds no update rule, but {'a': 1}"),
        ('{"optimizer": {}}', "'optimizer' of a part of an update rule is not {}"),
        ('{"partial": {"mapping": {}}, "args": [], "keywords": {}}', "Only an optimizer has arg"),
        ('{"partial": {"optimizer": "optax.adam"}}', "This is no part of an update rule"),
        ("[" * 100_000, "more than 64 deep"),
        ("[" * 500 + "]" * 500, "more than 64 deep"),
        ("[" * 40 + "]" * 40, "parts inside each other 32 deep"),
        ('{"mapping": {"a": ' * 40 + "1" + "}}" * 40, "more than 64 deep|32 deep"),
        (RULE_TEXT.replace("[2]", "[0]"), r"made of what the file holds: `PointwiseMLP\(hidden"),
        (RULE_TEXT.replace("[2]", f"[{10**90}]"), "arrays of 4 numbers at most, and a rule with"),
        (RULE_TEXT.replace("[2]", "[1000000000]"), "with a network that is 1000000000 wide"),
        (RULE_TEXT.replace('"log"', '"lag"'), "No Hyperparameter can be made .* called 'lag'"),
        (RULE_TEXT.replace("0.0001", '"a"'), "No Hyperparameter can be made of what the file"),
        (RULE_TEXT.replace("0.0001", "NaN"), "No Hyperparameter can be made of what the file"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_file_whose_rule_is_none_is_refused_in_a_sentence(saved, rule, message):
    with_rule(saved, rule)
    with pytest.raises(ValueError, match=message) as caught:
        load_optimizer(saved)
    assert len(str(caught.value)) < 600


FUZZ: dict = {
    "database": None,
    "deadline": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**9, 10**30, -(10**400), 0.5, 1e300, float("nan"), float("inf")]),
    st.sampled_from(["", "optax.adam", "PerParameter", "TunedRule", "mapping", "learning_rate"]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["class", "fields", "mapping", "args", "a"]), inner),
        st.fixed_dictionaries({"class": st.sampled_from([*CLASSES]), "fields": st.just({})}),
        st.fixed_dictionaries({"optimizer": st.sampled_from([*OPTIMIZERS])}),
    ),
    max_leaves=6,
)


def places(value, path=()):
    """The paths of all that is inside a JSON value, itself among them."""
    yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*path, key))


@st.composite
def mutated(draw, value):
    """A JSON value with some of its parts replaced, left out, moved or wrapped."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from([p for p in places(value) if p] or [("",)]))
        inside = value
        for key in parents:
            inside = inside[key]
        if not isinstance(inside, dict | list) or last == "":
            return draw(ANYTHING)
        how = draw(st.sampled_from(["replace", "leave out", "wrap", "add", "move"]))
        if how == "leave out":
            del inside[last]
        elif how == "wrap":
            inside[last] = draw(st.sampled_from([[inside[last]], {"mapping": inside[last]}]))
        elif how == "add" and isinstance(inside, dict):
            inside[draw(st.sampled_from(["x", "make", "hidden", "class"]))] = draw(ANYTHING)
        elif how == "move":
            inside[last] = json.loads(json.dumps(value))
        else:
            inside[last] = draw(ANYTHING)
    return value


def only_our_errors(load):
    try:
        load()
    except (ValueError, OSError) as error:
        assert str(error)
        return "refused"
    return "loaded"


@pytest.mark.slow
def test_a_mutated_rule_is_loaded_or_refused_with_a_value_error(tmp_path):
    assert fuzzed_rules(tmp_path, 150)["refused"] > 50


@pytest.mark.slow
def test_many_mutated_rules_are_loaded_or_refused_with_a_value_error(tmp_path):
    assert fuzzed_rules(tmp_path, 2000)["refused"] > 500


def fuzzed_rules(folder, examples):
    path, outcomes = folder / "a.safetensors", collections.Counter()
    rules = [RULE, *(RULES[name] for name in sorted(RULES))]
    bases = [json.loads(json.dumps(encode(rule))) for rule in rules]

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=examples, derandomize=True, **FUZZ)
    @hypothesis.given(st.data())
    def run(data):
        which = data.draw(st.integers(0, len(rules) - 1))
        changed = data.draw(mutated(bases[which]))
        save_optimizer(path, rules[which], generic(rules[which]))
        with_rule(path, changed)
        outcomes[only_our_errors(lambda: load_optimizer(path))] += 1

    run()
    return outcomes


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int64", "bool", "complex64"])
def test_weights_of_other_types_are_refused(saved, dtype):
    arrays, metadata = contents(saved)
    name = NAMES[0]
    arrays[name] = np.zeros(arrays[name].shape, jnp.dtype(dtype))
    try:
        save_file(arrays, saved, {**metadata, "sha256": digest(metadata, arrays)})
    except Exception:
        pytest.skip("safetensors does not write it")
    assert only_our_errors(lambda: load_optimizer(saved)) == "refused"
    refused(saved, f"{dtype}|is not a safetensors file")


def test_metadata_of_any_kind_is_refused_with_a_value_error(saved):
    whole = saved.read_bytes()
    for key in ("format", "schema", "metalearn", "rule", "sha256"):
        for text in (None, "", "0", "\x00", "[" * 9999, "é" * 9):
            saved.write_bytes(whole)
            arrays, metadata = contents(saved)
            changed = {name: x for name, x in metadata.items() if name != key}
            changed |= {} if text is None else {key: text}
            if key != "sha256":
                changed["sha256"] = digest(changed, arrays)
            save_file(arrays, saved, changed)
            outcome = only_our_errors(lambda: load_optimizer(saved))
            assert outcome == "refused" or key == "metalearn"
