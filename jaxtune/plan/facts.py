"""One compiled step in numbers, kept on disk: the same question is answered at once.

The key is everything the answer follows from: settings that change the program, the model's
config.json, the topology, XLA's flags, the versions of jax and libtpu, and our own source.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxtune
from jaxtune import aot, assemble, estimate, flags, setup, sharding
from jaxtune.config import Config
from jaxtune.hf import files
from jaxtune.plan import hlo
from jaxtune.plan.topologies import Topology, devices
from jaxtune.setup import within_positions

# Scopes whose products a program does not show: inside of kernels, or in loops that are as long as
# the data says. What they cost at most comes from the config.
_HIDDEN = ("attention", "vocabulary")

# Files that no fact follows from.
_SHOWS = (
    *("budget.py", "checkpoint.py", "cli.py", "compare.py", "console.py", "decoding.py", "demo/"),
    *("doctor.py", "metrics.py", "plan/command.py", "plan/interrupt.py", "plan/report.py"),
    *("plan/search.py", "plan/sizes.py", "pods/", "population.py", "sweep/", "train.py"),
    *("tuned.py", "workdir.py"),
)


class Facts(NamedTuple):
    """Bytes and operations of one device and one step, as compiled."""

    fits: bool
    needed: int  # bytes
    available: int
    buffers: tuple[tuple[int, str], ...]  # (bytes, name) of the largest, where it does not fit
    arguments: int
    temporaries: int  # and outputs that take no argument's place
    parts: dict[str, int]  # bytes by what they hold: base, adapters, optimizer, batch
    flops: float  # products in the program, with those of kernels that hide them
    flops_a_token: dict[str, float]  # by the count of the config: see estimate.Flops
    hbm: float
    ici: dict[str, float]  # bytes sent, by collective
    dcn: dict[str, float]
    unknown: tuple[str, ...]  # loops whose count nobody knows
    tokens: int  # of a step, over all devices
    seconds: float  # to lower and compile
    recalled: bool = False  # from the cache; not kept there


def facts(
    config: Config, folder: Path, topology: Topology, before: Callable[[], None] = lambda: None
) -> Facts:
    """Compiles the step for a topology, or recalls that it was compiled.

    Args:
      config: with a model.remat other than auto.
      before: is called when it is certain that a compiler must be asked.
    """
    kept = cache_folder() / f"{_key(config, folder, topology)}.json"
    try:
        values = json.loads(kept.read_text())
        found = Facts(**values, recalled=True)
        if {*values, "recalled"} == set(Facts._fields) and isinstance(found.needed, int):
            return found
    except (OSError, ValueError, TypeError):
        pass  # not there, or damaged: it is made anew
    found = _compile(config, folder, topology, before)
    values = found._asdict()
    del values["recalled"]
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(values))
        partial.replace(kept)
    except OSError:
        pass  # a full or read-only disk costs the next one its time, and this one nothing
    return found


def cache_folder() -> Path:
    """Where plans are kept, beside jax's own cache."""
    return flags.caches(os.environ) / "plan"


def mesh_of(config: Config, topology: Topology) -> jax.sharding.Mesh:
    """The mesh that a run has on these slices."""
    return sharding.make_mesh(config.mesh, devices(topology))


def _compile(config: Config, folder: Path, topology: Topology, before: Callable[[], None]) -> Facts:
    mesh = mesh_of(config, topology)
    assembly = assemble.assemble(config, folder, mesh, weights=False)
    config = within_positions(config, assembly.model)
    program = setup.program(config, assembly, steps=1)
    parts = estimate.memory(config, assembly, program, mesh)
    counted = estimate.flops(config, assembly)
    first = aot.own_device(mesh)
    values: dict[str, Any] = {
        "parts": {k: v for k, v in parts._asdict().items() if k not in ("saved", "working")},
        "flops_a_token": counted._asdict(),
        "tokens": config.train.batch_size * config.data.max_length,
    }
    before()
    try:
        options = flags.compiler_options(first.device_kind)
        compiled = aot.compile_step(config, assembly, program, mesh, options=options)
    except aot.OutOfMemory as error:
        return Facts(
            fits=False,
            needed=error.needed,
            available=error.available,
            buffers=tuple((b.bytes, b.name) for b in error.buffers[:3]),
            arguments=parts.arguments,
            temporaries=error.needed - parts.arguments,
            flops=0.0,
            hbm=0.0,
            ici={},
            dcn={},
            unknown=(),
            seconds=0.0,
            **values,
        )
    found = hlo.count(
        compiled.hlo,
        trips=dict.fromkeys(_HIDDEN, 1),
        apart=_HIDDEN,
        slices=mesh.shape["slices"],
        devices=mesh.size,
    )
    hidden = counted.attention + counted.attention_again + counted.head
    hidden *= values["tokens"] / mesh.size
    return Facts(
        fits=True,
        needed=compiled.total,
        available=aot.memory_of(first),
        buffers=(),
        arguments=compiled.arguments,
        temporaries=compiled.total - compiled.arguments,
        flops=found.flops + hidden,
        hbm=found.hbm,
        ici=dict(found.ici),
        dcn=dict(found.dcn),
        unknown=tuple(found.unknown),
        seconds=compiled.seconds_lower + compiled.seconds_compile,
        **values,
    )


def _key(config: Config, folder: Path, topology: Topology) -> str:
    values = config.to_dict()
    data = {key: values["data"][key] for key in ("max_length", "labels")}
    train = {key: values["train"][key] for key in ("batch_size", "grad_accum")}
    optim = {key: values["optim"][key] for key in ("name", "rules", "schedule", "clip_norm")}
    known = {
        "task": config.task,
        "model": {key: value for key, value in values["model"].items() if key != "path"},
        "lora": {key: value for key, value in values["lora"].items() if key != "init"},
        "data": data,
        "train": train,
        "optim": optim,
        "mesh": values["mesh"],
        "base": files.read_json(folder / "config.json"),
        "topology": [topology.raw, topology.slices],
        "versions": [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")],
        "source": _source(),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


@cache
def _source() -> str:
    """A digest of this package's own source, flags of the chips among it."""
    digest = hashlib.sha256(jaxtune.__version__.encode())
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not name.startswith(_SHOWS):
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()
