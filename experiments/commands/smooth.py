"""`metalearn smooth`: is the meta-gradient of a config worth following?

    metalearn smooth --config=fds_digits --out=smooth.png
    metalearn smooth --config=learning_rates_shakespeare --search --trials=12

On the first task, at the initial eta: what the meta-gradient predicts against what happens, by
direction and step size, the metasmoothness, and a verdict (`metalearn.diagnostics.smoothness`).

`--search` tries settings of the config that are known to change it, those of `LEVERS` that it has:
each trial is three inner runs, no outer training, with another `eps_root`, inner learning rate,
batch or width. Optuna suggests them, as in `metalearn sweep`. It prints the trials that no other
beats in both metasmoothness and the outer loss that the inner run ends with.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import math
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from metalearn import ES, PES, InverseVariance, Tasks, Trainer
from metalearn._utils import strict_json
from metalearn._utils.checks import at_least, first_line
from metalearn._utils.readable import aligned
from metalearn.algorithms.pictures import row_of_panels
from metalearn.diagnostics import Smoothness, smoothness
from metalearn.diagnostics.smoothness import AGREES, roughness, three_runs
from metalearn.experiments import build
from metalearn.experiments.build.registry import optimizer_function, parameters
from metalearn.experiments.sweep.space import Parameter
from metalearn.experiments.sweep.study import (
    Settings,
    Study,
    library,
    shown,
    write_settings,
)
from metalearn.train_state import TrainState

HEADER = ("direction", "slope", "holds from", "to", "metasmoothness", "curvature")
TRIALS = 12
EPS_ROOT = "algorithm.optimizer.eps_root"
RATES = (  # of inner steps
    "algorithm.optimizer.learning_rate",
    "algorithm.initial",
    "algorithm.hyperparameters.learning_rate.start",
)
DECAY = "algorithm.optimizer.decay_steps"  # the rate falls to zero over so many inner steps
BATCHES = ("algorithm.batch", "dataset.batch")
WIDTHS = ("model.width", "model.filters", "model.hidden")
LEVERS = ", ".join((EPS_ROOT, *RATES, DECAY, *BATCHES, *WIDTHS))


class Trial(NamedTuple):
    """Settings that were tried.

    Args:
      settings: values by key of the config; {}: the config as it is.
      metasmoothness: along one random direction.
      loss: the outer loss at the initial eta.
    """

    settings: Mapping[str, Any]
    metasmoothness: float
    loss: float


class Options(NamedTuple):
    """The options of the command.

    Args:
      as_json: print JSON and nothing else.
      out: of the picture; None: none.
      search: try other settings.
      trials: how many; None: `TRIALS`.
      workdir: keeps the trials of a search, which the same command continues; None: nothing does.
      seed: of the sampler.
      words: of the command line that make the config, which a search in a workdir keeps.
    """

    as_json: bool = False
    out: pathlib.Path | None = None
    search: bool = False
    trials: int | None = None
    workdir: pathlib.Path | None = None
    seed: int = 0
    words: tuple[str, ...] = ()


def show(config: Any, options: Options) -> None:
    """Print the smoothness of a config and its verdict, or JSON; draw it; search other settings."""
    if not options.search and (options.trials is not None or options.workdir is not None):
        name = "workdir" if options.trials is None else "trials"
        raise ValueError(f"--{name} is of `metalearn smooth --search`. Add --search, or leave it.")
    at_least("metalearn smooth", 1, trials=options.trials)
    plain = build.to_json(config)
    space = levers(plain) if options.search else []
    result = measured(plain)
    if not options.as_json:
        print("\n".join(table(result)), flush=True)
    if options.out is not None:
        _draw(options.out, result)
    trials = [] if not options.search else search(plain, space, options)
    if options.as_json:
        print(strict_json.dumps(to_json(result, trials), indent=2))
    elif trials:
        print("\n" + "\n".join(frontier_table(trials)))


def warning(plain: Mapping[str, Any], trainer: Trainer, state: TrainState, tasks: Tasks) -> str:
    """Return what a run is warned of before it starts: that its meta-gradient predicts nothing.

    That is measured where it is likely, so that no other config compiles a program for it: in
    loops of `LONG` inner steps or more whose optimizer divides by the root of a second moment, as
    Adam does, differentiated by an engine that goes through the loop.
    """
    estimate = isinstance(trainer.engine, ES | PES | InverseVariance)
    if estimate or not divides_by_root(plain["algorithm"].get("optimizer")):
        return ""
    return roughness(trainer, state, tasks)


def divides_by_root(optimizer: Mapping[str, Any] | None) -> bool:
    """Return whether an inner optimizer of a config takes `eps_root`."""
    name = (optimizer or {}).get("name")
    return bool(name) and "eps_root" in parameters(optimizer_function(str(name)))


def built(plain: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return (trainer, initial state, tasks) of a config."""
    splits = build.splits(plain["dataset"])
    open_config = {**plain, "engine": "mixed_flow", "engine_options": {}}
    trainer = build.trainer(open_config, splits, build.layout(open_config))
    tasks = trainer.place(splits.train)
    return trainer, trainer.init(build.key_of(plain["seed"]), tasks), tasks


