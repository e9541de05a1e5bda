"""Which settings make a step fit a slice, and which make it fastest there.

An estimate from the config alone says what cannot fit and what cannot be fast; only the rest is
compiled, the most promising first. The batch of a step stays what it is, so that what is found
trains as what was asked.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxtune import aot, assemble, estimate, setup, sharding
from jaxtune.assemble import Assembly
from jaxtune.config import Config, replaced
from jaxtune.errors import ConfigError
from jaxtune.models.stacks import REMAT
from jaxtune.plan.facts import Facts, facts, mesh_of
from jaxtune.plan.report import floors
from jaxtune.plan.topologies import Topology

SECONDS = 280  # of a search; nothing is compiled that would, by the slowest so far, end later
PATIENCE = 3  # compiled points in a row that are no better than the best
_POLICIES = [*REMAT]  # from the fastest to the smallest
_QUANTISED = ("int8", "nf4")


class Point(NamedTuple):
    """One setting of everything that a search varies."""

    changes: dict[str, Any]  # dotted settings that differ from the config
    config: Config
    fits_at_most: bool  # False: the parts that are known exactly are too much already
    needs: int  # bytes of a device, estimated
    seconds: float  # of a step: its floor, estimated
    busy: float  # the same, if products, memory and links waited for each other

    @property
    def rank(self) -> tuple[int, int]:
        """(policy, micro-batch): memory grows as the first falls and as the second does."""
        return _POLICIES.index(self.config.model.remat), self.config.train.grad_accum

    @property
    def place(self) -> tuple[Any, ...]:
        """What points share whose memory can be compared by `rank`."""
        return self.config.model.quantize, self.config.mesh

    def no_smaller_than(self, other: "Point") -> bool:
        """Whether this needs at least the memory of the other."""
        mine, theirs = self.rank, other.rank
        same = self.place == other.place
        return same and mine[0] <= theirs[0] and mine[1] <= theirs[1]


class Found(NamedTuple):
    point: Point
    facts: Facts
    seconds: float  # the floor of a step


class Space:
    """Estimates for settings on one topology; what is dear is made once a mesh and base."""

    def __init__(self, config: Config, folder: Path, topology: Topology):
        self.config, self.folder, self.topology = config, folder, topology
        self._made: dict[Any, tuple[Assembly, estimate.Bytes]] = {}
        self.available = aot.memory_of(aot.own_device(mesh_of(config, topology)))

    def point(self, changes: dict[str, Any]) -> Point | None:
        """The point of these settings; None where they do not go together."""
        config = replaced(self.config, changes)
        try:
            mesh = mesh_of(config, self.topology)
            shards = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
            rows, rest = divmod(config.train.batch_size, config.train.grad_accum)
            if rest or rows % shards or config.data.max_length % mesh.shape[sharding.CONTEXT]:
                return None
            assembly, parts = self._parts(config, mesh)
        except ConfigError:
            return None
        saved, working = estimate.activations(config, assembly, mesh)
        parts = parts._replace(saved=saved, working=working)
        fits = parts.arguments + parts.saved <= self.available
        floor, busy = self._seconds(config, assembly, parts, mesh)
        return Point(changes, config, fits, parts.arguments + saved + working, floor, busy)

    def _parts(self, config: Config, mesh) -> tuple[Assembly, estimate.Bytes]:
        key = (config.model.quantize, config.mesh)
        if key not in self._made:
            assembly = assemble.assemble(config, self.folder, mesh, weights=False)
            program = setup.program(config, assembly, steps=1)
            parts = estimate.memory(config, assembly, program, mesh)
            self._made[key] = assembly, parts
        return self._made[key]

    def _seconds(self, config, assembly: Assembly, parts: estimate.Bytes, mesh):
        """(the largest, the sum) of a step's floors, less than a compiler will make of them."""
        chip, each = self.topology.chip, self.topology.chip.devices
        tokens = config.train.batch_size * config.data.max_length / mesh.size
        local = estimate.tokens_a_device(config, mesh)
        entry = jnp.dtype(config.model.dtype).itemsize
        micro, fsdp, tensor = config.train.grad_accum, mesh.shape["fsdp"], mesh.shape["tensor"]
        products = estimate.flops(config, assembly).total * tokens
        stream = local * assembly.model.hidden_size * entry
        passes = 2 + (_POLICIES.index(config.model.remat) > 0)
        weights = parts.base * fsdp  # of what a device computes with
        if config.model.quantize != "none":  # unpacked to memory, and read from there
            model = assembly.model
            sizes = (m.inputs * m.outputs for m in estimate.matrices(model, 0).values())
            weights += 2 * entry * sum(sizes) * model.num_layers // tensor
        moved = 2 * parts.base * (fsdp - 1) * micro  # gathered forward, and again backward
        moved += 2 * parts.adapters * (mesh.size > 1)
        moved += 4 * stream * (fsdp - 1) / fsdp * micro * fsdp  # to the vocabulary and back
        moved += 4 * 2 * stream * (tensor - 1) / tensor * assembly.model.num_layers * micro
        memory = passes * weights * micro + 2 * parts.saved * micro + 3 * parts.optimizer
        floors = products / chip.bf16, memory / chip.hbm, moved / chip.ici
        return each * max(floors), each * sum(floors)


