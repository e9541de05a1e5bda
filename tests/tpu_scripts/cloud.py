"""A laptop, and a cloud that is a folder: what the tests of tpu_scripts/ share."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tpu_scripts"
VERBS = ["create", "setup", "run", "watch", "fetch", "logs", "delete"]
ZONE = "--zone=us-west4-a"
TPUS = ["compute", "tpus"]
PACKED = ["pyproject.toml", "constraints.txt", "README.md", "LICENSE"]
LOST = "ssh: connect to host 10.0.0.1 port 22: Connection refused"
BUSY = "ERROR: (gcloud) HttpError 503: The service is currently unavailable."
NO_QUOTA = "HttpError 429: Quota limit 'TPUV5sLitepodPerProject' has been exceeded. Limit: 0"


FULL = {
    "create": ["--accelerator-type=v5litepod-8"],
    "setup": [],
    "run": ["--", "true"],
    "watch": ["--accelerator-type=v5litepod-8", "--", "true"],
    "fetch": ["--from=runs/a", "--to=here"],
    "logs": [],
    "delete": ["--yes"],
}

# The python3 of a host: makes environments, and writes down what pip is asked for.
PYTHON = """
[ "$1" != -c ] || exit "${OLD_PYTHON:-$(cat "$HOME/old" 2>/dev/null || echo 0)}"
if [ "$2" = venv ]; then
  mkdir -p "$3/bin"
  cp "$0" "$3/bin/python"
  printf '#!/bin/bash\\necho jaxtune 0.1\\n' >"$3/bin/jaxtune"
  chmod +x "$3/bin/jaxtune"
  exit
fi
echo "$PWD: $*" >>"$HOME/pip"
[ ! -e "$HOME/broken" ]
"""

# A command that goes on until its host's file `go` holds the exit code it is to end with.
HELD = (
    "echo begun on $WORKER; until [ -s ~/go ]; do sleep 0.05; done; echo ending; exit $(cat ~/go)"
)


class Cloud:
    """A laptop with the stand-in on its PATH, and the cloud behind it."""

    def __init__(self, folder: Path):
        self.folder = folder
        for part in ("cloud", "laptop", "bin", "host_bin"):
            (folder / part).mkdir()
        # A checkout of its own, small and still.
        self.root = folder / "checkout"
        shutil.copytree(SCRIPTS, self.root / "tpu_scripts")
        for name in (
            "jaxtune/cli.py",
            "jaxtune/__pycache__/cli.pyc",
            "configs/lora.py",
            "docs/a b.md",
            *PACKED,
        ):
            (self.root / name).parent.mkdir(exist_ok=True)
            (self.root / name).write_text(f"# {name}\n")
        self.program(
            "bin/gcloud", f'exec {sys.executable} -S "{ROOT}/tests/tpu_scripts/gcloud.py" "$@"'
        )
        # Pauses are written down, and short.
        self.program("bin/sleep", f'echo "$1" >>"{folder}/pauses"; exec /bin/sleep 0.05')
        self.write_state()

    def program(self, name: str, text: str):
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def write_state(self, **changes):
        state = {
            "nodes": {},
            "queue": None,
            "coming": [],
            "queue_path": ["WAITING_FOR_RESOURCES", "ACTIVE"],
            "node_names": [],
            "workers": 1,
            "faults": [],
        }
        (self.folder / "cloud" / "state.json").write_text(json.dumps(state | changes))

    def ready(self, *, workers: int = 1, nodes: tuple[str, ...] = ("mine",), **changes):
        """A slice that is up and has the scripts of a host."""
        self.write_state(nodes=dict.fromkeys(nodes, "READY"), workers=workers, **changes)
        for node in nodes:
            for worker in range(workers):
                code = self.home(worker, node) / "jaxtune-code" / "tpu_scripts"
                code.mkdir(parents=True)
                shutil.copy(SCRIPTS / "host_run.sh", code)

    def state(self) -> dict:
        return json.loads((self.folder / "cloud" / "state.json").read_text())

    def home(self, worker: int = 0, node: str = "mine") -> Path:
        return self.folder / "cloud" / "hosts" / f"{node}.{worker}"

    def environment(self, **more: str) -> dict[str, str]:
        system = os.environ["PATH"]
        return {
            "PATH": f"{self.folder}/bin:{system}",
            "HOST_PATH": f"{self.folder}/host_bin:{system}",
            "CLOUD": str(self.folder / "cloud"),
            "HOME": str(self.folder / "laptop"),
            "TMPDIR": str(self.folder),
            **more,
        }

    def start(self, verb: str, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.root / "tpu_scripts" / f"{verb}.sh", *words],
            env=self.environment(**more),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, verb: str, *words: str, answer: str = "", **more: str):
        return subprocess.run(
            ["bash", self.root / "tpu_scripts" / f"{verb}.sh", *words],
            env=self.environment(**more),
            cwd=self.folder,
            input=answer,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self) -> list[list[str]]:
        path = self.folder / "cloud" / "calls"
        if not path.exists():
            return []
        lines = path.read_bytes().decode().split("\x1e")[:-1]
        return [line.split("\0")[:-1] for line in lines]

    def verbs(self) -> list[str]:
        """The calls in short: tpu-vm create, queued-resources describe, and so on."""
        return [" ".join(call[2:4]) for call in self.calls()]

    def pauses(self) -> list[str]:
        path = self.folder / "pauses"
        return path.read_text().split() if path.exists() else []


def until(true, what: str):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def create_call(*words: str) -> list[list[str]]:
    return [[*TPUS, "tpu-vm", "create", "mine", ZONE, "--quiet", *words]]


def queue_call(*words: str) -> list[list[str]]:
    return [[*TPUS, "queued-resources", "create", "mine", ZONE, "--quiet", *words]]


def fail_create(*on: int, error: str, code: int = 1) -> list[dict]:
    return [{"match": " create ", "on": list(on), "error": error, "code": code}]
