"""run.sh, logs.sh and fetch.sh: the commands really run, in a bash for each host."""

import os
import shutil
import signal
import sys

import pytest

from tests.tpu_scripts.cloud import (
    HELD,
    ZONE,
    Cloud,
    until,
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
    assert "interrupted: the run goes on" in err
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


def test_fetch_says_what_is_not_there(cloud: Cloud):
    """The slice, its host, what is installed there, or the folder: one line each, all different."""
    words = ["mine", ZONE, "--from=runs", "--to=out"]
    said = []

    def fetch(code: int, *more: str):
        result = cloud.run("fetch", *words, *more)
        assert result.returncode == code, result.stderr
        assert not list(cloud.folder.glob("out*"))
        said.append(result.stderr.splitlines()[-1].partition("; try: "))

    cloud.write_state(nodes={"mine-0": "READY", "other": "READY"})
    fetch(2)
    cloud.write_state(nodes={"mine": "PREEMPTED"})
    fetch(69)
    cloud.write_state(nodes={"mine": "CREATING"})
    fetch(69)
    cloud.ready()
    fetch(2, "--worker=1")
    fetch(1)
    shutil.rmtree(cloud.home() / "jaxtune-code")
    fetch(1)
    assert [what.removeprefix("fetch: error: ") for what, _, _ in said] == [
        "there is no mine in us-west4-a (there is mine-0, other)",
        "mine is PREEMPTED, not READY: its hosts are gone, and their disks with them",
        "mine is CREATING, not READY",
        "mine has no host 1",
        "there is no runs on host 0 of mine",
        "nothing is installed on host 0 of mine",
    ]
    assert "--node-count" in said[0][2]
    assert "gs://" in said[1][2]


@pytest.mark.parametrize(
    ("error", "what"),
    [
        ("Did not find existing container at: gs://bucket/a", "there is nothing at gs://bucket/a"),
        (
            "HTTPError 404: The specified bucket does not exist.",
            "there is nothing at gs://bucket/a",
        ),
        ("HTTPError 403: Forbidden", "not all of gs://bucket/a is in out"),
    ],
)
def test_fetch_tells_an_empty_place_from_a_failure(cloud: Cloud, error: str, what: str):
    fault = {"match": "rsync", "on": [1], "error": f"ERROR: (gcloud) {error}", "code": 1}
    cloud.write_state(faults=[fault])
    result = cloud.run("fetch", "--from=gs://bucket/a", "--to=out")
    assert result.returncode == 1
    assert f"fetch: error: {what}; try: " in result.stderr
    assert (cloud.folder / "out").exists() == ("nothing" not in what)


def test_fetch_from_a_bucket_needs_no_slice(cloud: Cloud):
    result = cloud.run("fetch", "--from=gs://bucket/my run", "--to=out")
    assert result.returncode == 0, result.stderr
    expected = ["storage", "rsync", "--recursive", "gs://bucket/my run", "out", "--quiet"]
    assert cloud.calls() == [expected]
