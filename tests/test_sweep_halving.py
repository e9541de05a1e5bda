"""Successive halving and early exit: nobody goes on who may not, and the best is never stopped."""

import dataclasses
import math
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxtune.sweep import halving
from jaxtune.sweep.records import Record, Result

ENDED = {"stopped", "diverged", "finished"}


def scored(record: Record, rung: int, position: int, loss: float, last: bool) -> Record:
    result = Result(rung, position, loss, 0.0, position - sum(r.tokens for r in record.results), 1)
    return dataclasses.replace(
        record,
        results=(*record.results, result),
        status="finished" if last else "paused",
        owner="",
    )


class Search:
    """Workers with slots on one list of records, as study.py leads them."""

    def __init__(self, trials, rungs, eta, finalists, longest, workers, seed):
        self.ends = halving.positions(longest, rungs, eta)
        self.enter = halving.quotas(trials, len(self.ends), eta, finalists)
        self.records: list[Record] = []
        self.random = random.Random(seed)
        self.free = [w for w in workers for _ in range(workers[w])]
        self.diverge = 0.0
        self.short: dict[int, int] = {}  # whole trainings that are shorter than the longest

    def claim(self, worker: str) -> bool:
        for record, why in halving.beaten(self.records, self.enter):
            self.put(dataclasses.replace(record, status="stopped", why=why))
        if len(self.records) < self.enter[0]:
            number = len(self.records)
            self.records.append(Record(number, {}, "running", owner=worker))
            return True
        found = halving.promotable(self.records, self.enter, worker)
        if found is not None:
            record, rung = found
            assert record.status == "paused"
            assert record.rung == rung - 1
            self.put(dataclasses.replace(record, status="running", rung=rung, owner=worker))
        return found is not None

    def put(self, record: Record) -> None:
        assert self.records[record.number].status not in ENDED, "ended twice"
        self.records[record.number] = record

    def finish(self, record: Record) -> None:
        if self.random.random() < self.diverge:
            self.put(dataclasses.replace(record, status="diverged", owner=""))
            return
        whole = self.short.get(record.number, self.ends[-1])
        position = min(self.ends[record.rung], whole)
        loss = record.number % 7 + self.random.choice([0.1, 0.5, 3.0]) / (record.rung + 1)
        self.put(scored(record, record.rung, position, loss, position == whole))

    def run(self) -> None:
        while True:
            for worker in [w for w in self.free if self.claim(w)]:
                self.free.remove(worker)
            self.check()
            running = [r for r in self.records if r.status == "running"]
            if not running:
                return
            done = self.random.choice(running)
            self.free.append(done.owner)
            self.finish(done)

    def check(self) -> None:
        for rung, most in enumerate(self.enter):
            inside = [r for r in self.records if r.rung >= rung]
            gone = [r for r in inside if r.status == "diverged" and r.at(rung) is None]
            assert len(inside) - len(gone) <= most


searches = st.builds(
    Search,
    trials=st.integers(1, 20),
    rungs=st.integers(1, 4),
    eta=st.integers(2, 4),
    finalists=st.integers(1, 3),
    longest=st.integers(1, 200),
    workers=st.dictionaries(st.sampled_from("abc"), st.integers(1, 8), min_size=1),
    seed=st.integers(0, 10**6),
)


@settings(deadline=None, max_examples=150)
@given(searches)
def test_every_trial_ends_once_and_no_rung_has_more_than_its_quota(search):
    search.run()
    assert len(search.records) == search.enter[0]
    assert {r.status for r in search.records} <= {"stopped", "finished"}
    finished = [r for r in search.records if r.status == "finished"]
    assert len(finished) == search.enter[-1]
    for rung, most in enumerate(search.enter):
        assert sum(r.at(rung) is not None for r in search.records) == most


