"""The fixture of these tests."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import Cloud


@pytest.fixture
def cloud(tmp_path: Path):
    cloud = Cloud(tmp_path)
    yield cloud
    # What a failed test left on the "hosts" would run for ever.
    for pid in tmp_path.glob("cloud/hosts/*/jaxtune-runs/*/pid"):
        if not (pid.parent / "code").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
