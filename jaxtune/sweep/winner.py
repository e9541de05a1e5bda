"""The trial that won, as an ordinary run: `best/`, `best.py` and `export/` of a sweep's workdir."""

import dataclasses
import json
import math
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxtune
from jaxtune import checkpoint, metrics, setup, train, tuned
from jaxtune.config import Config, SweepConfig, dotted
from jaxtune.console import say
from jaxtune.errors import NumericsError, StorageError
from jaxtune.sweep import halving, trials
from jaxtune.sweep.records import SEARCH, Record
from jaxtune.sweep.space import Space
from jaxtune.workdir import fingerprint_of

BEST, EXPORT, PAGE, RESULT = "best", "export", "best.py", "result.json"  # in a workdir
_HIGHEST = 0.01  # learning rate that is worth a try where all were too high
_EVEN = 1e-3  # relative, to the loss of equal odds
_NEAR = 2e-3  # relative: two programs that compute the same loss in 16 bits


def choose(records: Sequence[Record]) -> Record:
    """The trial to hand over: the best final training, else the best of the search.

    Raises:
      NumericsError: no trial has a finite score; says what was tried.
    """
    finals = [record for record in records if record.role == "final" and record.results]
    if finals:
        return min(finals, key=lambda record: record.results[-1].loss)
    best = halving.best(records)
    if best is None:
        raise _all_diverged(records)
    return best


def again(records: Sequence[Record]) -> dict[str, list[float]]:
    """Held-out losses of "winner" and "defaults", trained whole with other seeds."""
    return {
        name: [r.results[-1].loss for r in records if r.repeats == name and r.results]
        for name in ("winner", "defaults")
    }


def outdone(records: Sequence[Record]) -> Record | None:
    """The first repeat of the defaults, where these beat the winner in the mean over seeds.

    The winner was chosen for its loss, luck included; repeats are chosen for nothing.
    """
    losses = again(records)
    if not all(losses.values()):
        return None
    if statistics.fmean(losses["winner"]) <= statistics.fmean(losses["defaults"]):
        return None
    return next(record for record in records if record.repeats == "defaults" and record.results)


def base_loss(engine: Any, config: Config, rows: int) -> float:
    """The held-out loss of a trial before its first step, on `rows` of the rows."""
    slots = engine.start(engine.empty(min(engine.widths)), 0, engine.member(config))
    return engine.evaluate(slots, rows)[0].loss


def require_gain(base: float, best: Record, records: Sequence[Record], outcomes: int) -> None:
    """Raises NumericsError where the base or blind guessing is as good as the best trial.

    Losses that ran away may settle on a plateau, and then look as if they had not diverged.

    Args:
      base: held-out loss of the base model.
      outcomes: what a prediction chooses from.
    """
    even = math.log(outcomes)
    if best.loss is not None and math.isclose(best.loss, even, rel_tol=_EVEN):
        raise NumericsError(
            f"the best is trial {best.number} with a held-out loss of {best.loss:.4f}, that of "
            f"equal odds for all {outcomes}: it knows nothing",
            fix=_lower(records),
        )
    if best.loss is None or best.loss < base:
        return
    raise NumericsError(
        f"no trial is better than the base model, whose held-out loss is {base:.4f}: the best is "
        f"trial {best.number} with {best.loss:.4f}",
        fix=_lower(records),
    )


def _all_diverged(records: Sequence[Record]) -> NumericsError:
    tried = [record for record in records if record.role in SEARCH]
    return NumericsError(f"all {len(tried)} trials diverged", fix=_lower(records))


def _lower(records: Sequence[Record]) -> str:
    """What to try where no learning rate was low enough."""
    rates = sorted(
        r.params["optim.lr"] for r in records if r.role in SEARCH and "optim.lr" in r.params
    )
    if not rates:
        return "a lower optim.lr, or model.dtype=float32, in another --workdir"
    high = min(rates[0] / 3, _HIGHEST)
    return (
        f"sweep.space optim.lr below {rates[0]:.3g}, the smallest that was tried: "
        f"log({high / 100:.1g}, {high:.1g}) in another --workdir"
    )


