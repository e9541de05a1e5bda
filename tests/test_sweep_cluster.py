"""`jaxtune sweep --ray`: a real cluster of two nodes, and what several cannot share."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtune.config import Config, replaced
from jaxtune.errors import ConfigError
from jaxtune.sweep import cluster, halving
from tests.test_sweep_cli import PAGE

ROOT = Path(__file__).parents[1]
ASKED = replaced(Config(), {"sweep.space": (("optim.lr", ("log", 1e-3, 1e-2)),)})


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs Ray") as caught:
        cluster.search(ASKED, tmp_path, "auto")
    assert "jaxtune[ray]" in caught.value.fix


@pytest.mark.parametrize("text", ["", "studies.db", "sqlite:///studies.db"])
def test_sqlite_is_of_one_machine(text):
    config = replaced(ASKED, {"sweep.storage": text})
    cluster.check_storage(config, 1)
    with pytest.raises(ConfigError, match="SQLite, which is of one machine") as caught:
        cluster.check_storage(config, 2)
    assert "sweep.journal" in caught.value.fix


@pytest.mark.parametrize("text", ["sweep.journal", "postgresql://me@host/sweeps"])
def test_journals_and_databases_are_of_many(text):
    cluster.check_storage(replaced(ASKED, {"sweep.storage": text}), 2)


def test_a_config_is_made_for_any_folder_and_part_of_the_chips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n")
    changes = {
        "data.train": "rows.jsonl",
        "sweep.storage": "sweep.journal",
        "sweep.budget": "64 chip-hours",
    }
    found = cluster.portable(replaced(ASKED, changes), tmp_path / "run", 4)
    assert found.data.train == str(tmp_path / "rows.jsonl")
    assert found.sweep.storage == str(tmp_path / "sweep.journal")
    assert found.sweep.budget == "16 chip-hours"
    assert found.sweep.space == ASKED.sweep.space
    plain = cluster.portable(replaced(ASKED, {"sweep.budget": "8h"}), tmp_path, 4)
    assert (plain.sweep.budget, plain.sweep.storage) == ("8h", "")


@pytest.fixture(scope="module")
def two_nodes():
    """The address of a Ray cluster of two nodes on this machine, each with one device."""
    clusters = pytest.importorskip("ray.cluster_utils")
    options = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS")
        found = clusters.Cluster()
        for _ in range(2):
            found.add_node(**options)
    yield found.address
    found.shutdown()


def command(page: Path, workdir: Path, address: str) -> list[str]:
    script = "import sys; from jaxtune.cli import main; sys.exit(main())"
    flags = [f"--config={page}", f"--workdir={workdir}", f"--ray={address}", "--json"]
    return [sys.executable, "-c", script, "sweep", *flags]


def page_of(inputs: Path, folder: Path, *lines: str) -> Path:
    text = PAGE.format(base=str(inputs / "base"), rows=str(inputs / "rows.jsonl"))
    more = "".join(f"    {line}\n" for line in lines)
    file = folder / "page.py"
    file.write_text(text.replace("    return config\n", f"{more}    return config\n"))
    return file


def records(workdir: Path, file: Path) -> list:
    """What the journal holds of the trials."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    from jaxtune.sweep import attributes

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
    study = optuna.load_study(study_name=workdir.name, storage=storage)
    return [attributes.record(trial) for trial in study.get_trials(deepcopy=False)]


def records_so_far(workdir: Path, journal: Path) -> list:
    try:
        return records(workdir, journal)
    except (KeyError, OSError, ValueError):  # it is about to be made
        return []


@pytest.mark.slow
def test_two_nodes_share_a_sweep_and_a_killed_worker_is_replaced(inputs, tmp_path, two_nodes):
    journal, workdir = tmp_path / "sweep.journal", tmp_path / "run"
    page = page_of(
        inputs, tmp_path, "config.sweep.trials = 8", "config.sweep.population = 2",
        "config.train.steps = 60", f"config.sweep.storage = {str(journal)!r}",
    )  # fmt: skip
    head = subprocess.Popen(
        command(page, workdir, two_nodes), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=(tmp_path / "stderr").open("w"),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 280
        while True:
            assert head.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline, (tmp_path / "stderr").read_text()
            found = records_so_far(workdir, journal)
            owners = {record.owner for record in found if record.status == "running"}
            if len(owners) == 2 and any(record.results for record in found):
                os.kill(int(min(owners).split(":")[1]), signal.SIGKILL)
                break
            time.sleep(0.2)
        out, _ = head.communicate(timeout=280)
    finally:
        head.kill()
    said = (tmp_path / "stderr").read_text()
    assert head.returncode == 0, said
    assert "is gone" in said
    assert said.count("a worker starts on node") == 3
    result = json.loads(out.splitlines()[-1])
    assert Path(result["best"]).is_dir()
    assert (workdir / "sweep.html").is_file()
    found = records(workdir, journal)
    searched = [record for record in found if record.role != "repeat"]
    assert len(searched) == 8
    assert {record.status for record in found} <= {"finished", "stopped", "diverged"}
    for record in found:  # no rung twice, none left out
        first = record.role == "repeat"  # which is trained whole at once
        assert [r.rung for r in record.results] == [0, 1][first : first + len(record.results)]
    ended = [record for record in searched if len(record.results) == 2]
    assert len(ended) == halving.quotas(8, 2, 4, 1)[-1]


@pytest.mark.slow
def test_several_nodes_and_sqlite_are_an_error_of_one_line(inputs, tmp_path, two_nodes):
    page = page_of(inputs, tmp_path)
    done = subprocess.run(
        command(page, tmp_path / "run", two_nodes), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "the cluster has 2 nodes" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_cluster_at_an_address_is_an_error_of_one_line(inputs, tmp_path):
    page = page_of(inputs, tmp_path)
    done = subprocess.run(
        command(page, tmp_path / "run", "127.0.0.1:1"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stderr.splitlines()[-1]
