"""Metrics of a run, as host floats: metrics.jsonl, TensorBoard, W&B, and tokens per second.

A line of metrics.jsonl is one JSON object, `{"step": 10, "split": "train", "loss": 2.5, ...}`.
JSON has no NaN and no infinity: such a value is null there, and `non_finite` names it, as in
`{"step": 11, "split": "train", "loss": null, "non_finite": {"loss": "nan"}}`.

The loop writes a step's metrics after the next step is dispatched. It must write what it holds
back before it saves a checkpoint: on resume, what is after the restored step is run and written
again, what is not written by then is lost.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtune.errors import ConfigError, StorageError

FILE = "metrics.jsonl"
FILES = (FILE, "wandb_id")  # what a resumed run goes on with


class NoWriter:
    """Takes metrics and does nothing with them: of several hosts only the first writes."""

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Writer:
    """Appends metrics; every line is flushed before `write` returns. One host of a run only."""

    def __init__(self, workdir: Path, *, tensorboard: bool, wandb: str, resume_step: int):
        """Opens the sinks and takes back what a killed run wrote beyond the restored step.

        Args:
          workdir: local folder; TensorBoard's files go to `tensorboard/` in it.
          tensorboard: also write TensorBoard event files.
          wandb: Weights & Biases project; empty is off.
          resume_step: the step restored from a checkpoint; 0 starts anew.
        Raises:
          ConfigError: W&B is asked for and not installed.
          StorageError: metrics.jsonl cannot be written, or is damaged other than at its end.
        """
        require_wandb(wandb)
        path = workdir / FILE
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            _cut(path, resume_step)
            self._file = path.open("a")
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error}", fix="a --workdir that can be written"
            ) from error
        self._tensorboard = _tensorboard(workdir, resume_step) if tensorboard else None
        self._wandb = _wandb(wandb, workdir, resume_step) if wandb else None

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Writes one line, such as `write(10, "train", {"loss": 2.5, "tokens": 512})`.

        Raises:
          StorageError: the disk is full or failed.
        """
        try:
            self._file.write(_line(step, split, values))
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"metrics of step {step} could not be written to {self._file.name}: {error}",
                fix="free space there, then the same command again",
            ) from error
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        if self._wandb:
            self._wandb.log({"step": step, **{f"{split}/{k}": v for k, v in values.items()}})

    def close(self) -> None:
        """Flushes and closes every sink."""
        with contextlib.suppress(OSError):  # after a failed write, close would fail once more
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def open_writer(
    workdir: Path, *, tensorboard: bool, wandb: str, resume_step: int, write: bool
) -> Writer | NoWriter:
    """`Writer`, where this host is the one to write; see there."""
    if not write:
        return NoWriter()
    return Writer(workdir, tensorboard=tensorboard, wandb=wandb, resume_step=resume_step)


def require_wandb(project: str) -> None:
    """Raises ConfigError when a W&B project is asked for and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"train.wandb is {project!r} and wandb is not installed",
            fix="pip install 'jaxtune[wandb]', or train.wandb empty",
        )


class Meter:
    """Tokens per second of training: one total over one total, without the excluded seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._since = clock()
        self._window = (0, 0.0)
        self._total = (0, 0.0)

    def add(self, tokens: int) -> None:
        """Counts the tokens of a step that is done."""
        self._window = (self._window[0] + tokens, self._window[1])

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Seconds inside do not count: compilation, evaluation, checkpoints."""
        self._settle()
        try:
            yield
        finally:
            self._since = self._clock()

    def window(self) -> float:
        """Tokens per second since the last call; 0 where no time has passed."""
        self._settle()
        tokens, seconds = self._window
        self._total = (self._total[0] + tokens, self._total[1] + seconds)
        self._window = (0, 0.0)
        return tokens / seconds if seconds else 0.0

    def seconds(self) -> float:
        """Seconds since the start, without the excluded ones."""
        self._settle()
        return self._window[1] + self._total[1]

    def overall(self) -> float:
        """Tokens per second since the start; 0 where no time has passed."""
        self._settle()
        tokens, seconds = (sum(pair) for pair in zip(self._window, self._total, strict=True))
        return tokens / seconds if seconds else 0.0

    def _settle(self) -> None:
        now = self._clock()
        self._window = (self._window[0], self._window[1] + now - self._since)
        self._since = now


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, NaN and infinities as floats again; empty where there is none.

    A torn last line, which a killed run can leave, is left out.

    Raises:
      StorageError: a line other than the last is damaged.
    """
    rows = []
    for _, row in _read(workdir / FILE):
        broken = row.pop("non_finite", {})
        rows.append(row | {name: float(text) for name, text in broken.items()})
    return rows


def _line(step: int, split: str, values: dict[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    broken = {name: str(float(value)) for name, value in values.items() if finite[name] is None}
    row = {"step": step, "split": split, **finite} | ({"non_finite": broken} if broken else {})
    return json.dumps(row, allow_nan=False) + "\n"


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, object) of every whole line."""
    if not path.exists():
        return []
    *whole, _torn = path.read_text(errors="replace").split("\n")
    rows = []
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
            rows.append((line, {"step": int(row["step"]), **row}))
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{path}:{number} is not a line of metrics: {line[:60]!r}",
                fix="remove that line",
            ) from error
    return rows


def _cut(path: Path, resume_step: int) -> None:
    """Keeps the lines up to the restored step, all or nothing; at 0 the run starts anew."""
    if not path.exists():
        return
    kept = [line for line, row in _read(path) if row["step"] <= resume_step and resume_step > 0]
    shorter = path.with_suffix(".tmp")
    with shorter.open("w") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    shorter.replace(path)


def _tensorboard(workdir: Path, resume_step: int) -> Any:
    from tensorboardX import SummaryWriter

    # Events at or after purge_step are hidden: those that will be written again.
    purge_step = resume_step + 1 if resume_step else 0
    return SummaryWriter(logdir=str(workdir / "tensorboard"), purge_step=purge_step)


def _wandb(project: str, workdir: Path, resume_step: int) -> Any:
    wandb = importlib.import_module("wandb")
    identity = workdir / "wandb_id"  # a resumed run goes on with the curve it began
    if resume_step == 0 or not identity.exists():
        identity.write_text(uuid.uuid4().hex)
    run = wandb.init(
        project=project, dir=str(workdir), id=identity.read_text().strip(), resume="allow"
    )
    # Steps that run again after a resume go back, which W&B's own step counter refuses.
    run.define_metric("*", step_metric="step")
    return run
