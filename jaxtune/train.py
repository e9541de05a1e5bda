"""`fit`: the training run, read from top to bottom."""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import jaxtune
from jaxtune import (
    aot,
    assemble,
    bucket,
    checkpoint,
    cores,
    heap,
    metrics,
    optim,
    pods,
    setup,
    sharding,
)
from jaxtune.assemble import Assembly
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Config
from jaxtune.console import bar, say
from jaxtune.data import pipeline
from jaxtune.data.packing import Batch, Rows
from jaxtune.deadline import Deadline, Used
from jaxtune.errors import Cancelled, ConfigError, Interrupted, NumericsError, StorageError
from jaxtune.hf import files, tokenizer
from jaxtune.scoring import evaluate
from jaxtune.signals import Stop
from jaxtune.step import StepMetrics, TrainState
from jaxtune.workdir import check_fingerprint, fingerprint_of, lock, refuse_sweep

MOST_SKIPPED = 5  # non-finite steps in a row that end a run


@dataclasses.dataclass
class Progress:
    """What a run has seen so far; saved in every checkpoint, so a resumed run logs the same."""

    position: int = 0  # rows consumed, over all hosts
    tokens: int = 0  # real tokens consumed
    skipped_in_a_row: int = 0
    total: float = 0.0  # loss, loss tokens and correct tokens since the last line of metrics
    weight: float = 0.0
    correct: float = 0.0
    window_tokens: int = 0
    evals: list[list[Any]] = dataclasses.field(default_factory=list)  # [step, loss] each
    used: Used = dataclasses.field(default_factory=Used)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Progress":
        """From what `dataclasses.asdict` made of one."""
        values = dict(saved)
        return cls(used=Used(**values.pop("used", {})), **values)

    def since_best(self) -> int:
        """Evaluations since the lowest loss."""
        losses = [loss for _, loss in self.evals]
        return len(losses) - 1 - int(np.argmin(losses)) if losses else 0


class Ready(NamedTuple):
    """A run that is ready to step."""

    config: Config  # with what the data decided: a classifier's classes
    assembly: Assembly
    train_step: Callable
    eval_step: Callable
    mesh: Mesh
    frozen: dict[str, jax.Array]
    state: TrainState
    saver: Checkpoints
    train: Rows
    eval: Rows | None
    steps: int
    progress: Progress
    fingerprint: dict[str, Any]


def fit(
    config: Config, workdir: str | Path, clock: Callable[[], float] | None = None
) -> dict[str, Any]:
    """Fine-tunes as `config` says, going on from the newest checkpoint in `workdir` if any.

    Returns what result.json holds: steps, losses before and after, tokens, seconds, paths.

    Args:
      clock: seconds since the command began, which train.budget limits; None begins here.

    Raises:
      Failure: see jaxtune.errors; everything reached so far is saved, except by a full disk.
    """
    workdir = bucket.folder(workdir)
    clock = clock or _clock()
    refuse_sweep(workdir)
    with lock(workdir), Stop() as stop:
        ready = prepare(config, workdir)
        heap.resume_collector()
        config, first = ready.config, int(ready.state.step)
        _write_json(workdir / setup.CONFIG, setup.portable(config))
        run = _begin(ready, workdir, stop, clock)
        kind = "pretraining" if config.task == "pretrain" else "fine-tuning"
        with (
            jax.set_mesh(ready.mesh),
            bar(kind, run.deadline.steps, first) as show,
            closing(run.desk),
            closing(run.writer),
        ):
            step = _train(run, first, show)
            if stop.agreed:
                run.save(step)
                raise _stopped(stop, step, workdir)
            if step < run.deadline.steps:
                say(f"step {step}: no better evaluation in {config.eval.patience}, stopped early")
        return _finish(workdir, ready, step, clock())


