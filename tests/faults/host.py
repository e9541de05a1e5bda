"""Hosts of one run, as processes on this machine: `python -m tests.faults.host OPTIONS ...`.

A host is the command line with a heartbeat that suits a test, told its place by JAX_PROCESS_ID.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start(
    count: int,
    devices: int,
    arguments: Sequence[str],
    *,
    each: Sequence[Sequence[str]] | None = None,
    heartbeat: float = 15,
    arrival: float = 100,
    module: str = "tests.faults.host",
    only: Sequence[int] | None = None,
) -> list[subprocess.Popen[str]]:
    """Processes with as many virtual CPU devices each.

    Args:
      arguments: of the command line of all; `each` has further ones for every host.
      only: the hosts that really start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = json.dumps({"heartbeat": heartbeat, "arrival": arrival, "stuck": 600})
    hosts = []
    for index in range(count):
        place: dict[str, Any] = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        if count > 1:
            place["JAX_COORDINATOR_ADDRESS"] = address
            place |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        if only is None or index in only:
            command = [sys.executable, "-m", module, options, *arguments]
            command += each[index] if each else ()
            hosts.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | place,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
    return hosts


def ends(hosts: Sequence[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none is left running."""
    try:
        said = [host.communicate(timeout=seconds) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    return [(host.returncode, *texts) for host, texts in zip(hosts, said, strict=True)]


if __name__ == "__main__":
    from jaxtune import cli, flags, pods
    from jaxtune.errors import Failure

    flags.apply()
    try:
        pods.start(**json.loads(sys.argv[1]))
    except Failure as error:
        print(error.line(), file=sys.stderr)
        sys.exit(pods.end(error.exit_code))
    sys.exit(cli.main(sys.argv[2:]))
