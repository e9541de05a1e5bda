"""Whether this process is one of several, as the environment and a TPU pod's metadata say."""

import importlib.util
import os
import urllib.request

from jaxtune import flags
from jaxtune.errors import ConfigError

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def from_environment() -> tuple[str, int, int] | None:
    """(address, processes, number of this one) of JAX_*; jax itself reads the address only."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = [os.environ.get(name, "") for name in names]
    if not any(values[1:]):
        return None
    try:
        address, count, index = values[0], int(values[1]), int(values[2])
        if count == 1:
            return None
        if ":" not in address or not 0 <= index < count:
            raise ValueError
    except ValueError:
        said = ", ".join(f"{n}={v or 'nothing'}" for n, v in zip(names, values, strict=True))
        raise ConfigError(
            f"{said} name no place among several processes",
            fix="JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=4 JAX_PROCESS_ID=0",
        ) from None
    return address, count, index


def in_cluster() -> bool:
    """Whether jax's own detection will find several processes; asks the network on TPU VMs only."""

    def several(name: str) -> bool:
        return os.environ.get(name, "").isdigit() and int(os.environ[name]) > 1

    if "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" in os.environ:
        return several("SLURM_NTASKS")
    if "OMPI_MCA_orte_hnp_uri" in os.environ:
        return several("OMPI_COMM_WORLD_SIZE")
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return importlib.util.find_spec("kubernetes") is not None
    return tpu_hosts() > 1


def tpu_hosts() -> int:
    """Hosts of this TPU pod, all slices together; 0 where no TPU is attached."""
    platform = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    if platform not in ("", "tpu") or not flags.tpu_chips().count:
        return 0
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "")
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in os.environ:
        hosts = _metadata("worker-network-endpoints")
        about = _metadata("tpu-env") if not slices else ""
        lines = [line.partition(":") for line in about.splitlines()]
        found = [value.strip(" '") for key, _, value in lines if key == "MEGASCALE_NUM_SLICES"]
        slices = found[0] if found else slices
    return len((hosts or "one").split(",")) * (int(slices) if slices.isdigit() else 1)


def _metadata(key: str) -> str:
    """What the cloud knows of this machine; empty where nobody answers at once."""
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except (OSError, ValueError):
        return ""
