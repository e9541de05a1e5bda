"""The cores of a machine that computes on its processor, as devices which share out the rows.

XLA cuts an operation over all cores and waits for the last of them, and small operations it does
not cut: in a LoRA step a quarter of two cores idles so. Cores with rows of their own wait for each
other once a step. The frozen base is in memory once: its copies on CPU devices are the same pages.
"""

import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from jaxtune import flags
from jaxtune.config import Config, MeshConfig

# XLA ends a process whose devices wait 40 s for one another, as when other work holds up a core.
_PATIENCE = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=86400"
)

_MOST = 8  # each device has adapters, moments and gradients of its own
_count = 1


def count() -> int:
    """Devices that this machine's processor was made into; 1 where nobody did."""
    return _count


def share(
    config: Config, *, search: bool = False, environment: MutableMapping[str, str] = os.environ
) -> int:
    """Makes as many devices of the processor as can share out the rows of a micro-batch.

    To be called before jax is imported, of a command that trains adapters. Returns how many; 1, and
    nothing is changed, beside an accelerator, where the environment has said how many there are,
    where the config has a mesh of its own, where all weights are trained, and on cores that are not
    alike.

    Args:
      search: rows of the smallest batch of a sweep.
    """
    global _count
    given = {"JAX_NUM_CPU_DEVICES", "PJRT_NPROC"} & environment.keys()
    flagged = environment.get("XLA_FLAGS", "").strip()
    told = "xla_force_host_platform_device_count" in flagged
    in_file = flagged and not flagged.startswith("-")  # XLA reads it, and then nothing else
    if given or told or in_file or "jax" in sys.modules:
        return 1
    # Programs in flight at once on devices with a thread each may wait for each other for ever.
    in_turn = environment.get("JAX_CPU_ENABLE_ASYNC_DISPATCH", "").lower() in ("false", "0")
    wanted = in_turn and config.lora.r and config.mesh == MeshConfig()
    if not wanted or not flags.on_processor(environment):
        return 1
    here = alike()
    rows = _searched(config) if search else config.train.batch_size // config.train.grad_accum
    devices = max(d for d in range(1, min(here, _MOST) + 1) if rows % d == 0)
    if devices == 1:
        return 1
    environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    environment["XLA_FLAGS"] = f"{_PATIENCE} {flagged}".strip()  # what is given wins
    if devices == here:
        environment["PJRT_NPROC"] = "1"  # no threads beside theirs
    _count = devices
    return devices


def alike(system: Path = Path("/sys/devices")) -> int:
    """Cores that this process may use; 1 where some are slower, or where nobody says.

    Devices get as many rows each, so the others would wait for a slow one.
    """
    if not hasattr(os, "sched_getaffinity"):  # not Linux: a Mac has cores of two kinds
        return 1
    capacities = {file.read_text() for file in system.glob("system/cpu/cpu[0-9]*/cpu_capacity")}
    if len(capacities) > 1 or (system / "cpu_atom").exists():
        return 1
    return len(os.sched_getaffinity(0))


def _searched(config: Config) -> int:
    """Rows that every micro-batch of a sweep is a multiple of, whatever sizes its space has."""
    batch = config.train.batch_size
    rows = batch // config.train.grad_accum
    if not config.sweep.space:  # its own has half of the batch too, where that can be
        halved = batch % (2 * config.train.grad_accum) == 0
        return math.gcd(rows, batch // 2 if halved else batch)
    axis = dict(config.sweep.space).get("train.batch_size", ("choice",))
    sizes = axis[1:] if isinstance(axis, tuple) and axis[:1] == ("choice",) else (1,)
    # What is wrong with a space is said where it is read.
    return math.gcd(rows, batch, *sizes) if all(type(size) is int for size in sizes) else 1