def _train(run: "_Run", first: int, show: Callable[[int, str, int], None]) -> int:
    """Steps from `first` to the end, a stop or lost patience; returns the last step done."""
    ready, deadline, config = run.ready, run.deadline, run.ready.config
    deadline.open()
    due_eval = first in (0, deadline.steps) or _due(config.eval.every, first)
    if due_eval and run.measure(first) and first:
        run.save(first)  # whose evaluation a stop had cut off
    batches = _batches(config, ready, first)
    pending: tuple[int, StepMetrics] | None = None
    step = first
    while step < deadline.steps and not pods.stops(run.stop) and not _impatient(ready):
        with run.meter.excluded() if step == first else nullcontext():  # it compiles
            run.state, measured = ready.train_step(run.state, ready.frozen, next(batches))
        step += 1
        # The device is busy with this step while the host reads the one before it.
        if pending is not None:
            run.record(*pending, show)
        pending = (step, measured)
        due_eval = _due(config.eval.every, step)
        due_save = due_eval or _due(config.checkpoint.every, step)
        if due_save or deadline.due(step) or step == deadline.steps:
            run.record(*pending, show)
            pending = None
            run.state, refitted = deadline.refit(step, run.state, saved=due_save)
            last = step == deadline.steps
            if due_eval or last:
                run.measure(step)
            if due_save or refitted or last:
                run.save(step)
    if pending is not None:
        run.record(*pending, show)
    return step


@dataclasses.dataclass
class _Run:
    """A run at work: its state, and all that is done beside its steps."""

    ready: Ready
    state: TrainState
    stop: Stop
    desk: bucket.Desk
    writer: metrics.Writer | metrics.NoWriter
    meter: metrics.Meter
    deadline: Deadline

    def measure(self, step: int) -> bool:
        """Evaluates, unless that is done; whether it has a new result."""
        ready, progress = self.ready, self.ready.progress
        if ready.eval is None or any(at == step for at, _ in progress.evals):
            return False
        with self.meter.excluded():
            batches = self.deadline.evaluating(_eval_batches(ready, self.stop))
            score = evaluate(ready.eval_step, self.state.trainable, ready.frozen, batches)
        if self.stop.agreed:
            return False  # it ended early, and is done again on resuming
        progress.evals.append([step, score.loss])
        self.writer.write(step, "eval", score._asdict())
        say(f"step {step}: evaluation loss {score.loss:.4f}, accuracy {score.accuracy:.1%}")
        return True

    def save(self, step: int) -> None:
        """Writes a checkpoint, and a bucket's metrics before it."""
        self.deadline.note()
        with self.meter.excluded(), self.deadline.saving():
            progress = self.ready.progress
            losses = [loss for done, loss in progress.evals if done == step]
            meta = {
                "fingerprint": self.ready.fingerprint,
                "progress": dataclasses.asdict(progress),
            }
            self.desk.push()
            loss = losses[0] if losses else None
            self.ready.saver.save(step, self.state, meta=meta, loss=loss)

    def record(
        self, step: int, measured: StepMetrics, show: Callable[[int, str, int], None]
    ) -> None:
        """Fetches the numbers of one step, adds them up, and writes a line when it is due."""
        config, progress = self.ready.config, self.ready.progress
        measured = jax.device_get(measured)
        term, tokens = [float(x) for x in measured.loss], int(measured.tokens)
        self.meter.add(tokens)
        progress.position += config.train.batch_size
        progress.tokens += tokens
        progress.window_tokens += tokens
        if bool(measured.finite):
            progress.skipped_in_a_row = 0
            progress.total += term[0]
            progress.weight += term[1]
            progress.correct += term[2]
        else:
            progress.skipped_in_a_row += 1
            self.writer.write(
                step, "skipped", {"loss": term[0], "grad_norm": float(measured.grad_norm)}
            )
            say(f"step {step}: not finite, skipped ({progress.skipped_in_a_row} in a row)")
            if progress.skipped_in_a_row >= MOST_SKIPPED:
                raise NumericsError(
                    f"{MOST_SKIPPED} steps in a row up to step {step} were not finite",
                    fix="a lower optim.lr, or model.dtype=float32; the last checkpoint is sound",
                )
        loss = progress.total / max(progress.weight, 1.0)
        show(step, f"loss {loss:.4f}  {self.meter.overall():,.0f} tokens/s", self.deadline.steps)
        if step % config.train.log_every == 0:
            values = {
                "loss": loss,
                "accuracy": progress.correct / max(progress.weight, 1.0),
                "tokens": progress.window_tokens,
                "tokens_per_second": self.meter.window(),
                "lr": float(measured.lr),
                "grad_norm": float(measured.grad_norm),
            }
            self.writer.write(step, "train", values)
            progress.total = progress.weight = progress.correct = 0.0
            progress.window_tokens = 0


