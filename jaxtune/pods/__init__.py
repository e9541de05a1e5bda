"""Several hosts, one run: they meet, agree, and none waits for ever for one that is gone.

Every host runs the same command. Hosts speak through the coordination service of jax.distributed,
which process 0 serves: short texts under keys, and barriers. No device takes part in it, so a host
that is stuck in a collective can still be told to end. On one host everything here does nothing.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune import flags
from jaxtune.config import dotted
from jaxtune.console import stderr
from jaxtune.errors import ConfigError, Failure, Interrupted
from jaxtune.pods import cluster
from jaxtune.pods.pod import Pod, leave
from jaxtune.signals import Stop

HEARTBEAT = 100  # seconds of silence after which a host counts as lost; jax has the same
ARRIVAL = 300  # seconds all hosts have to start in
STUCK = 1800  # seconds in which every host must get on while any other does
_VERSIONS = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers")

_pod: Pod | None = None  # of this process, as jax.distributed has one state


def start(*, heartbeat: float = HEARTBEAT, arrival: float = ARRIVAL, stuck: float = STUCK) -> None:
    """Joins the other hosts, where the environment says that there are any; before jax is used.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a TPU pod's own metadata,
    Slurm, Open MPI and Kubernetes' indexed jobs are understood. Elsewhere it returns at once.

    Args:
      heartbeat: seconds of silence after which a host counts as lost.
      arrival: seconds in which all hosts must have come.
      stuck: seconds in which a host must get on while others do.

    Raises:
      ConfigError: an environment that names a cluster by halves.
      Interrupted: hosts that did not come.
    """
    if _current(heartbeat, stuck) is not None:
        return
    found = cluster.from_environment()
    if found is None and not cluster.in_cluster():
        return
    import jax

    _keep_stdout()
    # Its C++ handler of SIGTERM would swallow the signal: ours stops all hosts at one step.
    jax.config.update("jax_enable_preemption_service", False)
    address, count, index = found or (None, None, None)
    fix = "the same command on every host, at the same time"
    late = f"the hosts of this run did not all come within {arrival:.0f} s"
    _expect_abort(lambda: Interrupted(late, fix=fix))
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            # Told its place, jax must not take Slurm's word for which devices are its own.
            cluster_detection_method="deactivate" if found else None,
            initialization_timeout=round(arrival),
            heartbeat_timeout_seconds=round(heartbeat),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise Interrupted(f"{late}: {_first(error)}", fix=fix) from error
    _current(heartbeat, stuck)


def _keep_stdout() -> None:
    """Leaves stdout to results: Gloo, of hosts that compute on processors, greets each peer there.

    It has no setting for it. What C and C++ write to stdout is dropped, what Python writes is not.
    """
    if not flags.on_processor():
        return  # NCCL_DEBUG writes to stdout too, and somebody has asked for it
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    live = sys.stdout.isatty()
    sys.stdout = open(kept, "w", buffering=1 if live else -1, encoding=sys.stdout.encoding)  # noqa: SIM115  # for as long as this process


def _current(heartbeat: float = HEARTBEAT, stuck: float = STUCK) -> Pod | None:
    """This process among the others; None where it is alone."""
    global _pod
    state = _state()
    if _pod is None and state is not None and state.num_processes > 1:
        _pod = Pod(state.client, state.process_id, state.num_processes, heartbeat, stuck)
        stderr.quiet = state.process_id > 0  # what is said is the same everywhere
        pod, address = _pod, state.coordinator_address or ""
        _expect_abort(lambda: _lost(pod, address))
    return _pod


def _state() -> Any:
    """What jax.distributed keeps and does not hand out; None where it was not started."""
    state = getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
    return state if state is not None and state.client is not None else None


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    pod = _current()
    return pod is None or pod.index == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around all that a command does: a host that fails ends the others, and all end together."""
    try:
        yield
    except BaseException as error:
        if _pod is not None:
            if _of_runtime(error) or _of_runtime(error.__cause__):
                _pod.await_news()  # does not come back if a host was lost
            failure = error if isinstance(error, Failure) else None
            line = failure.line() if failure else f"{type(error).__name__}: {_first(error)}"
            _pod.fail(line, failure.exit_code if failure else _code(error))
        raise
    if _pod is not None:
        import jax

        _pod.close()
        jax.distributed.shutdown()


def end(code: int) -> int:
    """The exit code of a command; of one that failed among others, without waiting for them."""
    if code and _state() is not None:
        leave(code)
    return code


def stops(stop: Stop) -> bool:
    """Whether this run is to stop here; on several hosts all stop at the same place."""
    pod = _current()
    if pod is not None:
        return pod.stops(stop)
    stop.agreed = stop.asked
    return stop.agreed


def all_agree(mine: bool) -> bool:
    """Whether it is so on every host."""
    return all(text == "1" for text in exchange(str(int(mine))))


def exchange(text: str) -> list[str]:
    """What every host gives here, in their order. Every host must come by here."""
    pod = _current()
    return [text] if pod is None else pod.exchange(text)