@settings(deadline=None, max_examples=150)
@given(searches, st.sampled_from([0.1, 0.5, 1.0]), st.data())
def test_divergence_and_short_trainings_leave_nothing_waiting(search, diverge, data):
    search.diverge = diverge
    search.short = data.draw(
        st.dictionaries(st.integers(0, 19), st.integers(1, search.ends[-1]), max_size=5)
    )
    search.run()
    assert {r.status for r in search.records} <= ENDED
    whole = [r for r in search.records if r.status == "finished"]
    best = halving.best(search.records)
    assert best is None or not whole or best.loss == min(r.loss for r in whole)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 20), st.integers(2, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_one_worker_sends_exactly_the_best_of_a_rung(trials, eta, slots, seed):
    search = Search(trials, 3, eta, 1, 64, {"a": slots}, seed)
    search.run()
    for rung in range(len(search.enter) - 1):
        order = halving.ranked(search.records, rung)
        sent = {r.number for r in search.records if r.rung > rung}
        assert sent == {r.number for r in order[: search.enter[rung + 1]]}
    assert halving.best(search.records) in search.records
    best_first = halving.ranked(search.records, 0)[0]
    assert best_first.rung >= (1 if len(search.enter) > 1 else 0)


def test_sixteen_trials_cost_two_and_a_half_whole_trainings():
    search = Search(16, 3, 4, 1, 1024, {"a": 8}, 0)
    assert search.ends == (64, 256, 1024)
    assert search.enter == (16, 4, 1)
    search.run()
    assert sum(r.results[-1].position for r in search.records) == 2.5 * 1024


def test_positions_and_quotas():
    assert halving.positions(1024, 3, 4) == (64, 256, 1024)
    assert halving.positions(1024, 3, 4, every=4) == (128, 363, 1024)  # 32 updates, evenly on
    assert halving.positions(100, 3, 4) == (13, 36, 100)  # an eighth, though that is 13 updates
    assert halving.positions(3, 4, 4) == (1, 2, 3)  # two of four are one
    assert halving.positions(5, 1, 4) == (5,)
    assert halving.quotas(16, 3, 4, 1) == (16, 4, 1)
    assert halving.quotas(16, 3, 4, 2) == (16, 3, 2)  # the second place is paid for before
    assert halving.quotas(64, 4, 4, 2) == (64, 16, 3, 2)
    assert halving.quotas(16, 3, 4, 3) == (16, 3, 3)
    assert halving.quotas(12, 2, 4, 2) == (12, 3)
    assert halving.quotas(2, 3, 4, 3) == (2, 2, 2)
    assert halving.quotas(7, 2, 2, 1) == (7, 3)
    assert halving.quotas(5, 1, 4, 2) == (5,)


def paused(number: int, loss: float, rung: int = 0, **changes) -> Record:
    results = tuple(Result(r, 10 * 4**r, loss, 0.0, 1, 1.0) for r in range(rung + 1))
    return dataclasses.replace(Record(number, {}, "paused", results, rung=rung), **changes)


def test_a_rung_is_scored_on_no_more_rows_than_it_trains_on():
    assert halving.scored((32, 128, 256), 8, 612) == (256, 612, 612)
    assert halving.scored((64, 256, 1024), 8, 5000) == (512, 1536, 5000)
    assert halving.scored((4, 16), 1, 5000) == (256, 5000)  # too few rows say nothing
    assert halving.scored((4, 16), 8, 100) == (100, 100)
    assert halving.scored((16,), 8, 5000) == (5000,)


def test_ties_go_to_the_lower_number():
    records = [paused(n, 1.0) for n in range(4)]
    found = halving.promotable(records, (4, 1))
    assert found is not None
    assert (found[0].number, found[1]) == (0, 1)


def test_a_worker_waits_for_its_own_but_not_for_others():
    records = [paused(n, float(n)) for n in range(4)]
    records += [Record(n, {}, "running", owner="b:1") for n in (4, 5, 6, 7)]
    # Four of eight are judged, so one of the two places can be had by now.
    assert halving.promotable(records, (8, 2), "b:1") is None
    found = halving.promotable(records, (8, 2), "a:1")
    assert found is not None
    assert found[0].number == 0
    records[0] = dataclasses.replace(records[0], status="running", rung=1, owner="a:1")
    assert halving.promotable(records, (8, 2), "a:1") is None


def test_one_that_diverges_leaves_its_place_to_the_next():
    records = [paused(n, float(n)) for n in range(4)]
    records[0] = dataclasses.replace(records[0], status="diverged", rung=1)
    assert halving.beaten(records, (4, 1)) == []
    found = halving.promotable(records, (4, 1))
    assert found is not None
    assert found[0].number == 1
    records[1] = scored(dataclasses.replace(records[1], rung=1), 1, 40, 0.5, True)
    stopped = halving.beaten(records, (4, 1))
    assert [(r.number, why) for r, why in stopped] == [
        (2, "place 3 of 4 at rung 1"),
        (3, "place 4 of 4 at rung 1"),
    ]


def test_scores_that_are_not_finite_have_no_rank():
    records = [paused(0, math.nan), paused(1, math.inf), paused(2, 2.0)]
    assert [r.number for r in halving.ranked(records, 0)] == [2]
    assert halving.best(records) == records[2]
    assert halving.best(records[:2]) is None


def test_the_winner_is_a_whole_training():
    early = paused(0, 0.1, rung=1)
    whole = dataclasses.replace(paused(1, 0.5, rung=2), status="finished")
    short = dataclasses.replace(paused(2, 0.4, rung=1), status="finished")
    repeat = dataclasses.replace(paused(3, 0.0, rung=2), status="finished", role="repeat")
    assert halving.best([early, whole, repeat]) == whole
    assert halving.best([early, whole, short]) == short
    assert halving.best([early, paused(4, 0.05)]) == early


def test_agreement_of_ranks():
    losses = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    records = [
        dataclasses.replace(
            paused(n, 0.0, rung=1),
            results=(Result(0, 1, a, 0, 1, 1), Result(1, 4, b, 0, 1, 1)),
        )
        for n, (a, b) in enumerate(losses)
    ]
    (found,) = halving.agreement(records)
    assert found.spearman == pytest.approx(-1.0)
    assert (found.rung, found.trials, found.best_was) == (0, 3, 3)
    assert halving.agreement(records[:2]) == (halving.Agreement(0, 2, None, 2),)
    assert halving.agreement([paused(0, 1.0)]) == ()


# Early exit


def running(number: int, losses, **changes) -> Record:
    curve = tuple((10 * (i + 1), float(loss)) for i, loss in enumerate(losses))
    return dataclasses.replace(Record(number, {}, "running"), curve=curve, **changes)


def leaves(record: Record, others, *, goes_on=1, windows=40, epoch=10**6):
    end = 10 * windows
    return halving.early_exit(record, [record, *others], end=end, goes_on=goes_on, epoch=epoch)


def test_what_diverges_is_said():
    found = leaves(running(0, [2.5, 2.4, math.nan]), [])
    assert found == halving.Exit("diverged", "loss is nan at position 30")
    found = leaves(running(0, [2.5, 2.6, 4.5, 5.0, 6.0]), [])
    assert found == halving.Exit("diverged", "loss rose from 2.600 to 6.000")
    # One bad window, or loss that comes back, is not divergence.
    assert leaves(running(0, [2.5, 2.6, 6.0, 2.0, 1.9]), []) is None
    # No better than at the start while the others learn.
    stuck = running(0, [2.5, 2.5, 2.6, 2.6, 2.6])
    assert leaves(stuck, []) is None
    found = leaves(stuck, [running(1, [2.5, 2.0, 1.5, 1.2, 1.1])])
    assert found is not None
    assert found.status == "diverged"


def curves(levels, windows, seed, noise=0.3, own=0.01):
    """Losses of trials on the same rows: what is hard is hard for all."""
    rng = random.Random(seed)
    rows = [rng.gauss(0, noise) for _ in range(windows)]
    return [
        [
            level + (3.0 - level) * math.exp(-w / 5) + rows[w] + rng.gauss(0, own)
            for w in range(windows)
        ]
        for level in levels
    ]


def test_a_dominated_trial_is_stopped_and_names_the_better():
    one, two, three = curves([1.0, 1.05, 2.0], 24, 0)
    better = [running(1, one), running(2, two)]
    worse = running(3, three)
    found = leaves(worse, better, goes_on=2)
    assert found is not None
    assert found == halving.Exit("stopped", "training loss certainly above that of trial 1, 2")
    # Three go on, or it is the last rung: it stays.
    assert leaves(worse, better, goes_on=3) is None
    assert leaves(worse, better, goes_on=0) is None
    # Rows that were seen before tell how well they were learnt by heart.
    assert leaves(worse, better, goes_on=2, epoch=20) is None
    # Those that left already take no place.
    gone = [dataclasses.replace(r, status="stopped") for r in better]
    assert leaves(worse, gone, goes_on=2) is None


def test_dropout_and_smoothing_are_not_compared_with_their_absence():
    one, two = curves([1.0, 2.0], 24, 0)
    better = running(1, one, params={"lora.dropout": 0.0})
    assert leaves(running(2, two, params={"lora.dropout": 0.1}), [better]) is None
    assert leaves(running(2, two, params={"lora.dropout": 0.0}), [better]) is not None


def test_a_gap_that_closes_in_time_is_no_domination():
    steady = [2.0 + 0.3 * math.sin(w) for w in range(24)]
    closing = [value + 1.0 - 0.03 * w for w, value in enumerate(steady)]
    assert leaves(running(1, closing), [running(0, steady)], windows=40) is None
    # The rung ends before the gap does.
    assert leaves(running(1, closing), [running(0, steady)], windows=26) is not None


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(0.5, 3.0), min_size=2, max_size=8),
    st.integers(2, 40),
    st.integers(0, 10**6),
    st.integers(1, 4),
)
@example([1.0, 3.0], 12, 8063, 2)  # the second runs away: diverged, whatever room there is
def test_the_best_is_never_stopped_and_places_stay_filled(levels, windows, seed, goes_on):
    records = [running(n, c) for n, c in enumerate(curves(levels, windows, seed))]
    kept = records
    for record in records:
        found = halving.early_exit(
            record, kept, end=10 * windows + 50, goes_on=goes_on, epoch=10**6
        )
        if found is not None:
            kept = [
                dataclasses.replace(r, status=found.status) if r.number == record.number else r
                for r in kept
            ]
    left = [r for r in kept if r.status == "running"]
    assert len([r for r in kept if r.status != "stopped"]) >= min(goes_on, len(records))
    third = windows // 3
    means = [sum(v for _, v in r.curve[third:]) for r in records]
    assert records[means.index(min(means))] in left