def _begin(ready: Ready, workdir: Any, stop: Stop, clock: Callable[[], float]) -> _Run:
    config = ready.config
    # Of a bucket's workdir, what is appended to is kept here and sent with each checkpoint.
    desk = bucket.Desk(workdir, metrics.FILES if pods.is_first() else ())
    writer = metrics.open_writer(
        desk.folder,
        tensorboard=config.train.tensorboard,
        wandb=config.train.wandb,
        resume_step=int(ready.state.step),
        write=pods.is_first(),
    )
    meter = metrics.Meter(clock)
    deadline = Deadline(
        config,
        ready.steps,
        state=ready.state,
        progress=ready.progress,
        clock=clock,
        trained=meter.seconds,
        devices=ready.mesh.size // cores.count(),
    )
    return _Run(ready, ready.state, stop, desk, writer, meter, deadline)


def _clock() -> Callable[[], float]:
    """Seconds from now on."""
    began = time.monotonic()
    return lambda: time.monotonic() - began


def prepare(config: Config, workdir: Path) -> Ready:
    """Reads, checks and places everything a run needs, cheapest checks first."""
    if not config.model.path:
        raise ConfigError("model.path is empty", fix="--config.model.path=FOLDER_OR_HUB_ID")
    if not config.data.train:
        raise ConfigError("data.train is empty", fix="--config.data.train=FILE")
    metrics.require_wandb(config.train.wandb)
    folder = files.resolve(config.model.path)
    mesh = sharding.make_mesh(config.mesh)
    setup.check_batch(config, mesh)
    assembly = assemble.assemble(config, folder, mesh)
    config = setup.within_positions(config, assembly.model)
    tokens = tokenizer.load_tokenizer(str(folder), assembly.model.vocab_size)
    prepared = pipeline.prepare(config, tokens, say, setup.form(folder, assembly.model))
    if prepared.labels != config.data.labels:
        data = dataclasses.replace(config.data, labels=prepared.labels)
        config = dataclasses.replace(config, data=data)
        assembly = assemble.assemble(config, folder, mesh)
    steps = setup.total_steps(config, len(prepared.train))
    if (warmup := optim.hyperparameters(config, steps)["warmup"]) >= steps:
        say(f"warning: optim.warmup of {warmup:g} steps: {steps} steps never reach the peak rate")
    fingerprint = fingerprint_of(config, folder, prepared.train, prepared.eval, steps)

    pods.check_same({"config": _shared_settings(config), "run": fingerprint})
    pods.check_shared(workdir)

    where = workdir / "checkpoints"
    if (meta := checkpoint.latest_meta(where)) is not None:
        check_fingerprint(meta["fingerprint"], fingerprint)
    # Where memory allows it less is computed twice; config and fingerprint keep "auto".
    assembly = aot.resolve_remat(config, assembly, mesh)[1]
    program = setup.program(config, assembly, steps)
    widths = prepared.train.width, prepared.eval.width if prepared.eval else None
    train_step, eval_step = aot.steps(
        config, assembly, program, mesh, widths, resumes=meta is not None
    )
    state, frozen = setup.initial(config, assembly, program, mesh)
    progress = Progress()
    # From here on the workdir is written to: all that can be wrong with the input is behind us.
    saver = Checkpoints(where, keep=config.checkpoint.keep, best=config.checkpoint.best)
    restored = checkpoint.restore(where, setup.abstract(state))
    if restored is not None:
        for line in restored.skipped:
            say(f"skipped a damaged checkpoint: {line}")
        state, progress = restored.state, Progress.of(restored.meta["progress"])
        planned = progress.used.refits[-1][1] if progress.used.refits else steps
        say(f"resuming at step {restored.step} of {planned}")
    else:
        if assembly.new:
            say(f"{folder} has no head for these classes, new: {', '.join(sorted(assembly.new))}")
        elif config.task == "classify":
            say(f"the head of {folder} is kept, its classes are: {', '.join(config.data.labels)}")
        _say_size(config, assembly, steps, mesh)
    return Ready(
        config=config,
        assembly=assembly,
        train_step=train_step,
        eval_step=eval_step,
        mesh=mesh,
        frozen=frozen,
        state=state,
        saver=saver,
        train=prepared.train,
        eval=prepared.eval,
        steps=steps,
        progress=progress,
        fingerprint=fingerprint,
    )


