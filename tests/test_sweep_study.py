"""The study: workers race on it and are killed, nothing counts twice, Optuna can read it."""

import json
import math
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import event

from jaxtune import config as settings
from jaxtune.config import Config
from jaxtune.errors import ConfigError, StorageError
from jaxtune.sweep import halving, prior, storage, study
from jaxtune.sweep.records import SEARCH, Result

AXES = {"optim.lr": ("log", 1e-5, 1e-2), "lora.r": ("choice", 4, 8, 16)}
RUNGS = (10, 40, 160)
KINDS = ["", "shared.journal"]


def opened(folder: Path, kind: str = "", axes=AXES, enter=(16, 4, 1), first=None, **changes):
    """A worker's view of the study of a folder; keywords with __ for . are settings."""
    options = {k: changes.pop(k) for k in ("patience", "lease", "identity") if k in changes}
    values = {"sweep.storage": str(folder / kind) if kind else "", "sweep.space": axes}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    config = settings.freeze(settings.replaced(Config(), values).to_dict())
    if first is None:
        first = prior.first_trials(config, axes, 2048, "llama")
    identity = options.pop("identity", {"model": "m1", "data": "d1"})
    return study.open_study(config, folder, identity, RUNGS, enter, first, space=axes, **options)


def score(params, rung: int) -> float:
    return abs(math.log10(params["optim.lr"] / 5e-4)) + 1 / params["lora.r"] + 0.1 / (rung + 1)


def result(job, position=None, loss=None) -> Result:
    position = RUNGS[job.rung] if position is None else position
    loss = score(job.params, job.rung) if loss is None else loss
    return Result(job.rung, position, loss, 0.5, position - job.start, 1.0)


def work(found: study.Study, log=None, roles=SEARCH, slots=1) -> None:
    """Trains until nothing is left, a slot after another."""
    held = []
    while True:
        while len(held) < slots and (job := found.claim(roles)) is not None:
            held.append(job)
        if not held:
            if found.done(roles):
                return
            time.sleep(0.02)
            continue
        job = held.pop(0)
        if log is not None:
            with open(log, "a") as file:
                file.write(json.dumps([os.getpid(), job.number, job.rung, job.start]) + "\n")
        curve = [(p, 3.0 - p / 1000) for p in range(5, RUNGS[job.rung] + 1, 5)]
        assert found.record(job.number, result(job), curve, finished=job.rung == 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_from_first_to_last(tmp_path, kind):
    found = opened(tmp_path, kind)
    work(found, slots=4)
    records = found.records()
    assert len(records) == 16
    assert [r.role for r in records[:4]] == ["baseline", "prior", "prior", "search"]
    assert records[0].params == {"optim.lr": 2e-4, "lora.r": 16}
    assert records[0].why == "defaults; place 6 of 16 at rung 1"
    assert sum(r.results[-1].position for r in records) == 2.5 * 160
    assert sum(r.tokens for r in records) == 2.5 * 160
    assert [sum(r.rung >= rung for r in records) for rung in range(3)] == [16, 4, 1]
    assert sorted(r.status for r in records) == ["finished"] + ["stopped"] * 15
    best = halving.best(records)
    assert best is not None
    assert best.loss == min(score(r.params, 2) for r in records)
    assert best.curve[-1] == (160, 2.84)
    assert all(r.params["optim.lr"] == float(f"{r.params['optim.lr']:.4g}") for r in records)
    assert opened(tmp_path, kind).records() == records


@pytest.mark.parametrize("kind", KINDS)
def test_optuna_reads_it(tmp_path, kind):
    work(opened(tmp_path, kind))
    where = (
        optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / kind)))
        if kind
        else f"sqlite:///{tmp_path}/sweep.db"
    )
    loaded = optuna.load_study(study_name=tmp_path.name, storage=where)
    states = [t.state.name for t in loaded.trials]
    assert sorted(states) == ["COMPLETE"] + ["PRUNED"] * 15
    (best,) = (t for t in loaded.trials if t.state.name == "COMPLETE")
    assert loaded.best_trial.number == best.number
    assert sorted(best.intermediate_values) == [10, 40, 160]
    assert best.value == best.intermediate_values[160] == score(best.params, 2)
    pruned = next(t for t in loaded.trials if t.state.name == "PRUNED")
    assert pruned.value == pruned.intermediate_values[10] == score(pruned.params, 0)
    assert set(best.params) == set(AXES)


