"""TPU slices by the names people meet: v5litepod-8 in the cloud console, v5e:2x4 in libtpu.

A console name counts chips for v5e and v6e and TensorCores (two a chip) for the others; `2x` before
a name is two such slices, joined by the data centre's network.
"""

import contextlib
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxtune.errors import ConfigError
from jaxtune.plan import interrupt


class Chip(NamedTuple):
    """Published peaks of one chip, a second; 0 where none is published.

    Operations and memory as in jax/_src/pallas/mosaic/tpu_info.py, which a test compares. `ici` is
    what all links of a chip carry one way, `dcn` its share of the host's network, from
    docs.cloud.google.com/tpu (v2 and v3: Jouppi et al., CACM 63(7), 2020).
    """

    name: str
    cores: int  # TensorCores a chip: what most console names count
    devices: int  # of jax a chip
    bf16: float
    int8: float
    fp8: float
    hbm: float  # bytes
    ici: float  # bytes
    dcn: float  # bytes


# v4 and v5p join their two cores to one device (megacore); v2, v3 and 7x show each of them.
CHIPS = {
    "v2": Chip("v2", 2, 2, 4.6e13, 0, 0, 7.16e11, 248e9, 0),
    "v3": Chip("v3", 2, 2, 1.4e14, 0, 0, 8.25e11, 328e9, 0),
    "v4": Chip("v4", 2, 1, 2.75e14, 0, 0, 1.23e12, 270e9, 0),
    "v5e": Chip("v5e", 1, 1, 1.97e14, 3.94e14, 0, 8.2e11, 200e9, 3.125e9),
    "v5p": Chip("v5p", 2, 1, 4.59e14, 9.18e14, 0, 2.46e12, 600e9, 6.25e9),
    "v6e": Chip("v6e", 1, 1, 9.2e14, 1.84e15, 9.2e14, 1.64e12, 400e9, 12.5e9),
    "tpu7x": Chip("tpu7x", 2, 2, 2.31e15, 0, 4.6e15, 7.4e12, 600e9, 12.5e9),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_OLD = ("2x2", "4x4", "8x8", "8x16", "16x16", "16x32", "32x32")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_SHAPES = {
    "v2": _OLD[:5],
    "v3": _OLD,
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": (*_CUBES, "8x16x16", "16x16x16", "16x16x24"),
    "v6e": _FLAT,
    "tpu7x": ("1x1x1", *_CUBES, "8x16x16"),
}
_PREFIX = {"v5e": "v5litepod"}  # of console names, where it is not the chip's
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}


class Topology(NamedTuple):
    """One or more slices of TPU chips."""

    name: str  # as in the cloud console where it has one, else raw
    chip: Chip
    shape: tuple[int, ...]  # of one slice, in chips
    slices: int

    @property
    def raw(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)


def named() -> dict[str, Topology]:
    """{console name: topology} of one slice each."""
    found = {}
    for kind, shapes in _SHAPES.items():
        chip = CHIPS[kind]
        for text in shapes:
            shape = tuple(map(int, text.split("x")))
            # v5e and v6e have one core a chip, so for all of them the unit is cores.
            name = f"{_PREFIX.get(kind, kind)}-{math.prod(shape) * chip.cores}"
            found[name] = Topology(name, chip, shape, 1)
    return found


def find(name: str) -> Topology:
    """The topology of a console name, a raw name, or either after `2x`.

    Raises:
      ConfigError: a name nobody has; the nearest one, or the shapes that there are.
    """
    match = re.fullmatch(r"(?:(\d+)x(?=[a-z]))?([a-z]+\d*[a-z]*)([-:])([\dx]+)", name.lower())
    known = named()
    if match is not None and int(match[1] or 1) > 0:
        slices, kind = int(match[1] or 1), _ALIASES.get(match[2], match[2])
        found = None
        if match[3] == "-":
            found = known.get(f"{_PREFIX.get(kind, kind)}-{match[4]}")
        elif kind in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", match[4]):
            found = _shaped(kind, tuple(map(int, match[4].split("x"))))
        if found is not None:
            prefix = f"{slices}x" if slices > 1 else ""
            return found._replace(name=prefix + found.name, slices=slices)
    names = [*known, *(t.raw for t in known.values()), *(f"v5e-{n}" for n in (1, 4, 8, 16))]
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.3)
    raise ConfigError(
        f"topology {name!r} is not known",
        fix=f"did you mean {close[0] if close else 'v5litepod-8'}? "
        "v5litepod-8, v6e-16, v5p-64, 2xv5litepod-16 and v5e:2x4 are forms of names",
    )


def _shaped(kind: str, shape: tuple[int, ...]) -> Topology:
    """A slice by its shape, smaller sides first as the clouds write it: 4x2x1 of v5e is 2x4.

    Raises:
      ConfigError: no slice has that shape; those that there are.
    """
    sides = len(_SHAPES[kind][0].split("x"))
    longer = sorted(n for n in shape if n > 1)
    ones = [1] * (sides - len(longer))
    shape = (*longer, *ones) if sides == 3 else (*ones, *longer)
    for topology in named().values():
        if (topology.chip.name, topology.shape) == (kind, shape):
            return topology
    # Beyond the names there are slices of whole cubes, of sides that are multiples of four.
    if sides == len(shape) == 3 and not any(n % 4 for n in shape):
        return Topology(f"{kind}:{'x'.join(map(str, shape))}", CHIPS[kind], shape, 1)
    cubes = ", or whole cubes such as 4x4x12" if sides == 3 else ""
    raise ConfigError(
        f"there is no slice {kind}:{'x'.join(map(str, shape))}",
        fix=f"{kind} has {', '.join(_SHAPES[kind])}{cubes}",
    )


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for, as jax would list them on those slices; no TPU is needed.

    Raises:
      ConfigError: libtpu is not installed, or does not know a slice of this shape.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "planning for a TPU needs its compiler, libtpu", fix="pip install 'jaxtune[tpu]'"
        )
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # as on a v4 host; libtpu's default is not
    if math.prod(topology.shape) == 1 or topology.shape == (2, 4):  # one host, not whole trays
        options["chips_per_host_bounds"] = (*topology.shape, 1)[:3]
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        with _quiet_libtpu():
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=topology.raw, **options
            ).devices
        interrupt.put_back()  # a SIGTERM would print the stacks of libtpu's threads
    except (JaxRuntimeError, ValueError, NotImplementedError) as error:
        said = " ".join(str(error).split()).removeprefix("INVALID_ARGUMENT: ")[:200]
        raise ConfigError(
            f"libtpu has no {topology.raw}: {said}",
            fix="pip install --upgrade 'jaxtune[tpu]', or another slice",
        ) from None
    return list(found)


@contextlib.contextmanager
def _quiet_libtpu() -> Iterator[None]:
    """Spares people libtpu's lines about a TPU machine that this one is not, while it is loaded."""
    quiet = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody's TPU is opened
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    missing = {name: value for name, value in quiet.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
