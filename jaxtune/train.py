"""`fit`: the training run, read from top to bottom."""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxtune
from jaxtune import assemble, checkpoint, metrics, optim, sharding, tree
from jaxtune.assemble import Assembly
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Config
from jaxtune.console import bar, say
from jaxtune.data import pipeline
from jaxtune.data.packing import Batch, Rows, digest
from jaxtune.errors import Cancelled, ConfigError, Interrupted, NumericsError, StorageError
from jaxtune.hf import files, tokenizer
from jaxtune.objectives import LossTerm
from jaxtune.objectives.sft import next_token
from jaxtune.signals import Stop
from jaxtune.step import Program, StepMetrics, TrainState, compiled, init_state
from jaxtune.workdir import check_fingerprint, lock

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
    evals: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # (step, loss)

    def since_best(self) -> int:
        """Evaluations since the lowest loss."""
        losses = [loss for _, loss in self.evals]
        return len(losses) - 1 - int(np.argmin(losses)) if losses else 0


class Setup(NamedTuple):
    """A run that is ready to step."""

    assembly: Assembly
    program: Program
    mesh: Mesh
    frozen: dict[str, jax.Array]
    state: TrainState
    train: Rows
    eval: Rows | None
    steps: int
    progress: Progress
    fingerprint: dict[str, Any]


