"""Signals while a compiler works: a C call that lets no handler of Python's run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.plan import interrupt

# libtpu installs its own handlers when it is loaded; the sum takes minutes in C, without a lock.
PROGRAM = """
import hashlib, pathlib, sys
from jaxtune.plan import interrupt, topologies
with interrupt.answered(pathlib.Path(sys.argv[1]).unlink):
    topologies.devices(topologies.find("v5litepod-4"))
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "jaxtune: error[cancelled]: interrupted; try: the same command"),
        (signal.SIGTERM, 75, "jaxtune: error[interrupted]: told to end by SIGTERM; try: the same"),
    ],
)
def test_a_signal_ends_a_compile_at_once_in_one_line(tmp_path: Path, number, code, line):
    pytest.importorskip("libtpu")
    scratch = tmp_path / "scratch"
    scratch.touch()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(scratch)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=100)  # of the minutes that the sum would take
    assert process.returncode == code
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert not scratch.exists()


def test_afterwards_signals_are_handled_as_before():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with interrupt.answered(lambda: pytest.fail("nothing was to be left")):
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1
