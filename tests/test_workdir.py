"""One workdir, one run: the lock against real processes, the fingerprint field by field."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxtune.errors import ConfigError, StorageError
from jaxtune.workdir import check_fingerprint, lock

HOLD = """
import sys, time
from jaxtune.workdir import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_run(workdir: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path: Path):
    workdir = tmp_path / "run"
    with another_run(workdir) as first:
        with pytest.raises(ConfigError) as caught, lock(workdir):
            pass
        assert caught.value.exit_code == 2
        assert caught.value.what == (
            f"workdir {workdir} is in use by pid {first.pid} on {socket.gethostname()}"
        )


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path):
    with another_run(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        with lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == (
                f"pid {os.getpid()} on {socket.gethostname()}\n"
            )


def test_the_lock_ends_with_its_block(tmp_path: Path):
    for _ in range(2):
        with lock(tmp_path):
            with pytest.raises(ConfigError, match=f"pid {os.getpid()} "), lock(tmp_path):
                pass
            with lock(tmp_path / "another"):
                pass


def test_an_unwritable_workdir_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", Path("/proc/run")):
        with pytest.raises(StorageError, match="cannot be written"), lock(workdir):
            pass


SAVED = {
    "config": {"optim": {"lr": 2e-4, "rules": [["norm", "freeze"]]}, "task": "sft"},
    "data": "9a1b",
    "version": "0.1.0",
}


def test_the_same_run_passes_tuples_or_not():
    now = SAVED | {"config": {"optim": {"lr": 2e-4, "rules": (("norm", "freeze"),)}, "task": "sft"}}
    check_fingerprint(SAVED, now)
    check_fingerprint(SAVED, dict(reversed(now.items())))


@pytest.mark.parametrize(
    ("now", "what"),
    [
        (SAVED | {"data": "77ff"}, 'data was "9a1b", is now "77ff"'),
        (
            SAVED | {"config": {"optim": {"lr": 1e-3, "rules": []}, "task": "sft"}},
            "config.optim.lr was 0.0002, is now 0.001; "
            'config.optim.rules was [["norm", "freeze"]], is now []',
        ),
        (SAVED | {"tokenizer": "00"}, 'tokenizer was absent, is now "00"'),
        ({"data": "9a1b", "config": SAVED["config"]}, 'version was "0.1.0", is now absent'),
        (SAVED | {"version": None}, 'version was "0.1.0", is now null'),
    ],
)
def test_every_differing_field_is_named_with_both_values(now: dict[str, object], what: str):
    with pytest.raises(ConfigError) as caught:
        check_fingerprint(SAVED, now)
    assert caught.value.exit_code == 2
    assert caught.value.what == f"the checkpoints here are of another run: {what}"
    assert caught.value.fix.startswith("the old values again, or another --workdir")


def test_digests_are_shown_short():
    with pytest.raises(ConfigError) as caught:
        check_fingerprint({"data": "ab" * 32}, {"data": "cd" * 32})
    assert 'data was "abababababa...", is now "cdcdcdcdcdc..."' in caught.value.what