def fit(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Fine-tunes as `config` says, going on from the newest checkpoint in `workdir` if any.

    Returns what result.json holds: steps, losses before and after, tokens, seconds, paths.

    Raises:
      Failure: see jaxtune.errors; everything reached so far is saved, except by a full disk.
    """
    workdir = Path(workdir)
    started = time.monotonic()
    with lock(workdir), Stop() as stop:
        saver = Checkpoints(
            workdir / "checkpoints", keep=config.checkpoint.keep, best=config.checkpoint.best
        )
        setup = prepare(config, workdir)
        state, progress, steps = setup.state, setup.progress, setup.steps
        first = int(state.step)
        _write_json(workdir / "config.json", config.to_dict())
        writer = metrics.Writer(
            workdir,
            tensorboard=config.train.tensorboard,
            wandb=config.train.wandb,
            resume_step=first,
        )
        train_step, eval_step = compiled(setup.program)
        meter = metrics.Meter()

        def evaluate(step: int) -> None:
            if setup.eval is None or any(at == step for at, _ in progress.evals):
                return
            with meter.excluded():
                term = _evaluate(eval_step, state, setup, config, stop)
            if term is None:
                return  # asked to stop: the evaluation is done again on resuming
            loss = float(term.total / max(term.weight, 1))
            progress.evals.append((step, loss))
            accuracy = float(term.correct / max(term.weight, 1))
            writer.write(step, "eval", {"loss": loss, "accuracy": accuracy,
                                        "perplexity": math.exp(min(loss, 700.0))})  # fmt: skip
            say(f"step {step}: evaluation loss {loss:.4f}, token accuracy {accuracy:.1%}")

        def save(step: int) -> None:
            with meter.excluded():
                at = dict(progress.evals).get(step)
                meta = {
                    "fingerprint": setup.fingerprint,
                    "progress": dataclasses.asdict(progress),
                }
                saver.save(step, state, meta=meta, loss=at)

        with jax.set_mesh(setup.mesh), bar("training", steps, first) as show, closing(writer):
            evaluate(first)
            batches = _batches(config, setup, first)
            pending: tuple[int, StepMetrics] | None = None
            step = first
            while step < steps and not stop.asked and not _impatient(config, progress):
                with meter.excluded() if step == first else nullcontext():  # it compiles
                    state, measured = train_step(state, setup.frozen, next(batches))
                step += 1
                # The device is busy with this step while the host reads the one before it.
                if pending is not None:
                    _record(pending, config, progress, meter, writer, show)
                pending = (step, measured)
                due_eval = config.eval.every and step % config.eval.every == 0
                due_save = step % config.checkpoint.every == 0
                if due_eval or due_save or step == steps:
                    _record(pending, config, progress, meter, writer, show)
                    pending = None
                    if due_eval or step == steps:
                        evaluate(step)
                    if due_save or due_eval or step == steps:
                        save(step)
            if pending is not None:
                _record(pending, config, progress, meter, writer, show)
            if stop.asked:
                save(step)
                raise _stopped(stop, step, workdir)
            if step < steps:
                say(f"step {step}: no better evaluation in {config.eval.patience}, stopped early")
        return _finish(config, workdir, setup, progress, step, time.monotonic() - started)


def prepare(config: Config, workdir: Path) -> Setup:
    """Reads, checks and places everything a run needs, cheapest checks first."""
    if not config.model.path:
        raise ConfigError("model.path is empty", fix="--config.model.path=FOLDER_OR_HUB_ID")
    if not config.data.train:
        raise ConfigError("data.train is empty", fix="--config.data.train=FILE")
    folder = files.resolve(config.model.path)
    mesh = sharding.make_mesh(config.mesh)
    _check_batch(config, mesh)
    assembly = assemble.assemble(config, folder, mesh)
    tokens = tokenizer.load_tokenizer(str(folder), assembly.decoder.vocab_size)
    prepared = pipeline.prepare(config, tokens, say)
    per_step = config.train.batch_size
    steps = config.train.steps or math.ceil(config.train.epochs * len(prepared.train) / per_step)
    fingerprint = _fingerprint(config, folder, prepared.train, prepared.eval, steps)

    groups = {path: assembly.groups[path] for path in assembly.trained}
    program = Program(
        graphdef=assembly.graphdef,
        optimizer=optim.make(config, groups, steps),
        schedule=config.optim.schedule,
        objective=next_token,
        micro_batches=config.train.grad_accum,
        seed=config.train.seed,
        dropout=config.lora.dropout > 0,
    )
    where = workdir / "checkpoints"
    if (meta := checkpoint.latest_meta(where)) is not None:
        check_fingerprint(meta["fingerprint"], fingerprint)
    trainable, frozen = _weights(config, assembly)
    state = _place(init_state(program, trainable), mesh)
    progress = Progress()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored = checkpoint.restore(where, abstract)
    if restored is not None:
        for line in restored.skipped:
            say(f"skipped a damaged checkpoint: {line}")
        state, progress = restored.state, Progress(**restored.meta["progress"])
        progress.evals = [(step, loss) for step, loss in progress.evals]
        say(f"resuming at step {restored.step} of {steps}")
    else:
        _say_size(config, assembly, steps, mesh)
    return Setup(
        assembly, program, mesh, frozen, state, prepared.train, prepared.eval, steps, progress,
        fingerprint,
    )  # fmt: skip


def _weights(config: Config, assembly: Assembly) -> tuple[dict, dict]:
    """(trained leaves, frozen leaves), from the base, and new adapters or those of lora.init."""
    params = assemble.base(assembly) | assemble.fresh(config, assembly)
    if config.lora.r and config.lora.init != "default":
        params |= assemble.adapter(config, assembly)
    return tree.partition(params, assembly.groups)


def _place(state: TrainState, mesh: Mesh) -> TrainState:
    """Scalars of the optimizer are born on one device; a step wants everything on the mesh."""
    whole = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole), state
    )


def _batches(config: Config, setup: Setup, first: int) -> Iterator[Batch]:
    """Batches on the mesh, from step `first` on."""
    local = pipeline.batches(
        setup.train,
        config.train.batch_size,
        config.train.seed,
        config.data.shuffle,
        first,
        jax.process_index(),
        jax.process_count(),
    )
    for batch in local:
        yield _to_mesh(batch, setup.mesh)


def _to_mesh(batch: Batch, mesh: Mesh) -> Batch:
    rows = NamedSharding(mesh, P(sharding.BATCH, None))
    return Batch(*(jax.make_array_from_process_local_data(rows, x) for x in batch))


def _evaluate(eval_step, state: TrainState, setup: Setup, config: Config, stop: Stop):
    """Summed LossTerm over the evaluation rows, or None when asked to stop midway."""
    assert setup.eval is not None
    total = LossTerm(np.float64(0), np.float64(0), np.float64(0))
    for batch in pipeline.eval_batches(
        setup.eval, config.train.batch_size, jax.process_index(), jax.process_count()
    ):
        if stop.asked:
            return None
        term = eval_step(state.trainable, setup.frozen, _to_mesh(batch, setup.mesh))
        total = LossTerm(*(a + float(b) for a, b in zip(total, term, strict=True)))
    return total


def _record(pending, config: Config, progress: Progress, meter, writer, show) -> None:
    """Fetches the numbers of one step, adds them up, and writes a line when it is due."""
    step, measured = pending
    measured = jax.device_get(measured)
    term, tokens = [float(x) for x in measured.loss], int(measured.tokens)
    meter.add(tokens)
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
        writer.write(step, "skipped", {"loss": term[0], "grad_norm": float(measured.grad_norm)})
        say(f"step {step}: not finite, skipped ({progress.skipped_in_a_row} in a row)")
        if progress.skipped_in_a_row >= MOST_SKIPPED:
            raise NumericsError(
                f"{MOST_SKIPPED} steps in a row up to step {step} were not finite",
                fix="a lower optim.lr, or model.dtype=float32; the last checkpoint is sound",
            )
    loss = progress.total / max(progress.weight, 1.0)
    show(step, f"loss {loss:.4f}  {meter.overall():,.0f} tokens/s")
    if step % config.train.log_every == 0:
        values = {
            "loss": loss,
            "accuracy": progress.correct / max(progress.weight, 1.0),
            "tokens": progress.window_tokens,
            "tokens_per_second": meter.window(),
            "lr": float(measured.lr),
            "grad_norm": float(measured.grad_norm),
        }
        writer.write(step, "train", values)
        progress.total = progress.weight = progress.correct = 0.0
        progress.window_tokens = 0


def _impatient(config: Config, progress: Progress) -> bool:
    return bool(config.eval.patience) and progress.since_best() >= config.eval.patience


def _finish(config, workdir: Path, setup: Setup, progress: Progress, step: int, seconds: float):
    best = min(progress.evals, key=lambda pair: pair[1], default=None)
    result = {
        "steps": step,
        "loss_before": progress.evals[0][1] if progress.evals else None,
        "loss_after": progress.evals[-1][1] if progress.evals else None,
        "best_step": best[0] if best else step,
        "best_loss": best[1] if best else None,
        "tokens": progress.tokens,
        "trained_parameters": sum(math.prod(s.shape) for s in setup.assembly.trained.values()),
        "seconds": round(seconds, 3),
        "workdir": str(workdir),
        "version": jaxtune.__version__,
    }
    _write_json(workdir / "result.json", result)
    return result


def _stopped(stop: Stop, step: int, workdir: Path) -> Cancelled | Interrupted:
    kind = Cancelled if stop.by_user else Interrupted
    return kind(f"stopped and saved at step {step} in {workdir}", fix="the same command to go on")


def _check_batch(config: Config, mesh: Mesh) -> None:
    rows = config.train.batch_size // config.train.grad_accum
    devices = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
    if rows % devices:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} / train.grad_accum "
            f"{config.train.grad_accum} = {rows} rows do not divide over {devices} devices",
            fix=f"a batch_size that is a multiple of {devices * config.train.grad_accum}",
        )


def _fingerprint(config: Config, folder: Path, train: Rows, evals: Rows | None, steps: int):
    """Everything that decides a run's numbers; a workdir only goes on with the same."""
    values = config.to_dict()
    for key in ("checkpoint", "mesh", "eval"):
        del values[key]  # a run may move to other devices and be watched more or less closely
    for key in ("log_every", "tensorboard", "wandb"):
        del values["train"][key]
    del values["model"]["path"], values["data"]["train"], values["data"]["eval"]
    return {
        "version": jaxtune.__version__,
        "config": values,
        "steps": steps,
        "data": digest(train),
        "eval_data": digest(evals) if evals is not None else None,
        "model": files.fingerprint(folder),
        "tokenizer": tokenizer.tokenizer_digest(str(folder)),
    }


def _say_size(config: Config, assembly: Assembly, steps: int, mesh: Mesh) -> None:
    count = {True: 0, False: 0}
    for path, shape in assembly.shapes.items():
        count[path in assembly.trained] += math.prod(shape.shape)
    share = count[True] / (count[True] + count[False])
    method = f"LoRA r={config.lora.r}" if config.lora.r else "full fine-tuning"
    say(
        f"{method}: training {count[True]:,} of {count[True] + count[False]:,} parameters "
        f"({share:.2%}), {steps} steps of {config.train.batch_size} rows, peak learning rate "
        f"{optim.peak_lr(config):g}, on {mesh.size} {mesh.devices.flat[0].device_kind} device(s)"
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    if jax.process_index() != 0:
        return
    try:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}", fix="free space there") from error
