"""Where the numbers of a run go: small objects, any number of them at once.

A logger hears `start` once (with what an earlier, interrupted run left in the
checkpoint), `log` with plain floats, `show` with pictures, and `finish` with the final
table. The checkpoint is the record of a run and loggers follow it: on resuming at step n,
whatever was logged after step n is taken back where the medium allows it.
"""

from __future__ import annotations

import abc
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from metalearn.evaluation import Estimate
from metalearn.messages import first_line

Record = dict[str, Any]
PATIENCE = 300  # seconds to wait for W&B to have sent everything; what is left waits on disk


class Logger(abc.ABC):
    """Hears what a run reports. Every method but `log` may be left as it is."""

    def start(self, step: int, config: Mapping[str, Any], record: Record) -> None:  # noqa: B027
        """Begin, or go on at `step`. `record` is what `record()` returned before."""

    @abc.abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of an outer step, counted from 1."""

    def back_to(self, step: int) -> None:  # noqa: B027
        """Take back what was logged after `step`, where that can be: the run goes on from there."""

    def show(self, pictures: Mapping[str, str | os.PathLike[str]]) -> None:  # noqa: B027
        """Note image files, by name; before `finish`."""

    def record(self) -> Record:
        """Return what a resumed run must know (JSON): kept in the checkpoint."""
        return {}

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:  # noqa: B027
        """End, with the final evaluation if there was one."""

    def abandon(self) -> None:
        """End a run that failed. The same as `finish()`, if nothing else is said."""
        self.finish()


class ConsoleLogger(Logger):
    """Prints a line now and then, above the progress bar, and the final table."""

    def __init__(self, every: int = 100):
        self.every = every

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        evaluated = any(name.startswith("eval/") for name in metrics)
        if evaluated or step % self.every == 0:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            tqdm.write(f"step {step:>6}  {shown}")

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:
        for name, value in (table or {}).items():
            tqdm.write(f"{name:>20}  {value}  (95% interval, {value.tasks} tasks)")


class JsonlLogger(Logger):
    """Appends one JSON object per line: {"step": 10, "loss": 1.5, ...}.

    Where the disk is full, lines wait in memory for a later one to be written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._waiting: list[str] = []
        self._told = False

    def start(self, step: int, config: Mapping[str, Any], record: Record) -> None:
        """Go on after `step`: the lines after it will come again."""
        del config
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._take_back(step)
        self._waiting = list(record.get("waiting", []))
        self._write()

    def record(self) -> Record:
        """Return the lines that a full disk has not taken yet."""
        self._write()
        return {"waiting": self._waiting} if self._waiting else {}

    def back_to(self, step: int) -> None:
        """Drop the lines after `step`."""
        self._waiting = [line for line in self._waiting if json.loads(line)["step"] <= step]
        try:
            self._take_back(step)
        except OSError as error:
            tqdm.write(f"{self.path} cannot be written ({error}): lines after {step} stay in it.")

    def _take_back(self, step: int) -> None:
        """Drop the lines of the file after `step`, and one cut short by a kill."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(kept))
        aside.replace(self.path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._waiting.append(json.dumps({"step": step, **metrics}) + "\n")
        self._write()

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:
        del table
        self._write()
        if self._waiting:
            tqdm.write(f"{self.path} lacks its last {len(self._waiting)} lines: the disk is full.")

    def _write(self) -> None:
        """Append the lines that wait, all or none."""
        if not self._waiting:
            return
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(self._waiting))
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, whole)
            if not self._told:  # once, not at every line
                tqdm.write(f"{self.path} cannot be written ({error}): its lines wait in memory.")
            self._told = True
            return
        self._waiting.clear()
        self._told = False


class WandbLogger(Logger):
    """Logs to Weights & Biases: config, scalars by outer step, and a final table.

    Never prompts. `mode` is "online", "offline", "disabled", or "auto": what the
    environment variable WANDB_MODE says, else online where this user is logged in, else
    offline. A resumed run keeps its id online; offline, W&B begins a new directory.

    A run does not depend on W&B: where its server does not answer, the run is logged offline,
    for `wandb sync` later; where it stops answering, what is not sent yet waits on disk.
    """

    def __init__(
        self,
        project: str = "metalearn",
        mode: str = "auto",
        name: str | None = None,
        group: str | None = None,
        directory: str | os.PathLike[str] | None = None,
    ):
        modes = ("auto", "online", "offline", "disabled")
        if mode not in modes:
            raise ValueError(f"W&B's mode is {mode!r}. It can be: {', '.join(modes)}.")
        if not 0 < len(project) <= 128 or set(project) & set("/\\#?%:"):
            raise ValueError(
                f"W&B takes no project called {project!r}: its name has 1 to 128 characters, and "
                "none of / \\ # ? % :."
            )
        self.project, self.mode, self.name, self.group = project, mode, name, group
        self.directory = directory
        self._run: Any = None
        self._step = 0  # the last that was logged

    def start(self, step: int, config: Mapping[str, Any], record: Record) -> None:
        import wandb

        self._wandb, self._step = wandb, step
        if self.directory is not None:
            pathlib.Path(self.directory).mkdir(parents=True, exist_ok=True)
        mode, known = self._resolved_mode(), record.get("wandb_id")
        try:
            self._run = self._begun(config, known, mode)
        except (wandb.Error, TimeoutError) as error:
            if mode != "online":
                raise
            self._run = self._begun(config, known, self._offline(error))

    def _begun(self, config: Mapping[str, Any], known: str | None, mode: Any) -> Any:
        return self._wandb.init(
            project=self.project,
            name=self.name or None,
            group=self.group or None,
            dir=self.directory,
            config=dict(config),
            mode=mode,
            id=known,
            resume="allow",
            settings=self._wandb.Settings(console="off", silent=True, finish_timeout=PATIENCE),
        )

    def _resolved_mode(self) -> Any:
        asked = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        if asked not in ("auto", "online"):
            return asked
        try:
            logged_in = self._wandb.login(prompt=False)
        except self._wandb.Error as error:
            return self._offline(error)
        if asked == "online" and not logged_in:
            raise ValueError(
                "W&B is to log online, but no user is logged in here. Run `wandb login` once, or "
                "use the mode 'offline' and `wandb sync` later."
            )
        return "online" if logged_in else "offline"

    def _offline(self, error: Exception) -> str:
        """Say that the server does not answer; return the mode that does without."""
        runs = pathlib.Path(self.directory or ".") / "wandb" / "offline-run-*"
        tqdm.write(
            f"W&B does not answer ({first_line(error)}): this run is logged offline. "
            f"`wandb sync {runs}` sends it later."
        )
        return "offline"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)
        self._step = step

    def show(self, pictures: Mapping[str, str | os.PathLike[str]]) -> None:
        shown = {name: self._wandb.Image(str(path)) for name, path in pictures.items()}
        self._run.log(shown, commit=False)  # in the row of the last step

    def record(self) -> Record:
        return {} if self._run is None else {"wandb_id": self._run.id, "wandb_step": self._step}

    def abandon(self) -> None:
        """End with the mark of a failure."""
        if self._run is not None:
            self._run.finish(exit_code=1)

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:
        if self._run is None:
            return
        if table:
            rows = [[name, value.mean, value.ci95, value.tasks] for name, value in table.items()]
            columns: list[str | int] = ["metric", "mean", "ci95", "tasks"]
            self._run.log({"test": self._wandb.Table(columns=columns, data=rows)})
            self._run.summary.update({f"test/{name}": value.mean for name, value in table.items()})
        self._run.finish()
