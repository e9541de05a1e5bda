"""Counts what an optimized XLA program does: operations, memory traffic, bytes between devices.

`Compiled.cost_analysis()` visits the body of a loop once; here every loop counts as often as it
runs. Only products count as operations (dot, and convolution, which is what a TPU makes of it).
Numbers are those of one device. A kernel in a custom call shows no products: its cost is added by
who knows it.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jaxtune.plan.hlo_text import (
    Computation,
    Instruction,
    Leaf,
    Program,
    called,
    leaves,
    op_name,
    parse,
    replica_group,
    size_of,
    trip_count,
)

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Instructions that move nothing, or whose insides are counted instead.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota", "async",
    "async-update",
}  # fmt: skip


@dataclass
class Counts:
    """Totals of one device and one run of the program."""

    flops: float = 0.0
    apart: float = 0.0  # operations of the scopes that were to be kept apart
    hbm: float = 0.0  # bytes read and written in main memory, on-chip memory left out
    ici: dict[str, float] = field(default_factory=dict)  # bytes a device sends, by collective
    dcn: dict[str, float] = field(default_factory=dict)  # the same, between slices
    kernels: dict[str, float] = field(default_factory=dict)  # runs of custom calls, by target
    unknown: dict[str, float] = field(default_factory=dict)  # loops counted once: no count found

    def add(self, other: "Counts", times: float = 1) -> None:
        self.flops += other.flops * times
        self.apart += other.apart * times
        self.hbm += other.hbm * times
        for name in ("ici", "dcn", "kernels", "unknown"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, value in theirs.items():
                mine[key] = mine.get(key, 0) + value * (1 if name == "unknown" else times)


class _Open(NamedTuple):
    """Counts of a computation, and its collectives by channel: pieces of one are one."""

    counts: Counts
    collectives: dict[str, "_Collective"]  # by channel


class _Collective(NamedTuple):
    kind: str
    between: bool  # slices
    sent: float  # bytes of a device
    hbm: float  # bytes of main memory


class _Counter:
    def __init__(self, program: Program, trips, apart, slices: int, devices: int):
        self.program, self.trips, self.apart = program, trips, apart
        self.slices, self.devices = slices, devices
        self.seen: dict[tuple[str, bool], _Open] = {}

    def closed(self, name: str) -> Counts:
        """A computation that is run as a whole, with its collectives."""
        inner = self.visit(name, fused=False)
        total = Counts()
        total.add(inner.counts)
        for one in inner.collectives.values():
            sent = total.dcn if one.between else total.ici
            sent[one.kind] = sent.get(one.kind, 0) + one.sent
            total.hbm += one.hbm
        return total

    def visit(self, name: str, fused: bool) -> _Open:
        if (name, fused) in self.seen:
            return self.seen[name, fused]
        computation = self.program.computations[name]
        result = _Open(Counts(), {})
        for instruction in computation.values():
            self.instruction(computation, instruction, fused, result)
        self.seen[name, fused] = result
        return result

    def instruction(self, computation: Computation, one: Instruction, fused: bool, out: _Open):
        kind = one.opcode.removesuffix("-start")
        if one.opcode in ("dot", "convolution"):
            products = (_dot if one.opcode == "dot" else _convolution)(computation, one)
            self.put(one, Counts(flops=products), out.counts)
        elif one.opcode == "while":
            self.loop(computation, one, out.counts)
        elif one.opcode == "conditional":
            branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.rest)
            listed = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
            branches += re.findall(r"[\w.\-]+", listed[1]) if listed else []
            costs = [self.closed(branch) for branch in branches]
            self.put(one, max(costs, key=lambda c: (c.flops + c.apart, c.hbm)), out.counts)
        elif one.opcode == "async-start" or kind in (
            "fusion",
            "call",
        ):  # call-start: on a sparse core
            for name in called(one):
                inner = self.visit(name, fused or kind == "fusion")
                self.put(one, inner.counts, out.counts)
                out.collectives.update(inner.collectives)
        elif one.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', one.rest)
            out.counts.add(Counts(kernels={target[1] if target else "?": 1}))
        elif kind in COLLECTIVES and not one.opcode.endswith("-done"):
            channel = re.search(r"channel_id=(\d+)", one.rest)
            key = f"{kind} {channel[1]}" if channel else one.name
            out.collectives[key] = self.collective(computation, one, kind)
        elif one.opcode == "send" and "_xla_megascale" in one.rest:
            out.collectives[one.name] = self.between_slices(computation, one)
        if not fused:
            out.counts.hbm += self.memory(computation, one)

    def between_slices(self, computation: Computation, one: Instruction) -> _Collective:
        """A collective's part over the data centre's network: libtpu sends it by way of the host.

        Within the slices it has become collectives of their own.
        """
        size, others = size_of(computation[one.operands[0]].shape), self.slices - 1
        match = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)
        kind = match[1].lower().replace("_", "-") if match else "send"
        rounds = {"all-reduce": 2 * others / self.slices, "all-gather": others}
        rounds |= {"reduce-scatter": others / self.slices, "all-to-all": others / self.slices}
        return _Collective(kind, True, size * rounds.get(kind, 1), 2 * size)

    def loop(self, computation: Computation, one: Instruction, out: Counts) -> None:
        body, condition = (
            re.search(rf"{part}=%?([\w.\-]+)", one.rest) for part in ("body", "condition")
        )
        assert body is not None, "a while has a body"
        assert condition is not None, "a while has a condition"
        times = trip_count(self.program, computation, one, body[1], condition[1])
        if times is None:
            label = op_name(one)
            given = [count for part, count in self.trips.items() if part in label]
            if not given:
                out.add(Counts(unknown={label: 1}))
            times = given[0] if given else 1
        self.put(one, self.closed(body[1]), out, times)

    def put(self, one: Instruction, counts: Counts, out: Counts, times: float = 1) -> None:
        """Adds what an instruction costs; all products inside of a scope kept apart are so too."""
        if any(scope in op_name(one) for scope in self.apart):
            counts = replace(counts, flops=0.0, apart=counts.apart + counts.flops)
        out.add(counts, times)

    def collective(self, computation: Computation, one: Instruction, kind: str) -> _Collective:
        size = sum(size_of(computation[name].shape) for name in one.operands if name in computation)
        read = sum(leaf.bytes for name in one.operands for leaf in _hbm(computation, name))
        per_slice = self.devices // self.slices
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", one.rest.split("source_target_pairs=")[-1])
            between = any(int(a) // per_slice != int(b) // per_slice for a, b in pairs)
            return _Collective(kind, between, size, 2 * read)
        group = replica_group(one.rest, self.devices)
        count = len(group)
        between = len({member // per_slice for member in group}) > 1
        if kind == "all-gather":
            return _Collective(kind, between, size * (count - 1), read * (1 + count))
        rounds = 2 if kind == "all-reduce" else 1
        return _Collective(kind, between, rounds * size * (count - 1) / count, 2 * read)

    def memory(self, computation: Computation, one: Instruction) -> float:
        """Bytes of main memory that an instruction outside of a fusion reads and writes."""
        kind = one.opcode.removesuffix("-start")
        if kind in _FREE or one.opcode.endswith("-done") or kind in COLLECTIVES:
            return 0.0  # a collective's pieces share one count
        results = [leaf for leaf in leaves(one.shape) if leaf.in_hbm]
        if one.opcode.endswith("-start"):
            read = sum(leaf.bytes for name in one.operands for leaf in _hbm(computation, name))
            into = leaves(one.shape)
            if one.opcode == "slice-start":
                size = into[1].bytes
                return size * (bool(read) + into[1].in_hbm)
            return read + (into[0].bytes if into[0].in_hbm and one.opcode == "copy-start" else 0)
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * sum(leaf.bytes for leaf in results)
        if one.opcode in ("dynamic-update-slice", "scatter"):
            at = 1 if one.opcode == "dynamic-update-slice" else 2
            return 2 * sum(leaf.bytes for leaf in _hbm(computation, one.operands[at]))
        written = sum(leaf.bytes for leaf in results)
        if one.opcode != "fusion":
            return written + sum(
                leaf.bytes for name in one.operands for leaf in _hbm(computation, name)
            )
        inside = called(one)[0]
        inner, root = self.program.computations[inside], self.program.roots[inside]
        made = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = sum(map(partial(self._written, inner), made, leaves(one.shape)))
        for number, name in enumerate(one.operands):
            whole = sum(leaf.bytes for leaf in _hbm(computation, name))
            if whole:
                written += min(whole, self.used(inside, number))
        return written

    def _written(self, inner: Computation, made: Instruction, leaf: Leaf) -> float:
        """Bytes of main memory that one result of a fusion takes."""
        kind = made.opcode.removesuffix("-start").removesuffix("-done")
        if not leaf.in_hbm or kind in ("parameter", "custom-call", *COLLECTIVES):
            return 0.0  # passed on as it came, or a collective's, which is counted by itself
        if made.opcode == "dynamic-update-slice":  # in place
            return size_of(inner[made.operands[1]].shape)
        return leaf.bytes

    def used(self, name: str, number: int) -> float:
        """Bytes that a fusion reads of one of its parameters: of a sliced one, its slices."""
        computation = self.program.computations[name]
        parameter = next(
            one
            for one in computation.values()
            if one.opcode == "parameter" and one.arguments.strip() == str(number)
        )
        return self._used(computation, parameter)

    def _used(self, computation: Computation, source: Instruction) -> float:
        total, whole = 0.0, size_of(source.shape)
        for user in computation.values():
            if source.name not in user.operands:
                continue
            at = user.operands.index(source.name)
            if user.opcode in ("dynamic-slice", "slice", "gather") and at == 0:
                total += size_of(user.shape)
            elif user.opcode == "dynamic-update-slice" and at == 0:
                continue  # written in place
            elif user.opcode.removesuffix("-start") in ("tuple", "custom-call", *COLLECTIVES):
                continue  # passed on, or read by a collective, which is counted by itself
            elif user.opcode == "bitcast":
                total += self._used(computation, user)
            elif user.opcode == "fusion":
                total += self.used(called(user)[0], at)
            else:
                return whole
        return min(total, whole)


def count(
    text: str,
    *,
    trips: Mapping[str, int] = MappingProxyType({}),
    apart: Collection[str] = (),
    slices: int = 1,
    devices: int = 1,
) -> Counts:
    """Counts a program as `Compiled.as_text()` prints it.

    Args:
      trips: {part of a loop's op_name: how often it runs}, where that depends on the data.
      apart: parts of op_names whose products are not to be added to the others.
      slices: equal runs of devices, the slower network between them.
      devices: of the whole program.
    """
    program = parse(text)
    return _Counter(program, trips, apart, slices, devices).closed(program.entry)


def _hbm(computation: Computation, name: str) -> list[Leaf]:
    one = computation.get(name)
    return [] if one is None else [leaf for leaf in leaves(one.shape) if leaf.in_hbm]


def _dims(computation: Computation, name: str) -> tuple[int, ...]:
    return leaves(computation[name].shape)[0].dims


def _dot(computation: Computation, one: Instruction) -> float:
    left = _dims(computation, one.operands[0])
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    summed = [int(d) for d in match[1].split(",") if d] if match else []
    return 2.0 * math.prod(leaves(one.shape)[0].dims) * math.prod(left[d] for d in summed)


def _convolution(computation: Computation, one: Instruction) -> float:
    """Products of a convolution that fall inside its input, times two."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None, "a convolution says what its dimensions are"
    left, kernel = (_dims(computation, name) for name in one.operands[:2])
    result = leaves(one.shape)[0].dims
    in_labels, kernel_labels, out_labels = labels.groups()
    products = 2.0 * kernel[kernel_labels.index("i")]
    products *= result[out_labels.index("b")] * result[out_labels.index("f")]
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis in sorted(set(out_labels) - {"b", "f"}):
        at = int(axis)

        def setting(name: str, default: str, at=at) -> str:
            return fields[name].split("x")[at] if name in fields else default

        low = int(setting("pad", "0_0").split("_")[0])
        step, apart = int(setting("stride", "1")), int(setting("rhs_dilate", "1"))
        spread = int(setting("lhs_dilate", "1"))
        size = left[in_labels.index(axis)]
        outs = np.arange(result[out_labels.index(axis)])[:, None] * step
        inputs = outs + np.arange(kernel[kernel_labels.index(axis)]) * apart - low
        inside = (inputs >= 0) & (inputs <= (size - 1) * spread) & (inputs % spread == 0)
        products *= int(inside.sum())
    return products
