"""What this machine and this installation can do, line by line; nothing is changed.

Every look is short: devices are asked in a process of their own, which is given up after a minute,
and the network is asked on TPU machines only, for two seconds.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxtune import __version__, flags
from jaxtune.errors import ConfigError
from jaxtune.pods import cluster

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain",
            "transformers", "tokenizers", "datasets")  # fmt: skip
_CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_FP8 = (8, 9)  # CUDA compute capability from which a GPU multiplies 8-bit floats
_SECONDS = 60
_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
_ASK = """
import json, jax
devices = jax.local_devices()
first = devices[0]
memory = (first.memory_stats() or {}).get("bytes_limit")
print(json.dumps({"platform": first.platform, "kind": first.device_kind, "count": len(devices),
    "memory": memory, "compute": getattr(first, "compute_capability", "")}))
"""
_LOAD = """
from jaxtune.plan import topologies
topologies.devices(topologies.find("v5litepod-4"))
"""


class Line(NamedTuple):
    """One thing looked at."""

    name: str
    state: str  # ok, note or problem
    text: str
    fix: str = ""


def examine(environment: Mapping[str, str] | None = None, kinds: Sequence[str] = ()) -> list[Line]:
    """All lines, in the order they are shown.

    Args:
      kinds: of TPU chips, also such as are not here, whose flags are to be shown.
    """
    environment = os.environ if environment is None else environment
    chips, gpu = flags.tpu_chips(), flags.has_gpu()
    pod = cluster.tpu_hosts() if chips.count else 1
    return [
        Line("jaxtune", "ok", f"{__version__}, Python {platform.python_version()}"),
        *versions(_versions(), chips),
        hardware(chips, gpu, importlib.util.find_spec("libtpu") is not None, _cuda()),
        *(pod_of(pod) if pod > 1 else devices(environment, chips, gpu and _cuda())),
        *settings(environment, chips, gpu),
        *tpu_flags(environment, chips, kinds, refused_flags),
        cache(Path(environment.get("JAX_COMPILATION_CACHE_DIR", ""))),
        *processor(Path("/proc")),
        disk("disk here", Path.cwd()),
        *access(environment, Path.home()),
    ]


def show(lines: list[Line]) -> None:
    """The lines as a table on stdout; into a pipe or a file uncut, one a line."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    for _ in ("name", "text"):
        table.add_column(overflow="fold")  # what is cut off cannot be pasted
    wide, long = (max(len(line[i]) for line in lines) for i in (1, 0))
    for line in lines:
        text = f"{line.text}; try: {line.fix}" if line.fix else line.text
        if console.is_terminal:
            table.add_row(f"[{_STYLES[line.state]}]{line.state}[/]", line.name, escape(text))
        else:
            print(f"{line.state:{wide}}  {line.name:{long}}  {text}")
    if console.is_terminal:
        console.print(table)


def require_sound(lines: list[Line]) -> None:
    """Raises ConfigError where a line is a problem: the first one, and how many more."""
    broken = [line for line in lines if line.state == "problem"]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ConfigError(f"{broken[0].name}: {broken[0].text}{more}", fix=broken[0].fix)


def as_json(lines: list[Line]) -> dict[str, Any]:
    """{"sound": bool, "lines": [{name, state, text, fix}, ...]}"""
    sound = all(line.state != "problem" for line in lines)
    return {"sound": sound, "lines": [line._asdict() for line in lines]}


def versions(found: Mapping[str, str], chips: flags.Chips) -> list[Line]:
    """Installed versions, and whether those that must match do."""
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    lines = [Line("versions", "ok", text)]
    if found.get("jax") != found.get("jaxlib"):
        said = f"jax {found.get('jax')} with jaxlib {found.get('jaxlib')}"
        lines.append(Line("versions", "problem", said, "pip install --upgrade jax jaxlib"))
    wanted = _wanted_libtpu()
    if "libtpu" in found and wanted and not found["libtpu"].startswith(wanted):
        state = "problem" if chips.count else "note"
        said = f"libtpu {found['libtpu']}, and jax {found.get('jax')} was made for {wanted}*"
        lines.append(Line("versions", state, said, "pip install --upgrade 'jaxtune[tpu]'"))
    return lines


def hardware(chips: flags.Chips, gpu: bool, libtpu: bool, cuda: bool) -> Line:
    """Accelerators on the bus against what is installed for them."""
    if chips.count and not libtpu:
        what = f"{chips.count} TPU {chips.generation} chips, and jax has no libtpu to use them"
        return Line("accelerator", "problem", what, "pip install 'jaxtune[tpu]'")
    if chips.count:
        return Line("accelerator", "ok", f"{chips.count} TPU {chips.generation} chips")
    if gpu and not cuda:
        what = "a GPU, and jax has no plugin to use it"
        return Line("accelerator", "problem", what, "pip install 'jaxtune[cuda]'")
    if gpu:
        return Line("accelerator", "ok", "GPU")
    here = "; libtpu is here, so jaxtune plan can compile for TPUs" if libtpu else ""
    return Line("accelerator", "note", f"none: runs use the processor{here}")