def check_same(values: Mapping[str, Any]) -> None:
    """Refuses to go on with hosts that do not run the same; before the first collective.

    Args:
      values: nested JSON values that decide what a host does; those of the machine are added.

    Raises:
      ConfigError: on every host; names each field that differs, with the hosts and values.
    """
    pod = _current()
    if pod is None:
        return
    mine = json.dumps(dotted({**values, "machine": _machine()}), sort_keys=True)
    seals = pod.exchange(hashlib.sha256(mine.encode()).hexdigest())
    odd = [index for index, seal in enumerate(seals) if seal != seals[0]]
    if not odd:
        return
    # Rarely, so that many hosts do not all read what all of them have.
    told = [json.loads(text) for text in pod.exchange(mine if pod.index in (0, odd[0]) else "{}")]
    first, other = told[0], told[odd[0]]
    differ = [
        f"{name} is {_show(first.get(name))} on host 0, {_show(other.get(name))} on host {odd[0]}"
        for name in _differing(first, other)
    ]
    more = f" (and {len(odd) - 1} more hosts)" if len(odd) > 1 else ""
    raise ConfigError(
        f"{pod.name(odd[0])}{more} does not run what {pod.name(0)} runs: {'; '.join(differ)}",
        fix="the same command, files and installation on every host",
    )


def _differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted names whose values are not the same; one that also stands deeper is named once."""
    names = sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k))
    return [name for name in names if not any(name.endswith(f".{short}") for short in names)]


def check_shared(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that is another one on another host, such as a pod's local disks.

    Raises:
      ConfigError: on every host; names one that does not see what process 0 writes.
    """
    pod = _current()
    if pod is None or "://" in os.fspath(folder):
        return
    token = Path(folder) / ".shared"
    word = pod.exchange(secrets.token_hex(8))[0]
    if pod.index == 0:
        token.write_text(word)
    pod.exchange("")
    seen = pod.exchange(str(int(_appears(token, word))))
    if pod.index == 0:
        token.unlink()
    pod.exchange("")  # nobody goes on while it is there
    blind = [index for index, text in enumerate(seen) if text != "1"]
    if blind:
        raise ConfigError(
            f"the workdir {folder} is not the same folder on {pod.name(blind[0])} as on "
            f"{pod.name(0)}",
            fix="--workdir=gs://BUCKET/RUN, or a folder that all hosts mount (NFS)",
        )


def gather(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{name: whole array on this host}, of arrays that may be cut over the devices of several."""
    import jax

    return {name: jax.device_get(_whole(leaf)) for name, leaf in leaves.items()}


def _whole(leaf: Any) -> Any:
    """An array of which this host has every part; cut ones by layers, which devices can hold."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    if leaf.ndim < 3:  # one matrix
        return multihost_utils.process_allgather(leaf, tiled=True)
    place = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())  # type: ignore[attr-defined]  # ours are all on a mesh
    layer = jax.jit(lambda array, at: array[at], out_shardings=place)
    whole = np.empty(leaf.shape, leaf.dtype)
    for at in range(len(whole)):
        whole[at] = jax.device_get(layer(leaf, at))
    return whole


def _machine() -> dict[str, Any]:
    """What of a machine must be the same on every host."""
    import jax

    versions = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    given = {name: _flags(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return {
        "code": code.hexdigest(),
        "versions": versions,
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "environment": given,
    }


def _flags(name: str) -> list[str]:
    return sorted(os.environ.get(name, "").split())


def _appears(file: Path, text: str) -> bool:
    """Whether a file holds the text, within the seconds that network disks keep old listings."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            os.listdir(file.parent)  # makes NFS look again
            if file.read_text() == text:
                return True
        time.sleep(0.5)
    return False


def _show(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:60]}..." if len(text) > 63 else text


def _first(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


def _code(error: BaseException) -> int:
    return 130 if isinstance(error, KeyboardInterrupt) else 70


def _of_runtime(error: BaseException | None) -> bool:
    """Whether a host that is gone may be behind an error: a collective of the runtime failed."""
    import jax

    full = "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and not full


def _expect_abort(reason: Callable[[], Failure | None]) -> None:
    """Makes one line and 75 of the abort with which jax ends a process that misses another one.

    It aborts in a thread of C++, which calls back no Python (jax 0.10 raises bad_cast there).
    """

    def on_abort(_: int) -> None:
        failure = reason() or Failure("the runtime aborted", fix="the lines above")
        os.write(2, f"{failure.line()}\n".encode())
        os._exit(failure.exit_code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    _kept.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _lost(pod: Pod, coordinator: str) -> Failure | None:
    """Why the runtime aborts, if it is for another host."""
    fix = "the same command on every host goes on from the last save"
    host, _, port = coordinator.rpartition(":")
    if pod.index == 0:
        return Interrupted("another host of this run is gone", fix=fix) if pod.silent() else None
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return Interrupted("the first host of this run is gone", fix=fix)
    return None


_kept: list[Any] = []  # what C calls must not be collected
