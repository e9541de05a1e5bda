"""A small cloud in a folder, in the place of `gcloud` on the PATH.

$CLOUD holds `state.json` (the slices, and the faults to inject), `calls` (every command line: words
ended by NUL, lines by 0x1e) and `hosts/NODE.WORKER`, the home folders of the hosts, where the
commands of `ssh` really run in a bash.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

cloud = Path(os.environ["CLOUD"])
words = sys.argv[1:]
flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)


def fail(text: str, code: int = 1):
    print(text, file=sys.stderr)
    sys.exit(code)


def preempt(state: dict):
    """The slice is taken away, and its disks with it."""
    state["nodes"] = dict.fromkeys(state["nodes"], "PREEMPTED")
    state["queue"] = state["queue"] and "SUSPENDED"
    shutil.rmtree(cloud / "hosts")


def injected(state: dict) -> dict:
    """The fault for this call, if there is one; calls that match are counted."""
    for fault in state["faults"]:
        if re.search(fault["match"], " ".join(words), re.DOTALL):
            fault["seen"] = fault.get("seen", 0) + 1
            if fault["seen"] in fault["on"]:
                if fault.get("preempt"):
                    preempt(state)
                return fault
    return {}


def arrive(state: dict):
    """One look at the queue later."""
    if state["coming"]:
        state["queue"] = state["coming"].pop(0)
        if state["queue"] == "ACTIVE":
            state["nodes"] = dict.fromkeys(state["node_names"], "READY")


def answer(state: dict) -> str:
    """What create, describe, list and delete print; the state changes in place."""
    kind, verb, name = words[2:5]
    if verb == "create":
        names = [name]
        if "--node-count" in flags:
            names = [f"{name}-{i}" for i in range(int(flags["--node-count"]))]
        if name in state["nodes"] or state["queue"]:
            fail(f"ERROR: ALREADY_EXISTS: {name} already exists")
        state["node_names"] = names
        if kind == "tpu-vm":
            state["nodes"][name] = "READY"
        else:
            state["queue"] = "ACCEPTED"
            state["coming"] = list(state["queue_path"])
        return ""
    if verb == "describe":
        if kind == "queued-resources":
            arrive(state)
            return state["queue"] or fail(f"ERROR: NOT_FOUND: Resource '{name}' was not found")
        if name not in state["nodes"]:
            fail(f"ERROR: NOT_FOUND: Resource '{name}' was not found")
        addresses = ";".join(f"10.0.0.{i + 1}" for i in range(state["workers"]))
        return f"{state['nodes'][name]}\t{addresses}"
    if verb == "list":
        return "\n".join(state["nodes"])
    if verb == "delete":
        if kind == "queued-resources":
            state["queue"], state["nodes"] = None, {}
        else:
            state["nodes"].pop(name)
        return ""
    sys.exit(f"the stand-in does not know {words}")


def on_hosts(state: dict, fault: dict) -> int:
    """ssh and scp, to one worker or to all."""
    verb, name = words[3], words[5].split(":")[0] if words[3] == "scp" else words[4]
    if state["nodes"].get(name) != "READY":
        fail("ssh: connect to host 10.0.0.1 port 22: Connection timed out", 255)
    worker = flags["--worker"]
    workers = range(state["workers"]) if worker == "all" else [int(worker)]
    final = 0
    for i in workers:
        home = cloud / "hosts" / f"{name}.{i}"
        home.mkdir(parents=True, exist_ok=True)
        if i in fault.get("silent", []):
            print("ssh: connect to host: Connection refused", file=sys.stderr)
            final = 255
            continue
        if verb == "scp":
            shutil.copy(words[4], home / words[5].split(":", 1)[1])
            continue
        environment = {"HOME": str(home), "PATH": os.environ["HOST_PATH"], "WORKER": str(i)}
        host = subprocess.Popen(
            ["bash", "-c", flags["--command"]], cwd=home, env=environment, stdout=subprocess.PIPE
        )
        assert host.stdout
        left = fault.get("cut", 1 << 60)
        while left > 0 and (block := os.read(host.stdout.fileno(), min(left, 65536))):
            left -= len(block)
            sys.stdout.buffer.write(block)
            sys.stdout.flush()
        if not left:
            host.kill()
            fail("client_loop: send disconnect: Broken pipe", 255)
        if host.wait():
            print(f"##### Command on worker {i}: exit status {host.returncode}.", file=sys.stderr)
        final = final or host.returncode
    return final


with open(cloud / "calls", "ab") as calls:
    calls.write(b"".join(word.encode() + b"\0" for word in words) + b"\x1e")
with open(cloud / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    state = json.loads((cloud / "state.json").read_text())
    fault = injected(state)
    out = ""
    if not fault and words[0] == "compute" and words[3] not in ("ssh", "scp"):
        out = answer(state)
    (cloud / "state.json").write_text(json.dumps(state))
if fault.get("hang"):
    (cloud / "hanging").touch()
    signal.pause()
if "code" in fault:
    fail(fault["error"], fault["code"])
if words[:1] == ["compute"] and words[3] in ("ssh", "scp"):
    sys.exit(on_hosts(state, fault))
if out:
    print(out)
