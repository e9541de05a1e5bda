"""From a sweep's config to an engine: who can share a base, in how many slots, on which rows."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from jaxtune import aot, assemble, estimate, setup, sharding
from jaxtune.assemble import Assembly
from jaxtune.config import Config, replaced
from jaxtune.console import say
from jaxtune.data import pipeline
from jaxtune.data.packing import Rows
from jaxtune.engine import Engine
from jaxtune.errors import ConfigError
from jaxtune.hf import files, tokenizer
from jaxtune.members import ADAPTER, Layout
from jaxtune.models.adapter import Spec

_MOST = 16  # slots, where nobody says how many
# On a CPU more of them leave the caches: a trial's micro-batch of stories260k, 8 x 64, on two cores
# takes 21.5, 17.5, 18.0 and 20.7 ms in 1, 4, 8 and 16 slots.
_MOST_CPU = 8


def open_engine(
    config: Config,
    points: Mapping[str, Sequence[Any]],
    widths: Sequence[int] = (),
    *,
    fraction: float = 1.0,
) -> Engine:
    """Loads the base, reads the data and makes ready for trials that take values of `points`.

    Trials share the base where only adapters are trained; else there is one slot.

    Args:
      points: {config key: all values of a choice, or the ends of a range}.
      widths: numbers of slots that will be asked for; empty is as many as fit, and narrower ones.
      fraction: of the training rows, drawn by the config's seed.
    Raises:
      ConfigError: no rows are held out, or settings that do not go together.
      Failure: a model or data that cannot be read.
    """
    _check_ranks(config, points)
    folder = files.resolve(config.model.path)
    mesh = sharding.make_mesh(config.mesh)
    micro, accumulates = _micro_batch(config, points)
    # The fewest slots there can be are one for each part of the trial axis.
    setup.check_batch(_as_batch(config, micro * mesh.shape[sharding.TRIAL]), mesh)
    config, assembly, train, held = _read(config, points, folder, mesh)
    layout = lay_out(config, assembly, mesh, micro, accumulates, points)
    shared = _sharing(config, assembly)
    if shared is not None:
        say(f"one trial at a time: {shared}")
        widths = (1,)
    else:
        widths = tuple(widths) or _widths(layout, train.width)
        parts = mesh.shape[sharding.TRIAL]
        widths = tuple(w for w in widths if w % parts == 0) or (parts,)
    layout = _with_remat(layout, widths[0])
    if fraction < 1:
        train = pipeline.subset(train, fraction, config.train.seed)
        say(f"{len(train)} rows for the search, a part of {fraction:g} of all")
    return Engine(layout, widths, train, held)


def lay_out(
    config: Config,
    assembly: Assembly,
    mesh: Mesh,
    micro: int,
    accumulates: bool = False,
    points: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> Layout:
    """A population of trials that take values of `points`, in micro-batches of so many rows."""
    program = setup.program(_as_batch(config, micro), assembly, 1)._replace(
        dropout=any(points.get("lora.dropout", (config.lora.dropout,))),
        smoothing=any(points.get("train.label_smoothing", (config.train.label_smoothing,))),
    )
    return Layout(config, assembly, mesh, program, micro, accumulates)


def _with_remat(layout: Layout, width: int) -> Layout:
    """model.remat=auto as it is for so many trials; members keep the config's word."""
    wide = _as_batch(layout.config, width * layout.micro)
    assembly = aot.resolve_remat(wide, layout.assembly, layout.mesh)[1]
    program = layout.program._replace(graphdef=assembly.graphdef)
    return dataclasses.replace(layout, assembly=assembly, program=program)


def _read(
    config: Config, points: Mapping[str, Sequence[Any]], folder: Path, mesh: Mesh
) -> tuple[Config, Assembly, Rows, Rows]:
    """-> (config with what the data decided, widest model, training rows, held-out rows)."""
    smoothing = max(points.get("train.label_smoothing", (config.train.label_smoothing,)))
    family, model = assemble.describe(
        replaced(config, {"train.label_smoothing": smoothing}), folder
    )
    config = setup.within_positions(config, model)
    tokens = tokenizer.load_tokenizer(str(folder), model.vocab_size)
    prepared = pipeline.prepare(config, tokens, say, setup.form(folder, model))
    if prepared.eval is None:
        raise ConfigError(
            "a sweep compares trials on rows that none of them trains on, and there are none",
            fix="--config.data.eval=FILE, or --config.data.eval_fraction=0.05",
        )
    config = replaced(config, {"data.labels": prepared.labels})
    widest: dict[str, Spec] = {}
    for trial in _lora_settings(config, points):
        for path, spec in assemble.targets(trial, family, model).items():
            other = widest.get(path, spec)
            widest[path] = Spec(max(spec.rank, other.rank), spec.scale)
    targets = widest if config.lora.r else None
    return (
        config,
        assemble.assemble(config, folder, mesh, targets=targets),
        prepared.train,
        prepared.eval,
    )


