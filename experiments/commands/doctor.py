"""`metalearn doctor`: whether this machine can run what metalearn has, and what it lacks.

Versions, devices, the datasets of the packaged configs, W&B, the cache of compiled programs; then
one small meta-gradient under every engine, in float64. The exact engines are compared with
`Reverse`, and that with central differences along a direction v of eta,

    (F(eta + h v) - F(eta - h v)) / 2h  =  dF/deta . v + O(h^2);

the estimates need only point the same way. Nothing asks for input, and nothing needs a network.
What must work and does not is marked, and makes the exit status 1; a dataset that is not prepared
is not such a fault.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import math
import netrc
import os
import pathlib
import platform
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp

from metalearn import (
    ES,
    PES,
    SAMA,
    Implicit,
    InverseVariance,
    MetaGradient,
    Reverse,
    Truncated,
    Unroll,
)
from metalearn._utils.checks import first_line
from metalearn._utils.device_memory import device_memory, show_bytes
from metalearn.algorithms import MAML, sgd, squared_error
from metalearn.checkpoints.record import versions
from metalearn.datasets import Sinusoid, digits
from metalearn.datasets.reading import builder_of, cache_dir, check_prepared, prepare_command
from metalearn.engines.inner_loop import rollout
from metalearn.experiments.build.registry import ENGINES
from metalearn.experiments.cli.arguments import packaged
from metalearn.experiments.cli.compilation_cache import FOLDER
from metalearn.experiments.commands.summary import show
from metalearn.models import Functions
from metalearn.planning.step_cost import short_repr

APPROXIMATE = (Implicit, SAMA, Truncated)  # tried on a loop that converges
OPTIONAL = {"equinox": "models of Equinox", "optuna": "metalearn sweep"}
IN_TFDS = {"cifar_fs": "cifar100", "fc100": "cifar100"}  # where it has another name
EXACT = 1e-6  # largest relative difference of an exact engine, in float64
ALIKE = 0.5  # smallest cosine of an estimate
PAIRS = 64  # of the estimates: their cosine is then above 0.8
FEW = 2**30  # bytes of disk that a run should have


class Finding(NamedTuple):
    """Something that was looked at.

    Args:
      name: of it.
      text: what was seen.
      works: False where it must work and does not.
    """

    name: str
    text: str
    works: bool = True


class Gradient(NamedTuple):
    """A meta-gradient of one engine.

    Args:
      grads: [n], flat.
      loss: (), the outer loss.
      compiling: seconds to compile it.
      running: seconds to run it once more.
    """

    grads: jax.Array
    loss: jax.Array
    compiling: float
    running: float


def diagnose() -> int:
    """Print what is found on this machine; return 1 where something must work and does not."""
    sections = {
        "versions": library_versions,
        "devices": devices,
        "datasets": datasets,
        "tracking and cache": tracking_and_cache,
        "a meta-gradient in every engine": engines,
    }
    broken = []
    for title, look in sections.items():
        found = list(look())
        broken += [finding.name for finding in found if not finding.works]
        if found:
            show(title, {f.name: f.text if f.works else f"FAILED: {f.text}" for f in found})
    if broken:
        print(f"\nThese must work and do not: {', '.join(broken)}.")
        return 1
    print("\nEverything that must work does.")
    return 0


def library_versions() -> Iterator[Finding]:
    """Yield the versions of Python and of the libraries, those that are optional last."""
    for name, version in versions().items():
        yield Finding(name, version)
    for name, purpose in OPTIONAL.items():
        if importlib.util.find_spec(name):
            yield Finding(name, importlib.metadata.version(name))
        else:
            yield Finding(name, f"not installed ({purpose}): pip install {name}")


def devices() -> Iterator[Finding]:
    """Yield the devices that JAX sees, with their memory."""
    for device in jax.local_devices():
        memory = show_bytes(device_memory(device))
        yield Finding(f"{device.platform}:{device.id}", f"{device.device_kind}, {memory}")
    yield Finding("host", f"{_cores()} cores for this process, {platform.platform()}")
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        yield Finding(
            "GPU",
            "this machine has one that JAX does not see. Install JAX for it: pip install "
            '"jax[cuda12]"',
        )


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def datasets() -> Iterator[Finding]:
    """Yield the datasets of the packaged configs: read, prepared, or how to prepare them."""
    import tensorflow_datasets as tfds

    where = pathlib.Path(tfds.core.constants.DATA_DIR).expanduser()
    source = "$TFDS_DATA_DIR" if os.environ.get("TFDS_DATA_DIR") else "TFDS's default"
    yield Finding("directory", f"{where} ({source}{'' if where.is_dir() else ', not there yet'})")
    try:
        examples = sum(int(digits(split).counts.sum()) for split in ("train", "test"))
        yield Finding("digits", f"read: {examples:,} examples, part of the installation")
    except Exception as error:  # whatever it is, the embedded dataset cannot be read
        yield Finding("digits", first_line(error), works=False)
    for name, configs in of_configs().items():
        yield Finding(name, f"{_prepared(name)} (config {', '.join(configs)})")


def of_configs() -> dict[str, list[str]]:
    """Return the TFDS datasets that packaged configs read, each with its configs."""
    configs: dict[str, list[str]] = {}
    for config in packaged():
        module = importlib.import_module(f"metalearn.experiments.configs.{config}")
        dataset = module.get_config().dataset
        name = dataset.get("tfds") or IN_TFDS.get(dataset.name, dataset.name)
        if name not in ("digits", "sinusoid", "mini_imagenet"):  # nothing of TFDS
            configs.setdefault(name, []).append(config)
    return configs


def _prepared(name: str) -> str:
    """Say whether a TFDS dataset can be read, and else how to prepare it."""
    try:
        builder = builder_of(name)
        if not builder.data_path.exists():
            return f"not prepared. Once: {prepare_command(builder.name, builder.data_dir_root)}"
        check_prepared(builder)
    except (OSError, ValueError) as error:
        return first_line(error)
    return f"prepared, version {builder.version}"


def tracking_and_cache() -> Iterator[Finding]:
    """Yield what W&B would do, and where compiled programs are kept."""
    yield Finding("W&B", wandb_state(os.environ))
    own = getattr(jax.config, FOLDER)
    try:
        folder = pathlib.Path(own) if own else cache_dir()
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        size = show_bytes(sum(path.stat().st_size for path in files))
        yield Finding("compiled programs", f"{folder}: {size} in {len(files):,} files")
    except OSError as error:  # a run compiles again, and prepares no dataset
        yield Finding("compiled programs", first_line(error), works=False)
    for name, place in {"disk here": pathlib.Path.cwd(), "disk of the cache": _cache()}.items():
        free = shutil.disk_usage(place).free
        low = "; a run's checkpoints may not fit" if free < FEW else ""
        yield Finding(name, f"{show_bytes(free)} free{low}")


def _cache() -> pathlib.Path:
    try:
        return cache_dir()
    except OSError:
        return pathlib.Path.cwd()


def wandb_state(environment: Mapping[str, str]) -> str:
    """Return what `wandb.mode="auto"` does here: nobody is asked, and no server.

    Args:
      environment: variables: WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL and NETRC are looked at.
    """
    mode = environment.get("WANDB_MODE")
    if mode:
        return f"{mode}, by $WANDB_MODE"
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online: logged in by an environment variable"
    host = urllib.parse.urlparse(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    path = pathlib.Path(environment.get("NETRC") or "~/.netrc").expanduser()
    try:
        known = host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        known = False
    if known:
        return f"online: logged in to {host}"
    return "offline: not logged in. `wandb login` once, or `wandb sync` the runs later"


def engines() -> Iterator[Finding]:
    """Yield how the meta-gradient of each engine compares, and how long it took."""
    with jax.enable_x64(True):
        try:
            small, converging, expected = small_problem(), converging_problem(), None
        except Exception as error:  # any failure is what this command is for
            yield Finding("engines", f"{type(error).__name__}: {first_line(error)}", works=False)
            return
        for name, build in sorted(ENGINES.items(), key=lambda item: item[0] != "reverse"):
            engine = _with_pairs(build())
            problem = converging if isinstance(engine, APPROXIMATE) else small
            try:
                gradient = meta_gradient(engine, problem)
            except Exception as error:
                yield Finding(name, f"{type(error).__name__}: {first_line(error)}", works=False)
                continue
            if name == "reverse":
                expected = gradient.grads
                text, works = _against_differences(expected, problem)
            elif expected is None:
                text, works = "there is no gradient of reverse to compare with", False
            elif problem is converging:
                exact = meta_gradient(Reverse(), converging).grads
                text, works = compared(engine, gradient.grads, exact)
            else:
                text, works = compared(engine, gradient.grads, expected)
            took = f"compiled in {gradient.compiling:.1f} s, {1e3 * gradient.running:.1f} ms"
            yield Finding(name, f"{short_repr(engine)}: {text}; {took}", works)


def _with_pairs(engine: MetaGradient) -> MetaGradient:
    """Return an estimate with enough pairs to be judged by one call; any other as it is."""
    if isinstance(engine, ES | PES):
        return dataclasses.replace(engine, pairs=PAIRS)
    if isinstance(engine, InverseVariance):
        return dataclasses.replace(engine, estimator=ES(pairs=PAIRS))
    return engine


def compared(engine: MetaGradient, grads: jax.Array, expected: jax.Array) -> tuple[str, bool]:
    """Return (how a meta-gradient compares with that of reverse, whether that is good enough)."""
    if isinstance(engine, ES | PES | InverseVariance | Implicit | SAMA | Truncated):
        cosine = float(grads @ expected / (jnp.linalg.norm(grads) * jnp.linalg.norm(expected)))
        kind = "approximation" if isinstance(engine, APPROXIMATE) else "estimate"
        return f"an {kind}, cosine {cosine:.2f} with reverse", cosine > ALIKE
    error = relative_error(grads, expected)
    return f"differs from reverse by {error:.0e}", error < EXACT


def relative_error(value: jax.Array, expected: jax.Array) -> float:
    """Return |value - expected| / |expected|; infinite where it is not finite."""
    error = float(jnp.linalg.norm(value - expected) / jnp.linalg.norm(expected))
    return error if math.isfinite(error) else math.inf


def _against_differences(grads: jax.Array, problem: Problem) -> tuple[str, bool]:
    """Compare a gradient with central differences of the outer loss along a random direction."""
    direction = jax.random.normal(jax.random.key(2), problem.eta.shape)
    step = 1e-5
    high, low = (problem.loss(problem.eta + sign * step * direction) for sign in (1, -1))
    slope = (high - low) / (2 * step)
    error = relative_error((grads @ direction)[None], slope[None])
    return f"differs from central differences by {error:.0e}", error < EXACT


class Problem(NamedTuple):
    """A small problem to compare engines by."""

    loss: Callable[[jax.Array], jax.Array]  # eta [n] -> outer loss (), compiled
    eta: jax.Array  # [n]
    gradient: Callable[[MetaGradient], Any]  # engine -> (eta [n] -> (loss, gradient [n])), jitted


def small_problem() -> Problem:
    """Return two inner steps of MAML on ten points of a sine wave, with 25 parameters."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        first, bias, last = jax.random.normal(key, (3, 8))
        return {"in": first[None], "bias": bias[None], "out": last[:, None], "b": jnp.zeros((1, 1))}

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"] + params["b"]

    algorithm = MAML(Functions(init, apply), squared_error, sgd(0.01), inner_steps=2)
    key = jax.random.key(0)
    episode = Sinusoid(shots=10, queries=10).sample(jax.random.key(1))
    episode = jax.tree.map(lambda x: x.astype(jnp.float64), episode)
    eta, unravel = jax.flatten_util.ravel_pytree(algorithm.init(key))
    return _compiled(algorithm.unroll(episode, key), algorithm.batches(episode, key), eta, unravel)


