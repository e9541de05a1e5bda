"""The worker's loop with a stand-in engine: no order of faults loses or doubles a result."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.budget import Budget
from jaxtune.config import Config, replaced
from jaxtune.errors import ConfigError, NumericsError, StorageError
from jaxtune.signals import Stop
from jaxtune.sweep import ending, halving, trials, winner, worker
from jaxtune.sweep.pace import width_for
from jaxtune.sweep.records import SEARCH, Job, Record, Result
from jaxtune.sweep.worker import Setting
from tests.sweep_engine import StandIn, facts, setting

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_early_exits(monkeypatch):
    """They depend on how far others are at the time, which a kill changes."""
    monkeypatch.setattr(halving, "early_exit", lambda *args, **kwargs: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "early_exit", lambda *args, **kwargs: None)
        made = setting(folder, StandIn())
        worker.work(made, SEARCH)
    return made


def calls(setting: Setting) -> list[int]:
    """Widths of the populations that were stepped."""
    assert isinstance(setting.engine, StandIn)
    return setting.engine.calls


def test_trials_go_through_the_rungs_and_survivors_go_on(undisturbed):
    records = undisturbed.study.records()
    assert [len(record.results) for record in records].count(1) == 4
    assert [len(record.results) for record in records].count(2) == 2
    assert sorted(r.number for r in records if r.status == "finished") == sorted(
        r.number for r in halving.ranked(records, 1)[:2]
    )
    for record in records:
        assert [result.position for result in record.results] == [8, 16, 32][: len(record.results)]
        # Ten tokens a micro-batch, each counted in one rung: nobody began anew.
        assert [r.tokens for r in record.results] == [80, 80, 160][: len(record.results)]
        assert [at for at, _ in record.curve] == [*range(1, record.results[-1].position + 1)]


def test_early_rungs_are_scored_on_a_part_of_the_rows(undisturbed, tmp_path):
    made = setting(tmp_path / "sweep", StandIn(), scored=(100, 200, 400))
    worker.work(made, SEARCH)
    for part, whole in zip(made.study.records(), undisturbed.study.records(), strict=True):
        # The stand-in's score is higher by the share of the rows that it does not see.
        for one, other in zip(part.results, whole.results, strict=True):
            missing = (0.75, 0.5, 0.0)[one.rung]
            assert one.loss == pytest.approx(other.loss + missing)


def test_rungs_that_end_at_once_are_each_scored_on_their_own_rows(tmp_path):
    engine = StandIn(widths=(2, 1))
    made = setting(tmp_path / "sweep", engine, trials=3, eta=2, scored=(100, 200, 400))
    worker.work(made, SEARCH)
    for record in made.study.records():
        for result in record.results:
            alone = engine.start(engine.empty(1), 0, member := engine.member(
                made.configured(Job(record.number, record.params, "search", 0, 0))
            ))  # fmt: skip
            for position in range(result.position):
                alone, _ = engine.step(alone, [member], [position])
            rows = made.scored[result.rung]
            assert result.loss == pytest.approx(engine.evaluate(alone, rows)[0].loss)


def test_narrower_populations_when_fewer_trials_live(undisturbed):
    # 8 trials to 8 in two populations of 4; 4 of them on to 16; the 2 best to 32 in a pair.
    assert calls(undisturbed) == [4] * 24 + [2] * 16


def test_killed_again_and_again_the_records_are_those_of_an_undisturbed_sweep(
    undisturbed, tmp_path
):
    command = [sys.executable, "-m", "tests.sweep_engine", "killed", str(tmp_path / "sweep")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 4  # so often was it begun
    assert facts(setting(tmp_path / "sweep", StandIn())) == facts(undisturbed)


def test_two_workers_share_a_sweep_and_one_goes_on_alone(undisturbed, tmp_path):
    command = [sys.executable, "-m", "tests.sweep_engine", "two", str(tmp_path / "sweep")]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    records = setting(tmp_path / "sweep", StandIn()).study.records()
    assert {record.status for record in records} == {"stopped", "finished"}
    assert len({record.owner for record in records}) == 1  # nobody has any of them
    # Who goes on depends on who is first; what a trial comes to does not.
    for record, alone in zip(records, undisturbed.study.records(), strict=True):
        for result, expected in zip(record.results, alone.results, strict=False):
            assert result._replace(seconds=0) == expected._replace(seconds=0)


@pytest.mark.parametrize("after", [1, 9, 30])
def test_a_stop_saves_in_the_middle_of_a_rung(undisturbed, tmp_path, after):
    stop = Stop()
    steps = iter(range(1, 100))

    def on_step():
        stop.asked = next(steps) == after

    first = setting(tmp_path / "sweep", StandIn(on_step=on_step), stop=stop)
    worker.work(first, SEARCH)
    assert len(calls(first)) == after
    assert not any(record.status == "running" for record in first.study.records())
    again = setting(tmp_path / "sweep", StandIn())
    worker.work(again, SEARCH)
    assert facts(again) == facts(undisturbed)
    assert len(calls(again)) == len(calls(undisturbed)) - after  # none was done twice


@pytest.mark.parametrize("flush", [1, 3, 14])
def test_a_full_disk_ends_the_worker_and_keeps_every_result(
    undisturbed, tmp_path, monkeypatch, flush
):
    flushes = iter(range(1, 1000))
    real = os.fsync

    def fsync(handle):
        if next(flushes) == 2 * flush - 1:  # a file and its folder each time
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    first = setting(tmp_path / "sweep", StandIn())
    with pytest.raises(StorageError, match=r"could not be saved.*No space left on device"):
        worker.work(first, SEARCH)
    monkeypatch.undo()
    monkeypatch.setattr(halving, "early_exit", lambda *args, **kwargs: None)
    kept = sum(len(record.results) for record in first.study.records())
    assert kept == flush - 1
    again = setting(tmp_path / "sweep", StandIn())
    worker.work(again, SEARCH)
    assert facts(again) == facts(undisturbed)


def _interrupted(folder: Path, after: int) -> None:
    stop = Stop()
    steps = iter(range(1, 100))

    def on_step():
        stop.asked = next(steps) == after

    worker.work(setting(folder, StandIn(on_step=on_step), stop=stop), SEARCH)


def test_a_damaged_state_is_done_again_from_the_one_before(undisturbed, tmp_path, capsys):
    folder = tmp_path / "sweep"
    _interrupted(folder, after=20)  # the first four trials are through a rung, others are not
    damaged = 0
    for number in range(8):
        for position in trials.positions(folder / "trials", number)[-1:]:
            file = folder / "trials" / str(number) / f"{position}.npz"
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
            damaged += 1
    assert damaged == 8
    again = setting(folder, StandIn())
    worker.work(again, SEARCH)
    assert "is damaged" in capsys.readouterr().err
    assert facts(again) == facts(undisturbed)


def test_states_on_another_machine_are_trained_again(undisturbed, tmp_path, capsys):
    _interrupted(tmp_path / "sweep", after=20)
    shutil.rmtree(tmp_path / "sweep" / "trials")
    again = setting(tmp_path / "sweep", StandIn())
    worker.work(again, SEARCH)
    assert "goes on from micro-batch 0: its state is not here" in capsys.readouterr().err
    assert facts(again) == facts(undisturbed)


def test_a_trial_that_blows_up_is_stopped_and_its_files_go(tmp_path, monkeypatch):
    monkeypatch.undo()  # with early exits
    engine = StandIn(positions=64)
    made = setting(tmp_path / "sweep", engine, trials=3)

    def configured(job):
        config = made.configured(job)
        return replaced(config, {"optim.lr": 100.0}) if job.number == 1 else config

    worker.work(made._replace(configured=configured), SEARCH)
    records = made.study.records()
    assert [record.status == "diverged" for record in records] == [False, True, False]
    assert records[1].lost_tokens > 0
    assert trials.positions(tmp_path / "sweep" / "trials", 1) == []
    assert winner.choose(records).number != 1


def test_a_token_budget_ends_the_search_and_leaves_what_was_begun(tmp_path):
    engine = StandIn()
    made = setting(tmp_path / "sweep", engine, trials=0, repeats=0, budget=Budget(2400.0, "tokens"))
    worker.work(made, SEARCH)
    records = made.study.records()
    spent = sum(record.tokens for record in records)
    assert any(record.status == "finished" for record in records)
    assert 1500 <= spent <= 2400
    assert made.study.notes()


def test_a_budget_too_short_for_one_trial_says_how_long_one_takes(tmp_path):
    made = setting(tmp_path / "sweep", StandIn(), budget=Budget(100.0, "tokens"))
    with pytest.raises(ConfigError, match=r"too short for one trial.*takes 336 tokens"):
        worker.work(made, SEARCH)


def test_all_diverged_says_what_was_tried():
    records = [Record(i, {"optim.lr": lr}, "diverged") for i, lr in enumerate((0.3, 3e-3, 1.0))]
    with pytest.raises(NumericsError, match=r"all 3 trials diverged; try: .*below 0\.003"):
        winner.choose(records)
    mixed = [*records, Record(3, {"optim.lr": 1e-4}, "finished")]
    assert winner.sound_rates(mixed) == (
        "3 trials diverged, from a learning rate of 0.003 on; 0.0001 to 0.0001 did not"
    )


@pytest.mark.parametrize(
    ("count", "width"), [(1, 1), (2, 1), (3, 4), (6, 4), (13, 4), (14, 16), (16, 16), (40, 16)]
)
def test_a_width_of_which_most_is_used(count, width):
    assert width_for(count, (16, 4, 1)) == width


def test_trials_that_find_no_place_wait_and_are_trained_in_turn(undisturbed, tmp_path):
    # With 6 trials left of 8 a population of 4 and one of 2 cost less than one of 8.
    engine = StandIn(widths=(8, 4, 1))
    made = setting(tmp_path / "sweep", engine)
    worker.work(made, SEARCH)
    assert facts(made) == facts(undisturbed)
    assert engine.calls == [8] * 8 + [4] * 8 + [1] * 32


def test_a_population_that_shrinks_parks_what_has_no_place(tmp_path):
    engine = StandIn(widths=(8, 4, 1), positions=64)
    made = setting(tmp_path / "sweep", engine)

    def configured(job):  # two of eight blow up at once
        config = made.configured(job)
        return replaced(config, {"optim.lr": 1e3}) if job.number in (2, 3) else config

    worker.work(made._replace(configured=configured), SEARCH)
    records = made.study.records()
    assert [record.number for record in records if record.status == "diverged"] == [2, 3]
    early = engine.calls.index(4)
    assert engine.calls[:early] == [8] * early
    assert early < 16
    for record in records:
        for result, tokens in zip(record.results, (160, 160, 320), strict=False):
            assert result.tokens == tokens  # parked, they did nothing twice


@pytest.mark.parametrize("rate", [0.05, 50.0])
def test_a_winner_that_is_no_better_than_the_base_is_not_handed_over(rate):
    engine = StandIn()
    config = replaced(Config(), {"optim.lr": rate})
    base = winner.base_loss(engine, config, engine.held)
    loss = base - 0.1 if rate < 1 else base
    best = Record(3, {"optim.lr": rate}, "finished", results=(Result(2, 32, loss, 0.0, 9, 1.0),))
    if rate < 1:
        winner.require_gain(base, best, [best], 512)
        return
    message = rf"no trial is better than the base model.* {base:.4f}.*trial 3.*below 50,"
    with pytest.raises(NumericsError, match=message):
        winner.require_gain(base, best, [best], 512)
    # The base may be worse than that.
    guess = dataclasses.replace(best, results=(Result(2, 32, 6.2383, 0.0, 9, 1.0),))
    with pytest.raises(
        NumericsError, match=r"loss of 6\.2383, that of equal odds for all 512: it k"
    ):
        winner.require_gain(16.6, guess, [guess], 512)
    winner.require_gain(16.6, guess, [guess], 600)


def test_what_speaks_against_the_winner_is_said():
    def record(number: int, losses: list[float], repeats: str = "") -> Record:
        results = tuple(Result(i, 10 * (i + 1), loss, 0.0, 9, 1.0) for i, loss in enumerate(losses))
        return Record(number, {}, "finished", results=results, repeats=repeats)

    calm = record(1, [3.0, 2.5, 2.4])
    assert ending.warnings([calm], calm, (9, 9, 9)) == []
    learnt = record(2, [3.0, 2.2, 2.6])
    repeats = [record(3, [2.6], "winner"), record(4, [2.4], "defaults")]
    assert ending.warnings([learnt], learnt, (4, 4, 9)) == []  # scores of different rows
    by_heart, worse = ending.warnings([learnt, *repeats], learnt, (4, 9, 9))
    assert "was 2.2000 after 20 of 30 micro-batches and is 2.6000 at the end" in by_heart
    assert "about 67% of the steps" in by_heart
    assert "the defaults are better, 2.4000 against 2.6000" in worse
    assert winner.outdone([learnt, *repeats]) is repeats[1]
    assert winner.outdone([learnt, *repeats[1:]]) is None  # nothing to compare with
    assert winner.outdone([learnt, record(3, [2.4], "winner"), repeats[1]]) is None