def sound_rates(records: Sequence[Record]) -> str | None:
    """A line on the learning rates that diverged and those that did not, where some did."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for record in records:
        if record.role in SEARCH and "optim.lr" in record.params:
            rates[record.status == "diverged"].append(record.params["optim.lr"])
    if not rates[True] or not rates[False]:
        return None
    count = "1 trial" if len(rates[True]) == 1 else f"{len(rates[True])} trials"
    return (
        f"{count} diverged, from a learning rate of {min(rates[True]):.3g} on; "
        f"{min(rates[False]):.3g} to {max(rates[False]):.3g} did not"
    )


def state_of(
    engine: Any,
    config: Config,
    record: Record,
    folder: Path,
    sweep: str,
    check_stop: Callable[[], None],
) -> Any:
    """The TrainState of a trial at its last result, as `jaxtune train` would have it, on device.

    From the trial's file; where that is damaged or not here, trained again from the one before.
    """
    member = engine.member(config)
    end = record.results[-1].position
    saved, damaged = trials.newest(folder, record.number, end, sweep)
    slots = engine.empty(min(engine.widths))
    position = saved.position if saved else 0
    if position < end:
        why = "; ".join(damaged) or "its state is not here"
        say(f"trial {record.number} is trained again from micro-batch {position}: {why}")
    slots = engine.put(slots, 0, saved.arrays) if saved else engine.start(slots, 0, member)
    others = min(engine.widths) - 1
    while position < end:
        check_stop()
        slots, _ = engine.step(slots, [member, *[None] * others], [position, *[0] * others])
        position += 1
    return engine.export_state(slots, 0, member)


def write(
    engine: Any, config: Config, record: Record, state: Any, place: Path, before: float
) -> int:
    """Writes a workdir such as `jaxtune train` leaves it; returns its step.

    Args:
      before: the held-out loss it began from.
    Raises:
      StorageError: the disk is full or failed.
    """
    shutil.rmtree(place, ignore_errors=True)
    member = engine.member(config)
    step, loss = int(state.step), record.results[-1].loss
    config = dataclasses.replace(config, sweep=SweepConfig())
    progress = train.Progress(
        position=step * config.train.batch_size,
        tokens=record.tokens,
        evals=[[0, before], [step, loss]],
    )
    fingerprint = fingerprint_of(config, engine.folder, engine.train, engine.eval, member.steps)
    meta = {"fingerprint": fingerprint, "progress": dataclasses.asdict(progress)}
    saver = checkpoint.Checkpoints(
        place / "checkpoints", keep=config.checkpoint.keep, best=config.checkpoint.best
    )
    saver.save(step, state, meta=meta, loss=loss)
    write_json(place / setup.CONFIG, setup.portable(config))
    writer = metrics.Writer(place, tensorboard=False, wandb="", resume_step=0)
    try:
        writer.write(0, "eval", {"loss": before})
        for position, value in record.curve:
            if position % member.every == 0 and position // member.every <= step:
                writer.write(position // member.every, "train", {"loss": value})
        writer.write(step, "eval", {"loss": loss, "accuracy": record.results[-1].accuracy})
    finally:
        writer.close()
    return step


def hand_over(
    record: Record, step: int, made: Path, workdir: Path, *, whole: bool
) -> dict[str, Any]:
    """Scores what `write` made from the disk, moves it to `best/` and exports it to `export/`.

    Returns what `jaxtune eval` does.

    Args:
      whole: the record was scored on all held-out rows.
    Raises:
      Failure: the checkpoint cannot be opened again, or the export is not what it should be.
    """
    scores = tuned.evaluate(made)
    after, expected = scores["tuned"]["loss"], record.results[-1].loss
    if whole and not math.isclose(after, expected, rel_tol=_NEAR):
        say(f"warning: the winner scores {after:.4f} by itself, {expected:.4f} in the sweep")
    best, export = workdir / BEST, workdir / EXPORT
    result = {
        "steps": step,
        "loss_before": scores["base"]["loss"],
        "loss_after": after,
        "best_step": step,
        "best_loss": after,
        "tokens": record.tokens,
        "seconds": round(record.seconds, 3),
        "workdir": str(best),
        "version": jaxtune.__version__,
    }
    write_json(made / RESULT, result)
    try:
        for path in (best, export):
            shutil.rmtree(path, ignore_errors=True)
        made.rename(best)
    except OSError as error:
        raise StorageError(f"{best} cannot be written: {error}", fix="mend it there") from error
    tuned.export(best, export, format="hf")
    return scores


def page(config: Config, space: Space, params: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """A config file of a trial: what differs from the defaults, the searched values explained.

    Args:
      params: {key: value} of the trial, some of which the config may already have.
      own: what the sweep's config says for the keys of the space.
    """
    usual = dotted(Config().to_dict())
    values = dotted(setup.portable(dataclasses.replace(config, sweep=SweepConfig())))
    lines = [
        '"""The winner of a sweep; jaxtune train --config=best.py --workdir=DIR does it again."""',
        "",
        "from jaxtune.config import default_config",
        "",
        "",
        "def get_config():",
        "    config = default_config()",
    ]
    for key, value in values.items():
        if key.startswith("sweep."):
            continue
        if key in space and key in params:
            comment = f"  # searched: {spell_axis(space[key])}; the sweep's config has {own[key]!r}"
            lines.append(f"    config.{key} = {value!r}{comment}")
        elif value != usual.get(key):
            lines.append(f"    config.{key} = {value!r}")
    return "\n".join([*lines, "    return config", ""])


def spell_axis(axis: tuple[Any, ...]) -> str:
    """("log", 1e-5, 3e-3) -> "1e-05 to 0.003, log"; a choice by its values."""
    kind, *values = axis
    if kind == "choice":
        return "one of " + ", ".join(map(repr, values))
    return f"{values[0]:g} to {values[1]:g}{', log' if kind == 'log' else ''}"


def write_text(path: Path, text: str) -> None:
    """Writes a small file, as a whole or not at all. Raises StorageError."""
    partial = path.with_suffix(path.suffix + f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}", fix="free space there") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")