def converging_problem() -> Problem:
    """Return gradient descent that converges, to theta + theta^3 = eta."""

    def step(eta: jax.Array, theta: jax.Array, batch: jax.Array, grad: Any) -> jax.Array:
        del batch
        return theta - 0.4 * grad(lambda x: jnp.sum(x**2 / 2 + x**4 / 4 - x * eta))(theta)

    def loss(eta: jax.Array, theta: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.sum((theta - 1) ** 2), {}

    unroll = Unroll(jnp.zeros_like, step, loss)
    return _compiled(unroll, jnp.arange(50), jnp.linspace(0.1, 1.0, 5), lambda eta: eta)


def _compiled(unroll: Unroll, batches: Any, eta: jax.Array, unravel: Any) -> Problem:
    key = jax.random.key(0)

    @jax.jit
    def loss(flat: jax.Array) -> jax.Array:
        return rollout(unroll, unravel(flat), batches)[0]

    def gradient(engine: MetaGradient) -> Any:
        def solve(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
            point = unravel(flat)
            state = engine.init(key, unroll, point)
            (value, _), grads = engine.value_and_grad(unroll, point, batches, state)
            return value, jax.flatten_util.ravel_pytree(grads)[0]

        return jax.jit(solve)

    return Problem(loss, eta, gradient)


def meta_gradient(engine: MetaGradient, problem: Problem) -> Gradient:
    """Compile and run the meta-gradient of an engine on a small problem."""
    start = time.perf_counter()
    compiled = problem.gradient(engine).lower(problem.eta).compile()
    compiling = time.perf_counter() - start
    jax.block_until_ready(compiled(problem.eta))
    start = time.perf_counter()
    loss, grads = jax.block_until_ready(compiled(problem.eta))
    return Gradient(grads, loss, compiling, time.perf_counter() - start)