def test_the_same_search_again_is_the_same(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        work(opened(tmp_path / name), slots=3)
    one, two = (opened(tmp_path / name).records() for name in "ab")
    assert one == two
    other = tmp_path / "c"
    other.mkdir()
    work(opened(other, sweep__seed=1), slots=3)
    assert opened(other, sweep__seed=1).records() != one


def test_the_sampler_learns_from_paused_trials(tmp_path):
    """Nothing is over when the 40th trial is asked for; by their first rungs TPE has learnt."""
    guided = opened(tmp_path / "tpe", enter=(40, 1, 1), first=())
    blind = opened(tmp_path / "random", enter=(40, 1, 1), first=(), sweep__sampler="random")
    means = []
    for found in (guided, blind):
        for _ in range(40):
            job = found.claim(SEARCH)
            assert job is not None
            assert job.rung == 0
            found.record(job.number, result(job), (), finished=False)
        records = found.records()
        assert {r.status for r in records} == {"paused"}
        means.append(sum(r.loss or 0 for r in records[20:]) / 20)
    assert means[0] < 0.8 * means[1]


def test_a_result_counts_once_and_only_for_its_owner(tmp_path):
    one, two = opened(tmp_path), opened(tmp_path)
    job = one.claim(SEARCH)
    assert job is not None
    assert not two.record(job.number, result(job, loss=0.0), (), finished=False)
    assert not two.stop(job.number, "stopped", "")
    two.release(job.number)
    assert one.records()[job.number].status == "running"
    assert one.record(job.number, result(job, loss=1.0), (), finished=False)
    assert not one.record(job.number, result(job, loss=2.0), (), finished=False)
    (record,) = one.records()
    assert (record.loss, record.status, record.tokens) == (1.0, "paused", 10)


def test_ends_in_the_middle_of_a_rung(tmp_path):
    found = opened(tmp_path)
    jobs = [found.claim(SEARCH) for _ in range(4)]
    numbers = [job.number for job in jobs if job is not None]
    assert found.stop(numbers[0], "diverged", "loss is nan", [(5, math.nan)], 7, 2.0)
    assert found.stop(numbers[1], "stopped", "dominated", [(5, 2.5)], 7, 2.0)
    assert found.record(numbers[2], result(jobs[2], loss=math.nan), (), finished=True)
    found.release(numbers[3], [(5, 1.5)])
    records = found.records()
    assert [r.status for r in records] == ["diverged", "stopped", "diverged", "waiting"]
    assert [r.why for r in records[:3]] == [
        "defaults; loss is nan",
        "prior, lr by width 0.000491; dominated",
        "prior, lr usual 0.0003; held-out loss is nan",
    ]
    assert (records[0].tokens, records[0].seconds) == (7, 2.0)
    assert records[3].curve == ((5, 1.5),)
    assert found.claim(SEARCH) == jobs[3]  # begun comes before new
    loaded = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/sweep.db")
    assert loaded.trials[0].intermediate_values == {5: math.inf}
    assert loaded.trials[1].intermediate_values == {5: 2.5}


def test_repeats_and_finals_are_added_once(tmp_path):
    found = opened(tmp_path, enter=(2, 1, 1))
    work(found)
    assert found.done(SEARCH)
    for _ in range(2):
        found.add("final", {"optim.lr": 1e-3, "lora.r": 8}, of=1)
        for seed in (1, 2):
            found.add("repeat", {"optim.lr": 0.5}, repeats="winner", seed=seed)
    assert found.claim(SEARCH) is None
    assert not found.done(["final"])
    job = found.claim(["final"])
    assert job is not None
    assert (job.of, job.rung, job.start, job.role) == (1, 2, 0, "final")
    assert found.record(job.number, result(job, loss=1.0), (), finished=True)
    jobs = [found.claim(["repeat"]) for _ in range(3)]
    assert [(j and (j.repeats, j.seed, j.params)) for j in jobs] == [
        ("winner", 1, {"optim.lr": 0.5, "train.seed": 1}),
        ("winner", 2, {"optim.lr": 0.5, "train.seed": 2}),
        None,
    ]
    assert found.done(["final"])
    assert not found.done(["repeat"])
    assert [r.status for r in found.records()][2:] == ["finished", "running", "running"]


def test_quotas_can_change_for_all_workers(tmp_path):
    one, two = opened(tmp_path), opened(tmp_path)
    one.allow((2, 1, 1))
    assert [two.claim(SEARCH) is None for _ in range(3)] == [False, False, True]
    assert two.enter == (2, 1, 1)
    two.note("a line")
    one.note("a line")
    one.note("another")
    assert two.notes() == ("a line", "another")


def test_a_small_space_has_no_trial_twice(tmp_path):
    axes = {"lora.r": ("choice", 4, 8), "optim.schedule": ("choice", "cosine", "linear")}
    found = opened(tmp_path, axes=axes, first=())
    while (job := found.claim(SEARCH)) is not None and job.rung == 0:
        found.record(job.number, result(job, loss=1.0), (), finished=False)
    params = [r.params for r in found.records()]
    assert len(params) == 4
    assert all(p not in params[:i] for i, p in enumerate(params))


def test_a_grid(tmp_path):
    axes = {"lora.r": ("choice", 8, 16), "optim.lr": ("choice", 1e-4, 2e-4, 3e-4)}
    first = [prior.First({"lora.r": 8, "optim.lr": 1e-4}, "prior", "")]
    found = opened(tmp_path, axes=axes, first=first, sweep__sampler="grid")
    while (job := found.claim(SEARCH)) is not None and job.rung == 0:
        found.record(job.number, result(job), (), finished=False)
    params = [(r.params["lora.r"], r.params["optim.lr"]) for r in found.records()]
    assert sorted(params) == [(r, lr) for r in (8, 16) for lr in (1e-4, 2e-4, 3e-4)]
    assert params != sorted(params)
    (own,) = (r for r in found.records() if r.role == "baseline")
    assert own.params == {"lora.r": 16, "optim.lr": 2e-4}
    with pytest.raises(ConfigError, match=r"6 trials, sweep\.trials is 5"):
        opened(tmp_path, axes=axes, sweep__sampler="grid", sweep__trials=5)
    with pytest.raises(ConfigError, match=r"grid cannot go through optim\.lr"):
        opened(tmp_path, sweep__sampler="grid")


def test_values_that_are_lists_come_back_as_they_were(tmp_path):
    axes = {"lora.target_modules": ("choice", "all-linear", ("q_proj", "v_proj"))}
    found = opened(tmp_path, axes=axes, first=())
    jobs = [found.claim(SEARCH), found.claim(SEARCH), found.claim(SEARCH)]
    assert {j.params["lora.target_modules"] for j in jobs if j} == set(
        axes["lora.target_modules"][1:]
    )
    assert {r.params["lora.target_modules"] for r in found.records()} == {
        "all-linear",
        ("q_proj", "v_proj"),
    }


def test_a_sampler_of_ones_own(tmp_path):
    found = opened(tmp_path, first=(), sweep__sampler="optuna.samplers.QMCSampler")
    work(found)
    assert len(found.records()) == 16
    for name, text in [
        ("no.such.Sampler", "ModuleNotFoundError"),
        ("optuna.samplers.NoSuch", "NoSuch"),
        ("optuna.pruners.NopPruner", "no sampler of Optuna"),
        ("tpee", "tpee"),
    ]:
        with pytest.raises(ConfigError, match=text):
            opened(tmp_path / "other", sweep__sampler=name)


# Another study, and storages that fail


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"identity": {"model": "m2", "data": "d1"}}, "model was m1, is now m2"),
        ({"identity": {"model": "m1", "data": "d" * 64}}, "data was d1, is now dddddddddddd..."),
        ({"axes": {"optim.lr": ("log", 1e-5, 1e-2)}}, "space.lora.r was ['choice', 4, 8, 16]"),
        ({"sweep__eta": 2}, "config.sweep.eta was 4, is now 2"),
        ({"optim__b1": 0.8}, "config.optim.b1 was 0.9, is now 0.8"),
    ],
)
def test_another_study_is_named_by_what_differs(tmp_path, changes, field):
    opened(tmp_path)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, **changes)
    assert field in caught.value.line()
    assert caught.value.line().count("\n") == 0
    # What may change does.
    opened(tmp_path, sweep__trials=99, sweep__budget="1h", mesh__fsdp=1, train__log_every=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_that_was_refused_before_its_first_trial_binds_nobody(tmp_path, kind):
    def gone(worker: study.Study) -> None:
        worker._session._values |= {"born": "1"}
        worker.renew()

    refused = opened(tmp_path, kind)
    with pytest.raises(ConfigError, match="eta"):  # while it is there
        opened(tmp_path, kind, sweep__eta=2)
    gone(refused)
    other = opened(tmp_path, kind, sweep__eta=2)
    assert other.started > refused.started
    assert other.workers() == 1
    assert other.claim(SEARCH) is not None
    gone(other)
    with pytest.raises(ConfigError, match="eta was 2, is now 4"):
        opened(tmp_path, kind)


def test_storages_that_cannot_be_had(tmp_path):
    with pytest.raises(StorageError, match=r"sweep\.storage"):
        study.reach("postgresql://me:secret@127.0.0.1:1/x", tmp_path)
    with pytest.raises(StorageError) as caught:
        study.reach("mysql+nodriver://me:secret@127.0.0.1/x", tmp_path)
    assert "secret" not in caught.value.line()
    with pytest.raises(ConfigError, match="no database URL"):
        study.reach("postgres//://x", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"sweep\.storage"):
        study.reach(str(tmp_path / "file" / "x.db"), tmp_path)
    with pytest.raises(StorageError, match=r"sweep\.storage"):
        study.reach("/proc/nothing/x.journal", tmp_path)


def test_damaged_storages(tmp_path):
    (tmp_path / "sweep.db").write_bytes(b"this is no database " * 100)
    with pytest.raises(StorageError, match="not a database"):
        opened(tmp_path)
    journal = tmp_path / "x.journal"
    opened(tmp_path, "x.journal")
    whole = journal.read_bytes()
    journal.write_bytes(b'{"op_code": 0, "worker' + b"\n" + whole)
    with pytest.raises(StorageError, match=r"x\.journal: a line of it is damaged"):
        opened(tmp_path, "x.journal")


@pytest.mark.parametrize("name", ["notes.journal", "train.log"])
def test_a_file_that_is_no_journal_stays_as_it_is(tmp_path, name):
    notes = tmp_path / name
    notes.write_text("of the last run:\nno end of line")
    with pytest.raises(ConfigError, match=rf"{name} is no journal of Optuna"):
        opened(tmp_path, name)
    assert notes.read_text() == "of the last run:\nno end of line"
    notes.write_text("")  # such as mktemp makes
    assert opened(tmp_path, name).claim(SEARCH) is not None


def test_a_locked_database_is_an_error_after_the_patience(tmp_path):
    found = opened(tmp_path, patience=0.2)
    with sqlite3.connect(tmp_path / "sweep.db", isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="database is locked"):
            opened(tmp_path, patience=0.2)
        with pytest.raises(StorageError, match="database is locked"):
            found.note("a line")
        holder.execute("ROLLBACK")
    holder.close()
    with found._store.turn(), pytest.raises(StorageError, match="locked by another worker"):
        opened(tmp_path, patience=0.2)
    assert found.claim(SEARCH) is not None


def test_a_full_disk_is_one_line_and_keeps_what_was_done(tmp_path):
    found = opened(tmp_path)
    job = found.claim(SEARCH)
    assert job is not None
    assert found.record(job.number, result(job, loss=1.0), (), finished=False)
    engine = found._store._rdb.engine

    @event.listens_for(engine, "connect")
    def fill(connection, _record):
        connection.execute("PRAGMA max_page_count=1")  # SQLite takes the size it has

    engine.dispose()
    with pytest.raises(StorageError, match="database or disk is full") as caught:
        found.note("x" * 10**6)
    assert "sweep.db" in caught.value.line()
    first = opened(tmp_path).records()[0]
    assert (first.status, first.loss) == ("paused", 1.0)


def test_a_line_that_a_full_disk_cut_off_is_no_damage(tmp_path):
    found = opened(tmp_path, "x.journal")
    job = found.claim(SEARCH)
    assert job is not None
    found.record(job.number, result(job, loss=1.0), (), finished=False)
    with (tmp_path / "x.journal").open("ab") as file:
        file.write(b'{"op_code": 8, "worker_id": "ab')
    again = opened(tmp_path, "x.journal")
    assert again.claim(SEARCH) is not None
    assert [r.status for r in opened(tmp_path, "x.journal").records()] == ["paused", "running"]


def test_where_storages_are(tmp_path):
    assert storage.resolve("", tmp_path) == f"sqlite:///{tmp_path}/sweep.db"
    assert storage.resolve(f"{tmp_path}/a.journal", Path("x")) == f"{tmp_path}/a.journal"
    assert storage.resolve("mysql://h/d", tmp_path) == "mysql://h/d"
    assert not storage.shared("")
    assert not storage.shared("a.db")
    assert not storage.shared("sqlite:///a.db")
    assert storage.shared("a.log")
    assert storage.shared("postgresql://h/d")


def test_winners_of_earlier_studies(tmp_path):
    for name, model in [("one", "m1"), ("two", "m2"), ("three", "m1")]:
        found = opened(
            tmp_path / name,
            enter=(3, 1, 1),
            identity={"model": model},
            sweep__storage=str(tmp_path / "all.db"),
        )
        work(found)
    config = settings.replaced(Config(), {"sweep.storage": str(tmp_path / "all.db")})
    own = [r.params for r in found.records() if r.status == "finished"]
    won = study.winners(config, tmp_path / "four", "m1")
    assert len(won) == 2
    assert won[1] == own[0]
    assert len(study.winners(config, tmp_path / "three", "m1")) == 1
    other = settings.replaced(Config(), {"sweep.prior": (str(tmp_path / "all.db"),)})
    assert study.winners(other, tmp_path / "four", "m1") == won
    assert not (tmp_path / "four").exists()
    missing = settings.replaced(Config(), {"sweep.prior": ("nowhere.db",)})
    with pytest.raises(ConfigError, match=r"'nowhere\.db' does not exist"):
        study.winners(missing, tmp_path, "m1")


# Several workers, and workers that die


def _worker(folder: Path, kind: str, log: Path) -> None:
    work(opened(folder, kind, first=()), log, slots=2)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_race_for_every_rung_and_none_is_done_twice(tmp_path, kind):
    log = tmp_path / "log"
    opened(tmp_path, kind)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(tmp_path, kind, log)) for _ in range(3)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(60)
    assert [process.exitcode for process in workers] == [0, 0, 0]
    done = [tuple(json.loads(line)[1:3]) for line in log.read_text().splitlines()]
    assert len(done) == len(set(done)) == 16 + 4 + 1
    records = opened(tmp_path, kind).records()
    assert [sum(r.rung >= rung for r in records) for rung in range(3)] == [16, 4, 1]
    assert {r.status for r in records} == {"stopped", "finished"}
    assert sum(r.tokens for r in records) == 2.5 * 160