def _check_ranks(config: Config, points: Mapping[str, Sequence[Any]]) -> None:
    """Raises ConfigError where ranks differ and zeros beyond a trial's own would do harm."""
    ranks = {config.lora.r, *points.get("lora.r", ())}
    if len(ranks) == 1:
        return
    shown = ", ".join(map(str, sorted(ranks)))
    if 0 in ranks:
        raise ConfigError(
            f"lora.r is of {shown} in one population, and 0 trains all weights",
            fix="two sweeps: ranks above 0, and lora.r=0",
        )
    if config.optim.name in ("adafactor", "muon"):
        raise ConfigError(
            f"lora.r is of {shown} and optim.name is {config.optim.name}, whose updates depend on "
            "the sizes of all matrices",
            fix="one rank, or optim.name=adamw or lion",
        )
    if config.lora.init != "default":
        raise ConfigError(
            f"lora.r is of {shown} and lora.init is an adapter of one rank",
            fix="no lora.r in sweep.space",
        )


def _lora_settings(config: Config, points: Mapping[str, Sequence[Any]]) -> list[Config]:
    """A config for every combination of what decides on adapters' places and ranks."""
    keys = [k for k in ("lora.r", "lora.target_modules", "lora.layers_to_transform") if k in points]
    return [
        replaced(config, dict(zip(keys, values, strict=True)))
        for values in itertools.product(*(points[key] for key in keys))
    ]


def _micro_batch(config: Config, points: Mapping[str, Sequence[Any]]) -> tuple[int, bool]:
    """(rows of a micro-batch, whether some trial needs several of them for a step)."""
    batches = [config.train.batch_size, *points.get("train.batch_size", ())]
    micro = math.gcd(config.train.batch_size // config.train.grad_accum, *batches)
    return micro, max(batches) > micro


def _sharing(config: Config, assembly: Assembly) -> str | None:
    """Why trials cannot share the base in one program; None where they can."""
    if not config.lora.r:
        return "all weights are trained"
    if config.task == "classify":
        return "classifiers have heads of their own"
    if assembly.model.experts is not None:
        return "experts are shared out by all the tokens of a batch"
    if config.lora.use_dora:
        return "DoRA rescales the base's own weights"
    if others := [path for path in assembly.trained if not path.endswith(ADAPTER)]:
        return f"{others[0]} is trained in full"
    return None


def _widths(layout: Layout, length: int) -> tuple[int, ...]:
    """As many slots as fit, then fewer by sweep.eta, down to one."""
    parts, asked = layout.mesh.shape[sharding.TRIAL], layout.config.sweep
    most = _MOST_CPU if layout.mesh.devices.flat[0].platform == "cpu" else _MOST
    most = min(asked.trials or most, max(most, parts))
    most = max(1 << (most.bit_length() - 1), parts)
    while most > parts and not fits(layout, most, length):
        most //= 2
    found = [most]
    while found[-1] > parts:
        found.append(max(parts, found[-1] // asked.eta))
    return tuple(found)


def fits(layout: Layout, width: int, length: int) -> bool:
    """Whether so many slots fit a device: their step is compiled for it; on a CPU, an estimate."""
    if layout.mesh.devices.flat[0].platform != "cpu":
        try:
            compiled = layout.step(width, length).compile().memory_analysis()
        except JaxRuntimeError as error:
            if not aot.read_out_of_memory(str(error))[0]:
                raise
            return False
        assert compiled is not None, "every accelerator reports its memory"
        need = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
        return need <= (aot.memory_of(aot.own_device(layout.mesh)) or math.inf)
    wide = _as_batch(layout.config, width * layout.micro)
    need = estimate.memory(wide, layout.assembly, layout.program, layout.mesh)
    own = width * (2 * need.adapters + need.optimizer)
    return own + need.base + need.saved + need.working <= aot.cpu_share(need.base)


def _as_batch(config: Config, rows: int) -> Config:
    return replaced(config, {"train.batch_size": rows, "train.grad_accum": 1})
