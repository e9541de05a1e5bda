"""Several hosts, as real processes: they share rows, agree, stop together, miss each other."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jaxtune import pods
from jaxtune.errors import ConfigError
from jaxtune.train import fit
from tests.faults import host
from tests.test_train import numbers, settings, weights

PATIENCE = 280  # seconds for what takes twenty on an idle machine


def flags(inputs: Path, workdir: Path, **changes: str) -> list[str]:
    """The command line for `settings(inputs)`."""
    values = {
        "model.path": str(inputs / "base"), "model.dtype": "float32",
        "model.param_dtype": "float32", "model.remat": "none", "lora.r": "4",
        "lora.dropout": "0.1", "data.train": str(inputs / "rows.jsonl"), "data.max_length": "64",
        "data.eval_fraction": "0.2", "train.steps": "12", "train.batch_size": "8",
        "train.log_every": "4", "train.tensorboard": "false", "optim.lr": "0.01",
        "checkpoint.every": "3", "checkpoint.keep": "3", "eval.every": "6",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }  # fmt: skip
    config = [f"--config.{name}={value}" for name, value in values.items()]
    return ["train", "--config=configs/lora.py", f"--workdir={workdir}", *config]


def newest(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def wait_for_step(hosts, workdir: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while newest(workdir) < step:
        assert all(h.poll() is None for h in hosts), host.ends(hosts, 5)
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.02)


def assert_close(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    """Lines of metrics.jsonl, number by number."""
    assert [(row["step"], row["split"]) for row in ours] == [
        (row["step"], row["split"]) for row in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        for name, value in one.items():
            if isinstance(value, float) and name != "grad_norm":
                assert value == pytest.approx(other[name], rel=tolerance / 10, abs=tolerance), (
                    one["step"],
                    name,
                )


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The run in this one process, with eight devices."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    fit(settings(inputs), workdir)
    return workdir


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> list[dict]:
    """What two hosts found; see tests/faults/talk.py."""
    folder = tmp_path_factory.mktemp("talk")
    hosts = host.start(2, 2, [str(folder)], module="tests.faults.talk")
    ended = host.ends(hosts, PATIENCE)
    assert [code for code, _, _ in ended] == [0, 0], ended
    return [json.loads(out) for _, out, _ in ended]  # nothing else is on stdout, such as Gloo's


def test_hosts_exchange_words_and_agree_only_when_all_do(talk):
    assert [said["index"] for said in talk] == [0, 1]
    assert [said["first"] for said in talk] == [True, False]
    assert [said["exchanged"] for said in talk] == [["word 0", "word 1"]] * 2
    assert [said["agree"] for said in talk] == [[True, False]] * 2


def test_hosts_that_differ_are_all_told_in_what_and_which(talk):
    assert [said["same"] for said in talk] == ["", ""]
    for said in talk:
        for field, message in said["differ"].items():
            assert message.startswith("host 1 (")
            assert "does not run what host 0 (" in message
            assert f"{field} is " in message
            others = set(said["differ"]) - {field}
            assert not any(f"{other} is " in message for other in others)
        both = said["differ"]["config.optim.lr"]  # stands in the config and in the fingerprint
        assert both.count("optim.lr is ") == 1
        assert "config.optim.lr is 0.1 on host 0, 0.2 on host 1;" in both


def test_a_folder_that_is_not_shared_is_refused_on_every_host(talk):
    assert [said["shared"] for said in talk] == ["", ""]
    for said in talk:
        assert "is not the same folder on host 1" in said["not shared"]
        assert "gs://" in said["not shared"]
        assert said["left"] == []


def test_each_host_gives_the_rows_its_devices_hold(talk):
    assert all(right for said in talk for _, right in said["rows"].values())
    rows = [{name: mine for name, (mine, _) in said["rows"].items()} for said in talk]
    first, second, every = [0, 1, 2, 3], [4, 5, 6, 7], list(range(8))
    for name in ("fsdp", "half", "replicated"):
        assert [mine[name] for mine in rows] == [first, second]
    for name in ("tensor", "context"):  # they reach over both hosts
        assert [mine[name] for mine in rows] == [every, every]


def test_arrays_cut_over_hosts_are_gathered_whole(talk):
    assert [said["gathered"] for said in talk] == [[True, True]] * 2


def test_a_stop_on_one_host_stops_all_at_the_same_place(talk):
    assert [said["stopped"] for said in talk] == [[True, True, True]] * 2
    assert talk[0]["at"] == talk[1]["at"]


def test_two_hosts_train_stop_together_and_one_process_goes_on(inputs, whole, tmp_path):
    hosts = host.start(2, 2, flags(inputs, tmp_path / "run"))
    wait_for_step(hosts, tmp_path / "run", 3)
    hosts[1].send_signal(signal.SIGTERM)
    ended = host.ends(hosts, PATIENCE)
    assert [code for code, _, _ in ended] == [75, 75], ended
    steps = [err.splitlines()[-1].split("stopped and saved at step ")[1] for _, _, err in ended]
    assert steps[0] == steps[1]
    # From four devices of two processes to eight of one.
    fit(settings(inputs), tmp_path / "run")
    assert_close(numbers(tmp_path / "run"), numbers(whole), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_host_ends_the_other_and_both_go_on_bit_for_bit(inputs, tmp_path, lost):
    alone = host.ends(host.start(2, 2, flags(inputs, tmp_path / "alone")), PATIENCE)
    assert [code for code, _, _ in alone] == [0, 0], alone
    hosts = host.start(2, 2, flags(inputs, tmp_path / "run"), heartbeat=20)
    wait_for_step(hosts, tmp_path / "run", 3)
    hosts[lost].kill()
    ended = host.ends(hosts, 60)
    assert [code for code, _, _ in ended][1 - lost] == 75, ended
    last = ended[1 - lost][2].splitlines()[-1]
    assert "jaxtune: error[interrupted]" in last
    assert "the same command on every host" in last
    again = host.ends(host.start(2, 2, flags(inputs, tmp_path / "run")), PATIENCE)
    assert [code for code, _, _ in again] == [0, 0], again
    assert numbers(tmp_path / "run") == numbers(tmp_path / "alone")
    assert weights(tmp_path / "run", 12) == weights(tmp_path / "alone", 12)


@pytest.mark.slow
def test_a_checkpoint_moves_between_devices_and_processes(inputs, whole, tmp_path):
    """(processes, devices each), three steps each, on from what the one before has saved."""
    turns = [(1, 1), (2, 1), (1, 4), (2, 4), (1, 8), (4, 1), (1, 2), (2, 2)]
    limits = {"checkpoint__every": "1", "eval__every": "0", "train__steps": "24"}
    for turn, (count, devices) in enumerate(turns, start=1):
        hosts = host.start(count, devices, flags(inputs, tmp_path / "run", **limits))
        wait_for_step(hosts, tmp_path / "run", min(3 * turn, 24))
        hosts[-1].send_signal(signal.SIGTERM)
        ended = host.ends(hosts, PATIENCE)
        assert {code for code, _, _ in ended} <= {75, 0}, ended
    shape = {"checkpoint__every": 1, "eval__every": 0, "train__steps": 24}
    fit(settings(inputs, **shape), tmp_path / "run")
    fit(settings(inputs, **shape), tmp_path / "one")
    assert_close(numbers(tmp_path / "run"), numbers(tmp_path / "one"), 1e-5)


@pytest.mark.slow
def test_what_fails_on_one_host_ends_all_with_its_code(inputs, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1\n')
    bad = [[], [f"--config.data.train={tmp_path / 'bad.jsonl'}"]]
    ended = host.ends(host.start(2, 1, flags(inputs, tmp_path / "run"), each=bad), PATIENCE)
    assert [code for code, _, _ in ended] == [65, 65], ended
    assert all("bad.jsonl:1" in err.splitlines()[-1] for _, _, err in ended)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_hosts_of_other_settings_are_refused_before_the_first_step(inputs, tmp_path):
    other = shutil.copytree(inputs / "base", tmp_path / "base")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["special"] = not tokenizer["added_tokens"][0]["special"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = tmp_path / "rows.jsonl"
    rows.write_text((inputs / "rows.jsonl").read_text().replace("1 then", "one then"))
    changes = {
        "config.optim.lr": "--config.optim.lr=0.02",
        "config.checkpoint.every": "--config.checkpoint.every=4",
        "run.data": f"--config.data.train={rows}",
        "run.tokenizer": f"--config.model.path={other}",
    }
    for field, change in changes.items():
        hosts = host.start(2, 1, flags(inputs, tmp_path / "run"), each=[[], [change]])
        ended = host.ends(hosts, PATIENCE)
        assert [code for code, _, _ in ended] == [2, 2], (field, ended)
        assert all(f"{field} is " in err.splitlines()[-1] for _, _, err in ended)
    local = [[f"--workdir={tmp_path / 'a'}"], [f"--workdir={tmp_path / 'b'}"]]
    ended = host.ends(host.start(2, 1, flags(inputs, tmp_path), each=local), PATIENCE)
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert all("is not the same folder on host 1" in err for _, _, err in ended)


@pytest.mark.slow
def test_two_hosts_score_write_and_export_what_one_does(inputs, whole, tmp_path):
    def together(*arguments: str) -> list[tuple[int, str, str]]:
        ended = host.ends(host.start(2, 2, arguments), PATIENCE)
        assert [code for code, _, _ in ended] == [0, 0], ended
        assert "{" not in ended[1][1]  # one host has the result
        return ended

    from jaxtune.tuned import evaluate, export, generate

    run = f"--workdir={whole}"
    scores = json.loads(together("eval", run, "--json")[0][1].splitlines()[-1])
    ours = evaluate(whole)
    assert scores["tuned"]["loss"] == pytest.approx(ours["tuned"]["loss"], abs=1e-5)
    assert scores["base"]["loss"] == pytest.approx(ours["base"]["loss"], abs=1e-5)
    prompts = ["--prompt=1 then", "--max-new-tokens=8", "--json"]
    texts = json.loads(together("generate", run, *prompts)[0][1].splitlines()[-1])["texts"]
    assert texts == generate(whole, ["1 then"], max_new_tokens=8)
    for form in ("hf", "peft"):
        together("export", run, f"--format={form}", f"--out={tmp_path / form}")
        export(whole, tmp_path / f"{form}-one", format=form)
        for file in (tmp_path / form).iterdir():
            assert file.read_bytes() == (tmp_path / f"{form}-one" / file.name).read_bytes()


@pytest.mark.slow
def test_a_host_that_never_comes(inputs, tmp_path):
    for index in (0, 1):
        hosts = host.start(2, 1, flags(inputs, tmp_path / "run"), arrival=10, only=[index])
        ((code, _, err),) = host.ends(hosts, PATIENCE)
        assert code == 75, err
        assert "did not all come within 10 s" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_host_that_stands_still_is_named_and_ends_all():
    ended = host.ends(host.start(2, 1, [], module="tests.faults.stuck"), PATIENCE)
    assert [code for code, _, _ in ended] == [75, 75], ended
    for _, _, err in ended:
        assert "host 1 (" in err.splitlines()[-1]
        assert "stood still for 4 s" in err.splitlines()[-1]


# --- who is there -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            ("a:1", 4, 3),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
            None,
        ),
    ],
)
def test_the_place_of_a_process_is_read_from_the_environment(monkeypatch, environment, found):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert pods.cluster.from_environment() == found


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"},
        {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "4"},
        {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
    ],
)
def test_half_a_place_is_refused(monkeypatch, environment):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES"):
        pods.cluster.from_environment()


def test_one_machine_asks_nobody(monkeypatch):
    """No network, and none of the clusters that jax would look for."""
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked"))
    assert not pods.cluster.in_cluster()
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert not pods.cluster.in_cluster()
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert pods.cluster.in_cluster()


def test_hosts_of_a_pod_are_counted_from_its_metadata(monkeypatch):
    told = {"worker-network-endpoints": "unknown:1:10.0.0.1,unknown:2:10.0.0.2", "tpu-env": ""}
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(pods.cluster.flags, "tpu_chips", lambda: pods.cluster.flags.Chips(4, "v5p"))
    monkeypatch.setattr(pods.cluster, "_metadata", lambda key: told[key])
    assert pods.cluster.tpu_hosts() == 2
    told["tpu-env"] = "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '3'\n"
    assert pods.cluster.tpu_hosts() == 6
    told |= {"worker-network-endpoints": "", "tpu-env": ""}  # nobody answers: this machine alone
    assert pods.cluster.tpu_hosts() == 1
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    assert pods.cluster.tpu_hosts() == 4


def test_alone_every_question_has_its_own_answer(tmp_path):
    assert pods.is_first()
    assert (pods.all_agree(True), pods.all_agree(False)) == (True, False)
    assert pods.exchange("x") == ["x"]
    pods.check_same({"a": 1})
    pods.check_shared(tmp_path / "none")
    leaf = np.ones(3)
    assert pods.gather({"a": leaf})["a"] is not None