KILLED = """
import json, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.test_sweep_study import SEARCH, opened, result
found = opened(Path(sys.argv[1]), sys.argv[2], first=())
jobs = [found.claim(SEARCH) for _ in range(3)]
found.record(jobs[0].number, result(jobs[0]), (), finished=False)
print(json.dumps([job.number for job in jobs]), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_trials_of_a_killed_worker_go_back(tmp_path, kind):
    code = KILLED.format(root=str(Path(__file__).parents[1]))
    opened(tmp_path, kind)
    command = [sys.executable, "-c", code, str(tmp_path), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    numbers = json.loads(process.stdout.readline())
    found = opened(tmp_path, kind)
    assert found.requeue() == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert found.requeue() == numbers[1:]
    assert [r.status for r in found.records()] == ["paused", "waiting", "waiting"]
    jobs = [found.claim(SEARCH) for _ in range(2)]
    assert [j and (j.number, j.rung, j.start) for j in jobs] == [(1, 0, 0), (2, 0, 0)]
    for job in jobs:
        assert job is not None
        assert found.record(job.number, result(job), (), finished=False)
    work(found)
    assert sum(r.tokens for r in found.records()) == 2.5 * 160


def test_those_are_counted_that_are_at_work(tmp_path, monkeypatch):
    away = opened(tmp_path, lease=100.0)
    assert away.workers() == 1
    here = opened(tmp_path, lease=100.0)
    away._session._values |= {"place": "another machine"}
    away.renew()
    assert here.workers() == 2
    since = time.time()
    monkeypatch.setattr(time, "time", lambda: since + 101)
    here.renew()
    assert here.workers() == 1
    away.renew()  # it was only slow
    assert here.workers() == 2


def test_a_worker_elsewhere_is_dead_after_its_lease(tmp_path, monkeypatch):
    away = opened(tmp_path)
    away._session._values |= {"place": "another machine"}
    away.renew()
    job = away.claim(SEARCH)
    assert job is not None
    here = opened(tmp_path, lease=100.0)
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    assert here.requeue() == []
    clock += 99
    assert here.requeue() == []
    away.renew()
    clock += 99  # its sign of life is news at this moment
    assert here.requeue() == []
    clock += 101
    assert here.requeue() == [job.number]
    assert not away.record(job.number, result(job), (), finished=False)
    assert here.claim(SEARCH) == job


def test_a_process_with_the_id_of_a_dead_one_is_another(tmp_path):
    old, new = opened(tmp_path), opened(tmp_path)
    job = old.claim(SEARCH)
    assert job is not None
    old._session._values |= {"born": "1"}
    old.renew()
    assert new.requeue() == [job.number]


@pytest.mark.parametrize("method", ["set_trial_user_attr", "set_trial_state_values"])
@pytest.mark.parametrize("calls", range(5))
def test_a_kill_between_two_writes_loses_nothing(tmp_path, monkeypatch, method, calls):
    """The write that would be next does not happen, and the worker is gone."""
    found = opened(tmp_path, enter=(1, 1, 1), first=())
    left = [calls]
    original = getattr(found._storage, method)

    def killed(*args, **kwargs):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(*args, **kwargs)

    job = found.claim(SEARCH)
    assert job is not None
    with monkeypatch.context() as patch:
        patch.setattr(found._storage, method, killed)
        try:
            found.record(job.number, result(job), (), finished=False)
            second = found.claim(SEARCH)
            assert second is not None
            found.stop(second.number, "stopped", "dominated", [(20, 1.0)], 3)
        except KeyboardInterrupt:
            pass
    found._session._values |= {"born": "1"}
    found.renew()
    other = opened(tmp_path, enter=(1, 1, 1), first=())
    other.requeue()
    (record,) = other.records()
    assert record.status in ("waiting", "paused", "stopped")
    if record.status != "stopped":
        work(other)
    (record,) = other.records()
    assert record.status in ("finished", "stopped")
    assert [r.rung for r in record.results] == list(range(len(record.results)))
    assert record.tokens == (160 if record.status == "finished" else 13)


def test_seconds_are_of_the_union_of_sessions(tmp_path):
    one, two, three = (opened(tmp_path) for _ in range(3))
    for found, (began, seen) in zip((one, two, three), [(0, 10), (5, 12), (50, 60)], strict=True):
        found._session._values |= {"began": began, "seen": seen}
        found._study.set_user_attr("session " + found._session.key, found._session._values)
    assert one.seconds() == 22.0
