"""Memory that a process frees and wants again, seen by the kernel's count of page faults; gc."""

import gc
import os
import subprocess
import sys

import pytest

from jaxtune import heap

# Prints whether the setting took, and the page faults of a 64 MiB array that follows a freed one,
# both made in a thread that is not the first.
_PROGRAM = """
import resource, threading
from jaxtune import heap
kept = {call}
import numpy as np
found = []
def work():
    np.ones(1 << 23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 23)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(kept, found[0])
"""


def run(call: str) -> tuple[str, int]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0"}
    command = [sys.executable, "-c", _PROGRAM.format(call=call)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    kept, faults = output.split()
    return kept.decode(), int(faults)


def test_freed_memory_is_used_again():
    kept, faults = run("heap.keep_freed()")
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert faults < 100
    assert run("None")[1] > 1000


def test_the_collector_rests_and_then_passes_over_what_there_was():
    before = gc.get_freeze_count()
    heap.pause_collector()
    try:
        assert not gc.isenabled()
    finally:
        heap.resume_collector()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
