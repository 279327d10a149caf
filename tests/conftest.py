"""What holds for every test: shapes are strict, caches the session's own, W&B is left ended."""

import gc
import os
import pathlib
import resource
import sys

import jax
import jaxlib
import pytest
from jaxtyping import install_import_hook

import tests.helpers.shapes  # noqa: F401  (the hook looks it up by name)

# The shapes and types that the signatures of these modules state, checked at every call (of a
# function inside jit: when it is traced).
install_import_hook(
    [
        "metalearn.algorithms.epochs",
        "metalearn.algorithms.fds.augmentation",
        "metalearn.algorithms.fds.schedule",
        "metalearn.algorithms.learned_optimizer.features",
        "metalearn.algorithms.loss_weights.features",
        "metalearn.algorithms.loss_weights.weighting",
        "metalearn.algorithms.objectives",
        "metalearn.datasets.few_shot",
        "metalearn.models.attention",
        "metalearn.models.convolution",
    ],
    "tests.helpers.shapes.check_arrays",
)

# Most of a test's time is compilation, of programs that then run for milliseconds. XLA's own
# passes, and with them memory and FLOPs, are as ever.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # two workers have a core each
]
if jaxlib.version.__version_info__ < (0, 11):  # later ones have these emitters alone
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # a third of the time
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

# A tenth of the time: tracebacks in the programs handed to XLA, and a garbage collector that walks
# all of JAX's caches again and again.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
jax.config.update(
    "jax_traceback_in_locations_limit", int(os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"])
)
gc.set_threshold(50_000, 10, 10)

# Compiled programs are kept from one run of the tests to the next, and for their child processes.
PROGRAMS = {
    "jax_compilation_cache_dir": str(pathlib.Path(__file__).resolve().parents[1] / ".jax_cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # of the user's own choice
    for name, value in PROGRAMS.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def ended_wandb():
    """End W&B's background process after a module, and with it the variable that names it.

    A test that sets the environment back would otherwise bring back the name of one that is gone.
    """
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Drop compiled programs after a module, once the process has held 3 GB: of all tests' 5 GB."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > 3e9:  # KiB; bytes on macOS
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def strict_shapes():
    """Refuse to add a [3] to a [2, 3]: such a sum is a mistake more often than not."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """Compute in float64, as every test that compares numbers does."""
    with jax.enable_x64(True):
        yield
