"""The printed form of an optimized XLA program: its computations, loops and groups of devices."""

import math
import re
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Instruction(NamedTuple):
    name: str
    shape: str  # with layout, as printed
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes
    arguments: str  # operands as printed: a constant's value, a parameter's number


Computation = dict[str, Instruction]


class Program(NamedTuple):
    computations: dict[str, Computation]
    roots: dict[str, Instruction]
    entry: str


def parse(text: str) -> Program:
    """The printed form of an HLO module."""
    computations: dict[str, Computation] = {}
    roots: dict[str, Instruction] = {}
    entry, current, name = "", {}, ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif " = " in line and line.startswith("  "):
            instruction = _instruction(line.strip().removeprefix("ROOT "))
            current[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                roots[name] = instruction
    return Program(computations, roots, entry)


def _instruction(line: str) -> Instruction:
    name, _, right = line.partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].lstrip()
    opening = right.index("(")
    closing = _closing(right, opening)
    arguments = right[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    rest = right[closing + 1 :]
    return Instruction(name.lstrip("%"), shape, right[:opening], operands, rest, arguments)


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text)


_LEAF = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


class Leaf(NamedTuple):
    bits: int
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * self.bits / 8


def leaves(shape: str) -> list[Leaf]:
    """The arrays of a printed shape; S(n) in a layout is memory other than the main one."""
    found = []
    for kind, dims, layout in _LEAF.findall(shape):
        bits = _BITS.get(kind)
        if bits is None:
            digits = re.search(r"\d+", kind)
            bits = int(digits[0]) if digits else 0
        sizes = tuple(int(d) for d in dims.split(",") if d)
        found.append(Leaf(bits, sizes, "S(" not in layout))
    return found


def size_of(shape: str) -> float:
    return sum(leaf.bytes for leaf in leaves(shape))


def called(instruction: Instruction) -> list[str]:
    return re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction.rest)


def op_name(one: Instruction) -> str:
    """Where in the Python program an instruction comes from."""
    match = re.search(r'op_name="([^"]*)"', one.rest)
    return match[1] if match else one.name


def replica_group(rest: str, devices: int) -> list[int]:
    """Members of the first group of a collective, in any of the forms that XLA prints."""
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if match is not None:
        return [int(d) for d in match[1].split(",")]
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if match is not None:
        order = np.arange(int(match[1]) * int(match[2])).reshape(_ints(match[3]))
        if match[4]:
            order = order.transpose(_ints(match[4]))
        return [int(d) for d in order.reshape(-1)[: int(match[2])]]
    match = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", rest)
    if match is not None:
        sizes = {name: int(n) for name, n in re.findall(r"'?([\w]+)'?=(\d+)", match[1])}
        chosen = re.findall(r"'([\w]+)'", match[3])
        order = np.arange(math.prod(sizes.values()))
        ids = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", match[2])
        if ids is not None:
            order = order.reshape(_ints(ids[1])).transpose(_ints(ids[2]) if ids[2] else None)
        order = order.reshape(tuple(sizes.values()))
        index = tuple(slice(None) if name in chosen else 0 for name in sizes)
        return [int(d) for d in np.ravel(order[index])]
    return list(range(devices))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def trip_count(
    program: Program, computation: Computation, loop: Instruction, body: str, condition: str
) -> int | None:
    """How often a while runs: as XLA wrote it there, or start, step and end of its counter.

    The TPU compiler does not keep the number. None where a part of it depends on data.
    """
    known = re.search(r'known_trip_count"?:\s*\{\s*"n":\s*"?(\d+)', loop.rest)
    if known is not None:
        return int(known[1])
    test = program.roots[condition]
    inner = program.computations[condition]
    if test.opcode == "fusion":  # one comparison of the condition's own values
        parameters = test.operands
        inner_test = program.roots[called(test)[0]]
        fused = program.computations[called(test)[0]]
        if inner_test.opcode != "compare":
            return None
        sides = [
            _element(inner, parameters[int(fused[n].arguments)])
            if fused[n].opcode == "parameter"
            else _element(fused, n)
            for n in inner_test.operands
        ]
        test = inner_test
    elif test.opcode == "compare":
        sides = [_element(inner, name) for name in test.operands]
    else:
        return None
    direction = re.search(r"direction=(\w+)", test.rest)
    before = computation.get(loop.operands[0])
    if direction is None or before is None or before.opcode != "tuple":
        return None
    step = _step(program, body, sides)
    if step is None:
        return None
    counter, amount = step
    start, end = (
        _element(computation, before.operands[at]) if kind == "element" else (kind, at)
        for kind, at in (sides[counter], sides[1 - counter])
    )
    if start[0] != "value" or end[0] != "value" or amount == 0:
        return None
    way = direction[1]
    if counter == 1:
        way = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(way, way)
    up = end[1] - start[1]
    distance = {"LT": up, "LE": up + 1, "NE": abs(up), "GT": -up, "GE": 1 - up}.get(way)
    return None if distance is None else max(0, math.ceil(distance / abs(amount)))


def _element(computation: Computation, name: str) -> tuple[str, int]:
    """What a scalar is: ("value", n), ("element", i) of the loop's tuple, or ("unknown", 0)."""
    one = computation[name]
    while one.opcode in ("copy", "bitcast", "convert", "reshape") and one.operands:
        one = computation[one.operands[0]]
    if one.opcode == "constant":
        text = one.arguments.strip()
        return ("value", int(text)) if re.fullmatch(r"-?\d+", text) else ("unknown", 0)
    if one.opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", one.rest)
        if index is not None and computation[one.operands[0]].opcode == "parameter":
            return "element", int(index[1])
    return "unknown", 0


def _step(program: Program, body: str, sides: list[tuple[str, int]]) -> tuple[int, int] | None:
    """(which side of the comparison is the counter, what the body adds to it)."""
    root, inside = program.roots[body], program.computations[body]
    if root.opcode != "tuple":
        return None
    for side, (kind, index) in enumerate(sides):
        if kind != "element":
            continue
        new = inside[root.operands[index]]
        while new.opcode in ("copy", "bitcast") and new.operands:
            new = inside[new.operands[0]]
        if new.opcode not in ("add", "subtract"):
            continue
        parts = [_element(inside, name) for name in new.operands]
        amounts = [value for part, value in parts if part == "value"]
        if ("element", index) in parts and amounts:
            return side, amounts[0]
    return None