def devices(environment: Mapping[str, str], chips: flags.Chips, gpu: bool) -> list[Line]:
    """What jax finds, asked in a process of its own: a TPU that is in use may never answer."""
    command = [sys.executable, "-c", _ASK]
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [_silent(f"jax found no device within {_SECONDS} s")]
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return [_silent(_last_words(done.stderr))]
    memory = f" of {found['memory'] / 2**30:.1f} GiB" if found["memory"] else ""
    text = f"{found['count']} x {found['kind']}{memory}"
    lines = [Line("devices", "ok", text)]
    if (chips.count or gpu) and found["platform"] == "cpu":
        asked = environment.get("JAX_PLATFORMS")
        fix = "unset JAX_PLATFORMS" if asked else "the lines of jax with JAX_LOGGING_LEVEL=INFO"
        lines = [Line("devices", "problem", f"{text}: the accelerator is not used", fix)]
    if found["compute"]:
        modern = tuple(map(int, str(found["compute"]).split("."))) >= _FP8
        text = f"compute capability {found['compute']}: {'with' if modern else 'no'} fp8"
        lines.append(Line("gpu", "ok" if modern else "note", text))
    return lines


def pod_of(hosts: int) -> list[Line]:
    """A TPU pod, whose devices answer only when jax starts on all of its hosts at once."""
    said = f"{hosts} hosts: the same command on each is one run; devices are not asked from one"
    return [Line("pod", "ok", said)]


def settings(environment: Mapping[str, str], chips: flags.Chips, gpu: bool) -> list[Line]:
    """Flags of XLA and jax, and whose they are."""
    ours = flags.defaults({}, chips, gpu=gpu, libtpu=True)
    apart = {"JAX_COMPILATION_CACHE_DIR", "LIBTPU_INIT_ARGS"}  # have lines of their own
    lines = []
    for name in sorted({*ours, "XLA_FLAGS", "JAX_PLATFORMS"} - apart):
        if value := environment.get(name):
            whose = "jaxtune's" if ours.get(name) == value else "yours"
            lines.append(Line(name, "ok", f"{value} ({whose})"))
    return lines


def tpu_flags(
    environment: Mapping[str, str],
    chips: flags.Chips,
    kinds: Sequence[str],
    refused: Callable[[str], str | None],
) -> list[Line]:
    """LIBTPU_INIT_ARGS as it is here, and as a run has it on other chips.

    Args:
      refused: what libtpu says against such arguments; empty where it takes them, None where
        nobody can be asked.
    """
    given = environment.get("LIBTPU_INIT_ARGS", "")
    shown = [("LIBTPU_INIT_ARGS", given, flags.libtpu_arguments(chips.generation))] if given else []
    for kind in kinds:
        ours = flags.libtpu_arguments(kind)
        shown.append((f"flags of {kind}", flags.libtpu_arguments(kind, given), ours))
    said = {text: refused(text) for text in {text for _, text, _ in shown}}  # each asked once
    lines = []
    for name, text, ours in shown:
        whose = "jaxtune's" if text == ours else "yours" if text == given else "yours and jaxtune's"
        wrong = said[text]
        if wrong:
            fix = "LIBTPU_INIT_ARGS without it, or unset"
            lines.append(Line(name, "problem", f"libtpu refuses {text}: {wrong}", fix))
        else:
            unasked = ", not checked: no libtpu here" if wrong is None else ""
            lines.append(Line(name, "ok", f"{text} ({whose}{unasked})"))
    return lines


def refused_flags(arguments: str) -> str | None:
    """What libtpu says against LIBTPU_INIT_ARGS; empty where it takes them, None without libtpu.

    It is loaded in a process of its own, since it ends the one whose flags it does not know.
    """
    for word in arguments.split():
        if not word.startswith("--"):
            return f"{word} is no flag, so it counts for nothing"
    if importlib.util.find_spec("libtpu") is None:
        return None
    environment = os.environ | {"LIBTPU_INIT_ARGS": arguments, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOAD],
            env=environment, capture_output=True, text=True, timeout=_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    return "" if done.returncode == 0 else _last_words(done.stderr).removeprefix("ERROR: ")


