"""What to tell XLA about the chips of this machine, before jax starts.

    TPU   LIBTPU_INIT_ARGS, from a table by generation; the same as compiler_options where a program
          is compiled for chips that are elsewhere (jaxtune plan)
    GPU   memory fraction and optimization level
    CPU   dispatch; how many devices it is: cores.py

A variable that is set already stays, and so does a flag that is named in LIBTPU_INIT_ARGS.
"""

import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

# Of the PCI bus, as jax's own hardware_utils has them.
_GOOGLE = "0x1ae0"
_GENERATIONS = {
    "0x0027": "v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "tpu7x",
}
_KINDS = {  # jax's device_kind
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
_GPUS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

# Gradients travel between slices while the layers below are still computed.
_SLICES = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
# Not here, of MaxText's recipes: the flags of asynchronous collective fusion, which libtpu 0.0.42
# has on by default (the same program on v5e:2x4, 2% more memory on v6e:2x4), and
# xla_tpu_scoped_vmem_limit_kib=98304 (temporaries of a 1B LoRA step on v5e:2x4 0.62 -> 0.79 GiB).
_TPU: dict[str, dict[str, str]] = {
    "v4": _SLICES,
    "v5e": _SLICES,
    "v5p": _SLICES,
    "v6e": _SLICES,
    "tpu7x": _SLICES,
}
GENERATIONS = tuple(_TPU)  # of chips that have a set of flags


class Chips(NamedTuple):
    """TPU chips attached to this machine."""

    count: int
    generation: str  # a key of the table above; empty where there is none or a new one


def tpu_chips(devices: Path = Path("/sys/bus/pci/devices")) -> Chips:
    """The TPU chips on the PCI bus; reads a few small files and starts nothing."""
    found = []
    for vendor in sorted(devices.glob("*/vendor")):
        try:
            if vendor.read_text().strip() == _GOOGLE:
                found.append(_GENERATIONS.get((vendor.parent / "device").read_text().strip()))
        except OSError:
            continue
    chips = [generation for generation in found if generation is not None]
    return Chips(len(chips), chips[-1] if chips else "")


def has_gpu() -> bool:
    """Whether a GPU is to be seen; starts nothing."""
    return any(Path(path).exists() for path in _GPUS)


def on_processor(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether jax will compute on this machine's processor; starts nothing."""
    chosen = environment.get("JAX_PLATFORMS", "").partition(",")[0]
    return chosen == "cpu" or not (chosen or tpu_chips().count or has_gpu())


def compiler_options(device_kind: str) -> dict[str, str]:
    """XLA's options for a program on chips of jax's `device_kind`; empty where none are known."""
    return dict(_TPU.get(_KINDS.get(device_kind, ""), {}))


def libtpu_arguments(generation: str, given: str = "") -> str:
    """LIBTPU_INIT_ARGS: what is `given`, then our flags for the chip that it does not name."""
    named = {word.removeprefix("--").partition("=")[0] for word in given.split()}
    ours = [f"--{k}={v}" for k, v in _TPU.get(generation, {}).items() if k not in named]
    return " ".join([*given.split(), *ours])


def caches(environment: Mapping[str, str]) -> Path:
    """Where all that can be made again is kept."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtune"


def defaults(
    environment: Mapping[str, str], chips: Chips, *, gpu: bool, libtpu: bool = False
) -> dict[str, str]:
    """{variable: value} that suit a command line on this machine; none that is set already.

    LIBTPU_INIT_ARGS alone is extended. `libtpu` says that it is installed.
    """
    wanted = {
        # On a CPU host and device share the cores: overlapping them only adds threads.
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
        # A second start compiles nothing: 6 s of processor time instead of 14 on a tiny model.
        "JAX_COMPILATION_CACHE_DIR": str(caches(environment) / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if libtpu and not (chips.count or gpu):
        # It is here to compile for TPUs elsewhere; jax would look for chips and complain.
        wanted["JAX_PLATFORMS"] = "cpu"
    if gpu:
        # A run has the GPU to itself: jax would leave a quarter of its memory alone.
        wanted["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.9"
    missing = {name: value for name, value in wanted.items() if name not in environment}
    if chips.generation:
        given = environment.get("LIBTPU_INIT_ARGS", "")
        missing["LIBTPU_INIT_ARGS"] = libtpu_arguments(chips.generation, given)
    return missing


def apply(environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Sets `defaults` for this machine, before jax is imported; returns what it set."""
    libtpu = importlib.util.find_spec("libtpu") is not None
    found = defaults(environment, tpu_chips(), gpu=has_gpu(), libtpu=libtpu)
    environment.update(found)
    return found
