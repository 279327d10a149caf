"""Where the numbers of a run go: small objects, any number of them at once.

A logger hears `start` once (with what an earlier, interrupted run left in the
checkpoint), `log` with plain floats, `show` with pictures, and `finish` with the final
table. The checkpoint is the record of a run and loggers follow it: on resuming at step n,
whatever was logged after step n is taken back where the medium allows it.
"""

from __future__ import annotations

import abc
import contextlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from metalearn._utils import disk, strict_json
from metalearn._utils.checks import first_line
from metalearn.evaluation import Estimate

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
            disk.tell(f"step {step:>6}  {shown}")

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:
        for name, value in (table or {}).items():
            disk.tell(f"{name:>20}  {value}  (95% interval, {value.tasks} tasks)")


class Line(NamedTuple):
    """A line of `metrics.jsonl`."""

    number: int  # from 1
    text: bytes  # with the end of the line, where it has one
    row: Record | None  # {"step": 10, "loss": 1.5}, NaN and infinities as floats; None: unreadable
    wrong: str = ""  # why


def read_lines(path: str | os.PathLike[str]) -> list[Line]:
    """Return the lines of a file of `JsonlLogger`'s, readable or not; [] where there is none."""
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [_read_line(number, text) for number, text in enumerate(file, 1)]


def _read_line(number: int, text: bytes) -> Line:
    try:
        row = strict_json.loads(text)
    except ValueError as error:
        return Line(number, text, None, first_line(error))
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return Line(number, text, None, "it is no object with an integer for its step")
    return Line(number, text, row)


def unreadable(path: str | os.PathLike[str], lines: Sequence[Line]) -> str:
    """Say which lines of a file cannot be read, and why the first of them cannot."""
    numbers = [str(line.number) for line in lines]
    shown = ", ".join(numbers[:5]) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    more = "lines" if len(numbers) > 1 else "line"
    return f"{path}: {more} {shown} cannot be read ({lines[0].wrong})"


class JsonlLogger(Logger):
    """Appends one JSON object per line: {"step": 10, "loss": 1.5, ...}.

    The JSON is strict: NaN and infinities are "NaN", "Infinity" and "-Infinity". Where the disk
    is full, lines wait in memory for a later one to be written. Lines that cannot be read when a
    run goes on are moved to `metrics.jsonl.bad`.
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
        waiting = record.get("waiting", [])
        texts = filter(lambda x: isinstance(x, str), waiting if isinstance(waiting, list) else ())
        lines = [_read_line(0, text.encode()) for text in texts]
        self._waiting = [_strict(line).decode() for line in lines if line.row]
        self._write()

    def record(self) -> Record:
        """Return the lines that a full disk has not taken yet."""
        self._write()
        return {"waiting": self._waiting} if self._waiting else {}

    def back_to(self, step: int) -> None:
        """Drop the lines after `step`."""
        self._waiting = [text for text in self._waiting if strict_json.loads(text)["step"] <= step]
        self._take_back(step)

    def _take_back(self, step: int) -> None:
        """Drop the lines of the file after `step`, and one cut short by a kill; say what is bad."""
        if self.path.exists() and not self.path.is_file():  # such as a pipe: nothing to take back
            return
        lines = read_lines(self.path)
        whole = [line for line in lines if line.text.endswith(b"\n")]
        bad = [line for line in whole if line.row is None]
        if bad:
            self._set_aside(bad)
        kept = b"".join(_strict(line) for line in whole if line.row and line.row["step"] <= step)
        before = b"".join(line.text for line in lines)
        try:
            if not self.path.exists() or not before.startswith(kept):
                disk.write(self.path, kept)
            elif kept != before:  # needs no room
                os.truncate(self.path, len(kept))
        except OSError as error:
            disk.tell(f"{self.path} cannot be written ({error}): lines after {step} stay in it.")

    def _set_aside(self, bad: Sequence[Line]) -> None:
        """Keep lines that cannot be read in a file beside; say which they are."""
        aside = self.path.with_name(f"{self.path.name}.bad")
        try:
            with aside.open("ab") as file:
                file.write(b"".join(line.text for line in bad))
            where = f"moved to {aside.name}"
        except OSError as error:
            where = f"dropped, for {aside.name} cannot be written ({error})"
        disk.tell(f"{unreadable(self.path, bad)}: {where}. The run goes on.")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._waiting.append(strict_json.dumps({"step": step, **metrics}) + "\n")
        self._write()

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:
        del table
        self._write()
        if self._waiting:
            disk.tell(f"{self.path} lacks its last {len(self._waiting)} lines: the disk is full.")

    def _write(self) -> None:
        """Append the lines that wait, all or none."""
        if not self._waiting:
            return
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(self._waiting))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, whole)
            if not self._told:  # once, not at every line
                disk.tell(f"{self.path} cannot be written ({error}): its lines wait in memory.")
            self._told = True
            return
        self._waiting.clear()
        self._told = False


def _strict(line: Line) -> bytes:
    """Return the text of a line; that of an older version with bare NaN, as it is written now."""
    if b"NaN" not in line.text and b"Infinity" not in line.text:
        return line.text
    return (strict_json.dumps(line.row) + "\n").encode()


class WandbLogger(Logger):
    """Logs to Weights & Biases: config, scalars by outer step, and a final table.

    Never prompts. `mode` is "online", "offline", "disabled", or "auto": what the
    environment variable WANDB_MODE says, else online where this user is logged in, else
    offline. A resumed run keeps its id online; offline, W&B begins a new directory. Disabled,
    W&B is not even imported.

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
        self._before: Record = {}  # what was kept before this process

    def start(self, step: int, config: Mapping[str, Any], record: Record) -> None:
        self._before = record
        if self._asked_mode() == "disabled":
            return
        import wandb

        self._wandb, self._step = wandb, step
        if self.directory is not None:
            pathlib.Path(self.directory).mkdir(parents=True, exist_ok=True)
        mode, known = self._resolved_mode(), record.get("wandb_id")
        known = known if isinstance(known, str) else None
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
        """Say that the server does not answer; return the mode that does without."""
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
        self._step = step

    def show(self, pictures: Mapping[str, str | os.PathLike[str]]) -> None:
        if self._run is None:
            return
        shown = {name: self._wandb.Image(str(path)) for name, path in pictures.items()}
        self._run.log(shown, commit=False)  # in the row of the last step

    def record(self) -> Record:
        """Return the id of the run; where it is disabled for a while, that which it had before."""
        if self._run is None:
            return self._before
        return {"wandb_id": self._run.id, "wandb_step": self._step}

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