def cache(folder: Path) -> Line:
    """Where compiled programs are kept, how much they take, whether more can be written."""
    if not folder.name:
        return Line("compiled programs", "note", "not kept: JAX_COMPILATION_CACHE_DIR is empty")
    there = folder
    while not there.exists():
        there = there.parent
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        fix = "JAX_COMPILATION_CACHE_DIR=FOLDER that can be written"
        return Line("compiled programs", "problem", f"{folder} cannot be written: {error}", fix)
    sizes = [entry.stat().st_size for entry in os.scandir(folder)] if folder.is_dir() else []
    free = shutil.disk_usage(there).free / 1e9
    text = f"{len(sizes)} files, {sum(sizes) / 1e6:.0f} MB in {folder}, {free:.0f} GB free there"
    return Line("compiled programs", "ok" if free > 1 else "note", text)


def processor(proc: Path) -> list[Line]:
    """Cores this process may use, what they multiply, memory."""
    known = _read(proc / "cpuinfo")
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", known, re.MULTILINE)
    words = set(listed[1].split()) if listed else set()
    model = re.search(r"^model name\s*:\s*(.*)$", known, re.MULTILINE)
    units = [
        name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16") if name in words
    ]
    bf16 = any("bf16" in name for name in units)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    named = f" of {model[1]}" if model else ""
    also = "" if bf16 or not words else ": no bfloat16, so model.dtype=float32 is as fast there"
    lines = [Line("processor", "ok", f"{cores} cores{named}, {', '.join(units) or 'plain'}{also}")]
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(proc / "meminfo"), re.MULTILINE))
    if "MemTotal" in sizes:
        total, free = (int(sizes[k]) / 2**20 for k in ("MemTotal", "MemAvailable"))
        state = "ok" if free > 2 else "note"
        lines.append(Line("memory", state, f"{free:.1f} GiB free of {total:.1f} GiB"))
    pages = re.search(r"\[(\w+)\]", _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")))
    if pages:
        lines.append(Line("huge pages", "ok", pages[1]))
    return lines


def disk(name: str, folder: Path) -> Line:
    """Free space of the disk a folder is on."""
    free = shutil.disk_usage(folder).free / 1e9
    return Line(name, "ok" if free > 5 else "note", f"{free:.1f} GB free at {folder}")


def access(environment: Mapping[str, str], home: Path) -> list[Line]:
    """Which doors are open; of a key only whether it is there."""
    adc = home / ".config" / "gcloud" / "application_default_credentials.json"
    named = environment.get("GOOGLE_APPLICATION_CREDENTIALS")
    google = (named and Path(named).is_file()) or adc.is_file()
    gcsfs = importlib.util.find_spec("gcsfs") is not None
    says = f"gcsfs {'is' if gcsfs else 'is not'} installed, credentials {_presence(google)}"
    lines = [Line("gs:// buckets", "ok" if gcsfs and google else "note", says)]
    hub = Path(environment.get("HF_HOME") or home / ".cache" / "huggingface") / "token"
    token = environment.get("HF_TOKEN") or hub.is_file()
    offline = ", offline" if environment.get("HF_HUB_OFFLINE") in ("1", "true", "True") else ""
    lines.append(
        Line("Hugging Face", "ok" if token else "note", f"token {_presence(token)}{offline}")
    )
    key = environment.get("WANDB_API_KEY") or "api.wandb.ai" in _read(home / ".netrc")
    wandb = importlib.util.find_spec("wandb") is not None
    says = f"{'' if wandb else 'not '}installed, key {_presence(key)}"
    lines.append(Line("Weights & Biases", "ok" if wandb and key else "note", says))
    return lines


def _presence(value: Any) -> str:
    return "present" if value else "absent"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _wanted_libtpu() -> str:
    """The start of the libtpu version that jax names, such as 0.0.42."""
    for requirement in importlib.metadata.requires("jax") or ():
        if named := re.match(r"libtpu==([\d.]+?)\.?\*", requirement):
            return f"{named[1]}."
    return ""


def _cuda() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in _CUDA)


def _silent(why: str) -> Line:
    held = re.search(r"in use by process with pid (\d+)", why)
    if held:
        fix = f"let process {held[1]} end, or stop it: ps -fp {held[1]}"
    elif named := re.search(r"XLA_FLAGS", why) or re.search(r"command line flag|for flag", why):
        which = "XLA_FLAGS" if named[0] == "XLA_FLAGS" else "LIBTPU_INIT_ARGS"
        fix = f"{which} without it, or unset"
    else:
        fix = "end other programs that use the accelerator; sudo lsof /dev/accel* /dev/vfio/*"
    return Line("devices", "problem", why, fix)


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Of glog: F1121 17:46:52.721403   20159 parse_flags_from_env.cc:234] Unknown flag ...
    last = re.sub(r"^[EF]\d{4} [^\]]*\] ", "", lines[-1]) if lines else "jax ended without a word"
    return last[:300]


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
