"""Metrics in Weights & Biases. W&B is imported when a run is started, and not if it is disabled."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from metalearn._utils import disk
from metalearn._utils.checks import first_line
from metalearn._utils.intervals import Estimate
from metalearn.loggers.base import INSIDE, Logger, Record

PATIENCE = 300  # seconds to wait until W&B has sent everything; the rest waits on disk


class WandbLogger(Logger):
    """Logs to Weights & Biases: config, scalars by outer step, and a final table.

    Never prompts. `mode` is "online", "offline", "disabled", or "auto": what the
    environment variable WANDB_MODE says, else online where this user is logged in, else
    offline. A resumed run keeps its id online; offline, W&B begins a new directory. Disabled,
    W&B is not even imported.

    A run does not depend on W&B: if its server does not answer, the run is logged offline, for
    `wandb sync` later; if it stops answering, unsent data waits on disk; on a full disk the run
    continues without it.
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
        self._step = 0  # the last step that was logged
        self._before: Record = {}  # the record of the checkpoint

    def start(self, step: int, config: Mapping[str, Any], record: Record) -> None:
        self._before = record
        if self._asked_mode() == "disabled":
            return
        import wandb

        self._wandb, self._step = wandb, step
        with disk.forgiven("The files of W&B"):
            self._run = self._started(config, record.get("wandb_id"))

    def _started(self, config: Mapping[str, Any], known: Any) -> Any:
        if self.directory is not None:
            pathlib.Path(self.directory).mkdir(parents=True, exist_ok=True)
        mode, known = self._resolved_mode(), known if isinstance(known, str) else None
        try:
            return self._begun(config, known, mode)
        except (self._wandb.Error, TimeoutError) as error:
            if mode != "online" or disk.at_fault(error):
                raise
            return self._begun(config, known, self._offline(error))

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

    def _asked_mode(self) -> str:
        return self.mode if self.mode != "auto" else os.environ.get("WANDB_MODE") or "auto"

    def _resolved_mode(self) -> Any:
        asked = self._asked_mode()
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
        """Report that the server does not answer; return the mode "offline"."""
        runs = pathlib.Path(self.directory or ".") / "wandb" / "offline-run-*"
        disk.tell(
            f"W&B does not answer ({first_line(error)}): this run is logged offline. "
            f"`wandb sync {runs}` sends it later."
        )
        return "offline"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is None:
            return
        self._run.log(dict(metrics), step=step)
        if all(name.startswith(INSIDE) for name in metrics):  # its row is sent with the step's end
            self._run.summary.update(dict(metrics))
        self._step = step

    def show(self, pictures: Mapping[str, str | os.PathLike[str]]) -> None:
        if self._run is None:
            return
        shown = {name: self._wandb.Image(str(path)) for name, path in pictures.items()}
        self._run.log(shown, commit=False)  # in the row of the last step

    def record(self) -> Record:
        """Return the id of the run; while W&B is disabled, the previous id."""
        if self._run is None:
            return self._before
        return {"wandb_id": self._run.id, "wandb_step": self._step}

    def abandon(self) -> None:
        """Close the run, marked as failed."""
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