def meshes(config: Config, topology: Topology, experts: bool) -> Iterator[dict[str, Any]]:
    """Ways to share out the devices of a slice: copies of the base, shards, matrices cut."""
    context, expert = config.mesh.context, config.mesh.expert
    count = topology.chips // topology.slices * topology.chip.devices // context
    sizes = [2**i for i in range(count.bit_length()) if count % 2**i == 0]
    for tensor, fsdp in itertools.product(sizes, sizes):
        if tensor > 8 or count % (tensor * fsdp):
            continue
        for own in (1, count // tensor // fsdp) if experts else (expert,):
            if own < 1 or count % (tensor * fsdp * own):
                continue
            data = count // (tensor * fsdp * own)
            yield {
                "mesh.data": data,
                "mesh.fsdp": fsdp,
                "mesh.expert": own,
                "mesh.tensor": tensor,
            }


def _micro_batches(config: Config) -> list[int]:
    rows = config.train.batch_size
    return [n for n in range(1, rows + 1) if rows % n == 0 and (n & (n - 1)) == 0]


def _bases(config: Config) -> list[str]:
    """Forms of the frozen base worth a try; a full fine-tune has none."""
    quantised = _QUANTISED if config.lora.r and config.model.quantize == "none" else ()
    return [config.model.quantize, *quantised]


def search(
    config: Config,
    folder: Path,
    topology: Topology,
    watch: Callable[[int, int, str], None],
    *,
    seconds: float = SECONDS,
) -> list[Found]:
    """The best points, fastest first; each has been compiled and fits.

    Args:
      watch: is told (points done, points there are, a short text).
      seconds: in which all of it is to end.
    """
    begun = time.monotonic()
    space = Space(config, folder, topology)
    sparse = setup_has_experts(config, folder)
    points = []
    combinations = itertools.product(
        _bases(config), meshes(config, topology, sparse), _micro_batches(config), _POLICIES
    )
    for quantize, mesh, micro, remat in combinations:
        changes = {"model.remat": remat, "train.grad_accum": micro, **mesh}
        changes["model.quantize"] = quantize
        point = space.point({k: v for k, v in changes.items() if setting(config, k) != v})
        if point is not None and point.fits_at_most:
            points.append(point)
    # Of points as fast, those come first that move least, then those that keep the base as it is.
    points.sort(
        key=lambda p: (round(p.seconds, 4), p.busy, p.config.model.quantize != "none", p.rank)
    )
    found: list[Found] = []
    known: list[tuple[Point, Facts]] = []
    worse, slowest = 0, 0.0
    for number, point in enumerate(points):
        best = min((f.seconds for f in found), default=float("inf"))
        late = time.monotonic() - begun + slowest > seconds
        if point.seconds >= best or worse >= PATIENCE or late:
            break
        if _hopeless(point, known, space.available):
            continue
        if any(f.point.place == point.place and point.rank >= f.point.rank for f in found):
            continue  # computes no less and as often as one that fits
        watch(number, len(points), describe(point.changes))
        started = time.monotonic()
        result = facts(point.config, folder, topology)
        slowest = max(slowest, time.monotonic() - started)
        known.append((point, result))
        if not result.fits:
            continue
        floor = max(floors(topology, result).values())
        worse = 0 if floor < best else worse + 1
        found.append(Found(point, result, floor))
    watch(len(points), len(points), f"{len(found)} of {len(known)} compiled fit")
    return sorted(found, key=lambda f: (f.seconds, f.point.busy, f.facts.needed))


def _hopeless(point: Point, known: list[tuple[Point, Facts]], available: int) -> bool:
    """Whether what has been compiled says that this does not fit: it needs no less than one that
    did not, or the estimate of its policy has been too low all along.
    """
    if any(not made.fits and point.no_smaller_than(other) for other, made in known):
        return True
    same = [
        made.needed / other.needs
        for other, made in known
        if other.config.model.remat == point.config.model.remat
    ]
    return bool(same) and point.needs * min(same) > available


def setup_has_experts(config: Config, folder: Path) -> bool:
    """Whether the model has experts to share out."""
    return assemble.describe(config, folder)[1].experts is not None


def nearest(
    config: Config,
    folder: Path,
    topology: Topology,
    watch: Callable[[int, int, str], None],
    *,
    most: int = 6,
) -> tuple[dict[str, Any], Facts] | None:
    """The smallest change of settings with which a step fits, by compiling; None within `most`."""
    space = Space(config, folder, topology)
    now = _POLICIES.index(config.model.remat)
    micro = [n for n in _micro_batches(config) if n % config.train.grad_accum == 0]
    cut: list[dict[str, Any]] = [{}, {"mesh.data": 1, "mesh.fsdp": -1}]
    ladder = []
    for base, mesh, count, remat in itertools.product(
        _bases(config), cut, micro, ("", "full", "offload")
    ):
        if remat and _POLICIES.index(remat) <= now:
            continue
        changes = dict(mesh)
        if remat:
            changes["model.remat"] = remat
        if count != config.train.grad_accum:
            changes["train.grad_accum"] = count
        if base != config.model.quantize:
            changes["model.quantize"] = base
        doubled = (count // config.train.grad_accum).bit_length() - 1
        far = {"": 0, "full": 1, "offload": 4}[remat] + doubled + 2 * bool(mesh)
        far += 3 * (base != config.model.quantize) + (base == "nf4")
        point = space.point(changes) if changes else None
        if point is not None and point.fits_at_most:
            unlikely = 10 * (point.needs > 1.3 * space.available)  # by the guess of its working set
            ladder.append((far + unlikely, len(ladder), point))
    known: list[tuple[Point, Facts]] = []
    for _, _, point in sorted(ladder, key=lambda step: step[:2]):
        if _hopeless(point, known, space.available):
            continue
        if len(known) == most:
            break
        watch(len(known), most, describe(point.changes))
        result = facts(point.config, folder, topology)
        known.append((point, result))
        if result.fits:
            watch(most, most, describe(point.changes))
            return point.changes, result
    return None


def setting(config: Config, key: str) -> Any:
    """The value of a dotted setting."""
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def describe(changes: dict[str, Any]) -> str:
    """Settings as flags to paste."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())