def _batches(config: Config, ready: Ready, first: int) -> Iterator[Batch]:
    """Batches on the mesh, from step `first` on."""
    size = config.train.batch_size
    mine = sharding.local_rows(ready.mesh, size)
    seed, shuffle = config.train.seed, config.data.shuffle
    local = pipeline.batches(ready.train, size, seed, shuffle, first, mine)
    return setup.to_mesh(local, ready.mesh, size)


def _eval_batches(ready: Ready, stop: Stop) -> Iterator[Batch]:
    """The evaluation rows on the mesh; ends early when asked to stop."""
    assert ready.eval is not None
    size = ready.config.train.batch_size
    local = pipeline.eval_batches(ready.eval, size, sharding.local_rows(ready.mesh, size))
    for batch in setup.to_mesh(local, ready.mesh, size):
        yield batch
        if pods.stops(stop):
            return


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _impatient(ready: Ready) -> bool:
    patience = ready.config.eval.patience
    return bool(patience) and ready.progress.since_best() >= patience


def _finish(workdir: Path, ready: Ready, step: int, seconds: float) -> dict[str, Any]:
    progress = ready.progress
    best = min(progress.evals, key=lambda pair: pair[1], default=None)
    result = {
        "steps": step,
        "loss_before": progress.evals[0][1] if progress.evals else None,
        "loss_after": progress.evals[-1][1] if progress.evals else None,
        "best_step": best[0] if best else step,
        "best_loss": best[1] if best else None,
        "tokens": progress.tokens,
        "trained_parameters": sum(math.prod(s.shape) for s in ready.assembly.trained.values()),
        "seconds": round(seconds, 3),
        "workdir": str(workdir),
        "version": jaxtune.__version__,
    }
    _write_json(workdir / "result.json", result)
    return result


def _stopped(stop: Stop, step: int, workdir: Path) -> Cancelled | Interrupted:
    kind = Cancelled if stop.by_user else Interrupted
    return kind(f"stopped and saved at step {step} in {workdir}", fix="the same command to go on")


def _shared_settings(config: Config) -> dict[str, Any]:
    """What every host of a run is given alike; where its files lie is its own affair."""
    values = config.to_dict()
    del values["model"]["path"], values["data"]["train"], values["data"]["eval"]
    return values


def _say_size(config: Config, assembly: Assembly, steps: int, mesh: Mesh) -> None:
    count = {True: 0, False: 0}
    for path, size in assembly.sizes.items():
        count[path in assembly.trained] += size
    share = count[True] / (count[True] + count[False])
    method = f"LoRA r={config.lora.r}" if config.lora.r else "full fine-tuning"
    say(
        f"{method}: training {count[True]:,} of {count[True] + count[False]:,} parameters "
        f"({share:.2%}), {steps} steps of {config.train.batch_size} rows, peak learning rate "
        f"{optim.peak_lr(config):g}, on {_devices(mesh)}"
    )
    trained = [path for path in assembly.trained if re.match(r"layers\..*\.kernel$", path)]
    if assembly.quantized and trained:
        say(f"not {config.model.quantize}, since they are trained in full: {', '.join(trained)}")


def _devices(mesh: Mesh) -> str:
    if cores.count() > 1:
        return f"{cores.count()} cores"
    return f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s)"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    if not pods.is_first():
        return
    text = json.dumps(value, indent=2) + "\n"
    if bucket.is_bucket(path):
        with bucket.reaching(str(path)):
            path.write_text(text)  # an object is there as a whole or not at all
        return
    try:
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}", fix="free space there") from error