def measured(plain: Mapping[str, Any]) -> Smoothness:
    """Return the smoothness of a config at its initial eta, on its first task."""
    return smoothness(*built(plain))


def table(result: Smoothness) -> Iterator[str]:
    """Yield the lines of a table of predictions, and the verdict."""
    steps = f"{result.inner_steps} inner step{'s' * (result.inner_steps != 1)}"
    yield (
        f"One task of {steps}, outer loss {result.loss:.4g}; {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}"
    )
    yield ""
    rows = []
    for each in result.predictions:
        low, high = each.reach
        span = (f"{low:.1e}", f"{high:.1e}") if math.isfinite(high) else ("nowhere", "")
        numbers = f"{each.metasmoothness:.3f}", f"{each.curvature:.2g}"
        rows.append((each.name, f"{each.slope:.3g}", *span, *numbers))
    yield from aligned([HEADER, *rows], left=1)
    yield ""
    yield (
        f"Predictions hold within {AGREES:.0%} between these step sizes; 1 moves eta by its own "
        f"scale. The first outer step is one of {result.outer_step:.1e}. Metasmoothness and "
        f"curvature at {result.step:g}, of the outer step at its own length."
    )
    for name, norms in (("tangents", result.tangents), ("cotangents", result.cotangents)):
        chosen = [norms[0], norms[len(norms) // 2], norms[-1]]
        yield f"Norm of {name} after the first, middle and last step: " + ", ".join(
            f"{value:.2g}" for value in chosen
        )
    yield ""
    yield result.verdict


def to_json(result: Smoothness, trials: Sequence[Trial] = ()) -> dict[str, Any]:
    """Return a smoothness, and the trials of a search, as JSON values."""
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "worth": result.worth,
        "verdict": result.verdict,
        "inner_steps": result.inner_steps,
        "loss": _finite(result.loss),
        "step": result.step,
        "outer_step": _finite(result.outer_step),
        "metasmoothness": _finite(result.metasmoothness),
        "predictions": [
            {
                "direction": each.name,
                "slope": _finite(each.slope),
                "sizes": [*each.sizes],
                "changes": [*map(_finite, each.changes)],
                "reach": [*map(_finite, each.reach)],
                "metasmoothness": _finite(each.metasmoothness),
                "curvature": _finite(each.curvature),
            }
            for each in result.predictions
        ],
        "tangents": [*map(_finite, result.tangents)],
        "gradient_tangents": [*map(_finite, result.gradient_tangents)],
        "cotangents": [*map(_finite, result.cotangents)],
        "trials": [
            {**trial._asdict(), "settings": dict(trial.settings), "best": trial in frontier(trials)}
            for trial in trials
        ],
    }


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _draw(path: pathlib.Path, result: Smoothness) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(result).savefig(path, dpi=120)


def figure(result: Smoothness) -> Any:
    """Draw predicted and actual changes by step size, and the norms by inner step."""
    drawn, (left, right) = row_of_panels(2)
    for number, each in enumerate(result.predictions):
        changes = [abs(change) or math.nan for change in each.changes]
        predicted = [abs(each.slope) * h for h in each.sizes]
        left.plot(each.sizes, changes, "o", color=f"C{number}", markersize=4, label=each.name)
        left.plot(each.sizes, predicted, "-", color=f"C{number}", linewidth=0.8)
    left.axvline(result.outer_step, color="0.6", linestyle=":", label="first outer step")
    left.set(xscale="log", yscale="log", xlabel="step size (1: the scale of eta)")
    left.set(ylabel="change of the outer loss; lines: predicted")
    steps = range(1, result.inner_steps + 1)
    for name, norms in (
        ("tangents of theta", result.tangents),
        ("tangents of inner gradients", result.gradient_tangents),
        ("cotangents of theta", result.cotangents),
    ):
        right.plot(steps, [float(norm) or math.nan for norm in norms], label=name)
    right.set(yscale="log", xlabel="inner step", ylabel="norm")
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    return drawn


def levers(plain: Mapping[str, Any]) -> list[Parameter]:
    """Return the settings of a config that change its smoothness, with values to try.

    Raises:
      ValueError: where it has none.
    """
    space = []
    if divides_by_root(plain["algorithm"].get("optimizer")):
        space.append(Parameter(EPS_ROOT, "log", 1e-12, 1e-4))
    rate = next((key for key in RATES if isinstance(value_at(plain, key), float)), None)
    if rate is not None:
        now = value_at(plain, rate)
        low, high = (value_at(plain, rate.replace(".start", f".{end}")) for end in ("low", "high"))
        bounded = rate.endswith(".start")
        least, most = (low, high) if bounded else (0.0, math.inf)
        space.append(Parameter(rate, "log", max(now / 10, least), min(2 * now, most)))
    horizon = value_at(plain, "algorithm.inner_steps")
    if horizon and "decay_steps" in (value_at(plain, "algorithm.optimizer") or {}):
        now = value_at(plain, DECAY)
        values = (now, horizon) if now is None else (now, None)
        space.append(Parameter(DECAY, "choice", choices=tuple(map(repr, values))))
    for keys, factors in ((BATCHES, (1, 2, 4)), (WIDTHS, (1, 2))):
        key = next((key for key in keys if value_at(plain, key)), None)
        if key is not None:
            choices = [_times(value_at(plain, key), factor) for factor in factors]
            space.append(Parameter(key, "choice", choices=tuple(map(repr, choices))))
    if not space:
        raise ValueError(
            "`metalearn smooth --search` tries settings that change the smoothness "
            f"of an inner run ({LEVERS}), and this config "
            "has none of them set. Leave --search out."
        )
    return space


def value_at(plain: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None where there is none."""
    value: Any = plain
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _times(value: Any, factor: int) -> Any:
    return tuple(n * factor for n in value) if isinstance(value, list | tuple) else value * factor


def changed(plain: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with other values of some dotted keys."""
    config: Any = copy.deepcopy(dict(plain))
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section[last] = value
    return config


def search(plain: Mapping[str, Any], space: Sequence[Parameter], options: Options) -> list[Trial]:
    """Try settings, and return all trials, the config as it is first."""
    library()
    count = TRIALS if options.trials is None else options.trials
    settings = Settings(options.words, tuple(space), "metasmoothness", "max", seed=options.seed)
    say = (lambda text: None) if options.as_json else (lambda text: print(text, flush=True))
    say(f"\nSearching: {'  '.join(each.option()[len('--sweep.') :] for each in space)}")
    trials = [_tried(plain, {}, say)]
    with contextlib.ExitStack() as stack:
        workdir = options.workdir
        if workdir is None:
            workdir = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workdir.mkdir(parents=True, exist_ok=True)
        write_settings(workdir, settings, plain)
        study = Study(workdir, settings, evaluations=1)
        resumed = study.running()
        known = {_key(trial.settings): trial for trial in _ended(study)}
        while resumed or len(study.trials()) < count:
            trial = resumed.pop() if resumed else study.ask()
            values = _values(trial)
            if _key(values) not in known:  # of few choices, some are suggested again
                known[_key(values)] = _tried(plain, values, say)
            result = known[_key(values)]
            trial.set_user_attr("loss", result.loss)
            fine = math.isfinite(result.metasmoothness) and math.isfinite(result.loss)
            value, state = (result.metasmoothness, "COMPLETE") if fine else (None, "FAIL")
            study.tell(trial, value, state)
        trials += _ended(study)
    return trials


def _ended(study: Study) -> list[Trial]:
    ended = [trial for trial in study.trials() if trial.state.name == "COMPLETE"]
    return [Trial(_values(t), t.value, t.user_attrs["loss"]) for t in ended]


def _key(settings: Mapping[str, Any]) -> str:
    return repr(sorted(settings.items()))


def _values(trial: Any) -> dict[str, Any]:
    return {
        key: ast.literal_eval(value) if isinstance(value, str) else value
        for key, value in trial.params.items()
    }


def _tried(plain: Mapping[str, Any], settings: Mapping[str, Any], say: Any) -> Trial:
    try:
        runs = three_runs(*built(changed(plain, settings)))
        trial = Trial(settings, float(runs.metasmoothness), float(runs.losses[0]))
    except ValueError as error:  # sizes that do not fit together, or the data
        say(f"  {_text(settings)}: refused, {first_line(error)}")
        return Trial(settings, math.nan, math.nan)
    say(f"  metasmoothness {trial.metasmoothness:.3f}  loss {trial.loss:.4g}  {_text(settings)}")
    return trial


def _text(settings: Mapping[str, Any]) -> str:
    return "  ".join(f"{key}={shown(value)}" for key, value in settings.items()) or "as it is"


def frontier(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that no other beats in both, the smoothest first."""
    different = {repr(trial): trial for trial in trials}.values()
    finite = [t for t in different if math.isfinite(t.metasmoothness) and math.isfinite(t.loss)]

    def beaten(trial: Trial) -> bool:
        return any(
            other.metasmoothness >= trial.metasmoothness
            and other.loss <= trial.loss
            and (other.metasmoothness, other.loss) != (trial.metasmoothness, trial.loss)
            for other in finite
        )

    return sorted((t for t in finite if not beaten(t)), key=lambda t: -t.metasmoothness)


def frontier_table(trials: Sequence[Trial]) -> Iterator[str]:
    """Yield the lines of a table of the frontier."""
    yield "No trial is better than these in both (outer loss: of the first task, initial eta):"
    yield ""
    rows = [
        (f"{t.metasmoothness:.3f}", f"{t.loss:.4g}", _flags(t.settings)) for t in frontier(trials)
    ]
    yield from aligned([("metasmoothness", "outer loss", "settings"), *rows])


def _flags(settings: Mapping[str, Any]) -> str:
    return " ".join(f"--config.{key}={shown(v)}" for key, v in settings.items()) or "as it is"
