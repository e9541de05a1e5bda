"""setup.sh on hosts whose python3 only writes down what it is asked."""

import stat

import pytest

from tests.tpu_scripts.cloud import (
    HELD,
    LOST,
    PYTHON,
    ZONE,
    Cloud,
    until,
)


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
