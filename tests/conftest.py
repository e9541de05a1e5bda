"""Shared fixtures: the CPU with eight virtual devices, and the real data beside the checkout."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Programs in flight on eight devices and two cores can wait for each other for ever.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
# Tests compile the same programs again and again: 5 minutes with what was kept, 12 without.
caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches / "jaxtune" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and data, which is not part of the project."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("../shared/data is not here: it holds others' data and is not in the project")
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, `base`, and something to teach it, `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_complete(folder / "base")
    tiny.write_rows(folder / "rows.jsonl")
    return folder
