"""watch.sh through queues, preemptions, exit codes and outages."""

import os
import signal

import pytest

from tests.tpu_scripts.cloud import (
    BUSY,
    HELD,
    LOST,
    NO_QUOTA,
    PYTHON,
    ZONE,
    Cloud,
    fail_create,
    queue_call,
    until,
)

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
    assert "nobody makes a preempted slice anew" in err
    assert "costs money" in err
    second = cloud.start("watch", *line)
    assert second.stdout
    assert second.stdout.readline()
    (cloud.home() / "go").write_text("0")
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert "ending\n" in out
    assert len(list(cloud.home().glob("jaxtune-runs/*/code"))) == 1
