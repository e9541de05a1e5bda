"""What people write as a budget, and what a search makes of it: nothing may end after it."""

import dataclasses
import functools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune import budget as amounts
from jaxtune.errors import ConfigError
from jaxtune.sweep import budget
from jaxtune.sweep.budget import Ask, Costs, Done, Measured, plan


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("24h", 86400, "seconds"),
        ("90m", 5400, "seconds"),
        ("1h30m", 5400, "seconds"),
        ("1 hour and 30 min", 5400, "seconds"),
        ("2 days", 172800, "seconds"),
        ("45s", 45, "seconds"),
        ("64 chip-hours", 64 * 3600, "chip-seconds"),
        ("500M tokens", 5e8, "tokens"),
        ("2e9 tokens", 2e9, "tokens"),
        ("1,000,000 tokens", 1e6, "tokens"),
    ],
)
def test_budgets_are_read(text, amount, unit):
    assert amounts.parse(text, "sweep.budget") == amounts.Budget(amount, unit)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("90", "90m (minutes)"),
        ("500M", "500M tokens"),
        ("soon", "64 chip-hours"),
        ("0h", "24h"),
        ("-3h", "24h"),
        ("1h30", "1h30m"),
        ("5ms", "24h"),
        ("1e999 tokens", "500M tokens"),
    ],
)
def test_what_is_no_budget_is_an_error_with_a_hint(text, hint):
    with pytest.raises(ConfigError, match=r"sweep\.budget '.*' is no amount") as caught:
        amounts.parse(text, "sweep.budget")
    assert hint in caught.value.fix


def test_an_empty_budget_is_none_and_chips_share_their_hours():
    assert amounts.parse(" ", "sweep.budget") is None
    assert amounts.Budget(64 * 3600, "chip-seconds").on(16) == amounts.Budget(14400, "seconds")
    assert amounts.Budget(60, "seconds").on(16) == amounts.Budget(60, "seconds")


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (3.21, "seconds", "3.2 s"),
        (100, "seconds", "100 s"),
        (5400, "seconds", "90m"),
        (9000, "seconds", "2h 30m"),
        (86400, "seconds", "24h"),
        (200000, "seconds", "2d 7h"),
        (5e8, "tokens", "500M tokens"),
        (9000, "chip-seconds", "2.5 chip-hours"),
    ],
)
def test_budgets_are_spelled(amount, unit, text):
    assert amounts.spell(amount, unit) == text


# 16 trials of 64 positions, compared at 4 and 16. A step of 8 trials takes 2, of one 0.5.
ASK = Ask(rungs=(4, 16, 64), trials=16, eta=4, finalists=1, repeats=3)
COSTS = Costs(step={8: 2.0, 2: 0.8, 1: 0.5}, evaluate={8: 1.0, 2: 0.3, 1: 0.2}, keep=0.1, close=5.0)
SEARCH = (
    (2 * (4 * 2.0 + 1.0) + 16 * 0.1)  # 16 trials to 4, in two populations of 8
    + (2 * (12 * 0.8 + 0.3) + 4 * 0.1)  # 4 to 16, in two of 2
    + (48 * 0.5 + 0.2 + 0.1)  # one to 64
)
REPEATS = (64 * 2.0 + 1.0) + 6 * 0.1  # three seeds of winner and defaults, in one population


def test_all_that_is_asked_for_where_there_is_room():
    found = plan(SEARCH + REPEATS + 5.0, ASK, COSTS)
    assert (found.trials, found.enter, found.repeats, found.fits) == (16, (16, 4, 1), 3, True)
    assert found.cost == pytest.approx(SEARCH + REPEATS + 5.0)
    assert found.end == pytest.approx(SEARCH + REPEATS)
    assert plan(None, ASK, COSTS) == budget.Plan(16, (16, 4, 1), 3, found.cost, math.inf, True)


def test_repeats_go_first_then_trials():
    assert plan(SEARCH + REPEATS + 4.9, ASK, COSTS).repeats == 2
    assert plan(SEARCH + 5.1, ASK, COSTS).repeats == 0
    assert plan(SEARCH + 5.1, ASK, COSTS).trials == 16
    assert plan(SEARCH + 4.9, ASK, COSTS).trials == 15
    # One alone: 64 steps, three evaluations, kept three times, closed.
    one = 64 * 0.5 + 3 * (0.2 + 0.1) + 5.0
    assert plan(one, ASK, COSTS).enter == (1, 1, 1)
    with pytest.raises(ConfigError, match="one trial: to train it whole takes 33 s") as caught:
        plan(one - 0.1, ASK, COSTS)
    assert "sweep.budget='50s'" in caught.value.fix


def test_a_stage_pays_for_the_held_out_rows_it_is_scored_on():
    part = dataclasses.replace(ASK, repeats=0, scored=(0.25, 0.5, 1.0))
    whole = plan(None, dataclasses.replace(ASK, repeats=0), COSTS)
    # Two populations of 8 save three quarters of 1.0 each, two of 2 half of 0.3 each.
    assert plan(None, part, COSTS).cost == pytest.approx(whole.cost - 2 * 0.75 - 2 * 0.15)


def test_what_is_done_is_not_paid_again():
    half = Done(used=30.0, through=(16, 2), running=((1, 6), (1, 12)))
    found = plan(None, ASK, COSTS, half)
    # Two trials lack 6 and 0 positions of the second rung: each alone is cheapest.
    left = 6 * 0.5 + 2 * 0.2 + 2 * 0.1 + (48 * 0.5 + 0.2 + 0.1)
    assert found.cost == pytest.approx(left + REPEATS + 5.0)
    ended = Done(used=30.0, through=(16, 4, 1), repeats=6)
    assert plan(100.0, ASK, COSTS, ended).cost == pytest.approx(5.0)


def test_a_machine_that_slows_down_costs_trials_then_survivors_then_the_end():
    limit = SEARCH + 5.0
    slow = Costs({8: 4.0, 1: 1.0}, close=5.0)
    begun = Done(used=9.8, through=(8,), running=tuple((0, 0) for _ in range(8)))
    assert plan(limit, ASK, COSTS, begun).trials == 16
    assert 8 <= plan(limit, ASK, slow, begun).trials < 16
    later = Done(used=19.6, through=(16,))
    assert plan(limit, ASK, COSTS, later).enter == (16, 4, 1)
    found = plan(limit, ASK, Costs({2: 1.0, 1: 0.8}, close=5.0), later)
    assert found.enter == (16, 1, 1)
    assert not found.fits  # 60 steps of 0.8 are left, and room for 44.5
    assert found.end == limit - 5.0
    assert plan(limit, ASK, Costs({2: 1.0, 1: 0.65}, close=5.0), later).enter == (16, 2, 1)


def test_as_many_as_there_is_room_for_leave_a_third_to_the_repeats():
    open_ = Ask(rungs=(4, 16, 64), trials=0, eta=4, finalists=1, repeats=3)
    found = plan(900.0, open_, COSTS)
    assert found.trials > 16
    assert found.repeats == 3
    assert plan(900.0, open_, COSTS, Done(used=1.0, through=(20,))).trials > found.trials
    with pytest.raises(ConfigError, match=r"no sweep\.budget"):
        plan(None, open_, COSTS)


def test_a_third_that_pays_for_no_repeat_goes_to_the_search():
    open_ = Ask(rungs=(4, 16, 64), trials=0, eta=4, finalists=1, repeats=3)
    pair = 64 * 0.8 + 0.3 + 2 * 0.1  # a seed of winner and defaults
    enough = plan(3 * (pair + 1.0) + 5.0, open_, COSTS)  # and a third of this pays for it
    assert enough.repeats == 1
    short = plan(3 * (pair - 1.0) + 5.0, open_, COSTS)
    assert short.trials > enough.trials
    assert short.repeats == 0


def test_there_are_no_more_trials_than_the_space_has():
    few = dataclasses.replace(ASK, most=5)
    assert plan(None, few, COSTS).enter == (5, 1, 1)
    assert plan(900.0, dataclasses.replace(few, trials=0), COSTS).trials == 5


def test_the_finalists_are_trained_on_everything_where_rungs_see_less():
    ask = Ask(rungs=(4, 16), trials=16, eta=4, finalists=2, repeats=0, whole=64)
    found = plan(None, ask, COSTS)
    assert ask.stages == (4, 12, 64)
    assert found.enter == (16, 4, 2)
    assert plan(found.cost - 0.1, ask, COSTS).enter == (16, 4, 1)
    assert "16 to 4, 4 to 16" not in budget.describe(found, ask, None, 0.0)
    assert "2 to 64 micro-batches" in budget.describe(found, ask, None, 0.0)


def test_tokens_are_a_budget_too():
    costs = Costs({8: 8 * 1000.0, 1: 1000.0})
    found = plan(1e6, ASK, costs, unit="tokens")
    # 16 * 4 + 4 * 12 + 48 positions of 1,000 tokens; two seeds of twice 64.
    assert (found.trials, found.repeats) == (16, 3)
    assert found.cost == pytest.approx(160e3 + 384e3)
    with pytest.raises(ConfigError, match="64k tokens"):
        plan(63_000, ASK, costs, unit="tokens")


def test_workers_share_a_stage():
    assert plan(None, ASK, COSTS, workers=2).cost < plan(None, ASK, COSTS).cost
    assert plan(45.0, ASK, COSTS, workers=2).trials >= plan(45.0, ASK, COSTS).trials


@st.composite
def searches(draw):
    """Settings and costs of some search, and how far it is."""
    rungs = tuple(sorted(draw(st.sets(st.integers(1, 200), min_size=1, max_size=4))))
    whole = draw(st.sampled_from([0, 300]))
    ask = Ask(
        rungs, draw(st.integers(0, 40)), draw(st.integers(2, 5)), draw(st.integers(1, 3)),
        draw(st.integers(0, 3)), whole,
    )  # fmt: skip
    amount = st.floats(0.01, 3.0)
    widths = draw(st.sets(st.sampled_from([1, 2, 4, 8]), min_size=1))
    costs = Costs(
        step={width: draw(amount) for width in widths},
        evaluate={width: draw(amount) for width in widths},
        keep=draw(st.floats(0.0, 1.0)),
        close=draw(st.floats(0.0, 20.0)),
    )
    through = draw(st.lists(st.integers(1, 20), max_size=len(ask.stages)))
    done = Done(
        used=draw(st.floats(0.0, 50.0)),
        through=tuple(sorted(through, reverse=True)),
        running=tuple((0, draw(st.integers(0, rungs[0]))) for _ in range(draw(st.integers(0, 8)))),
    )
    return ask, costs, done, draw(st.integers(1, 3))


def attempt(limit, ask, costs, done, workers):
    try:
        return plan(limit, ask, costs, done, workers=workers)
    except ConfigError:
        return None


@given(searches(), st.floats(1.0, 3000.0), st.floats(0.0, 1000.0))
def test_a_plan_ends_inside_its_budget_and_more_budget_is_never_fewer_trials(search, limit, more):
    ask, costs, done, workers = search
    found = attempt(limit, ask, costs, done, workers)
    richer = attempt(limit + more, ask, costs, done, workers)
    if found is None:
        return
    assert richer is not None
    assert richer.trials >= found.trials
    assert found.trials <= max(ask.trials or budget.MOST, *done.through, 1)
    if found.fits:
        assert done.used + found.cost <= limit * (1 + 1e-9)
        assert found.enter[-1] >= 1  # the winner is trained whole
    assert list(found.enter) == sorted(found.enter, reverse=True)


@given(searches(), st.floats(10.0, 3000.0))
def test_a_sweep_that_follows_its_plans_ends_in_time_with_its_winner(search, limit):
    """Trials go through each stage in the cheapest populations, planned anew after each."""
    ask, costs, _, _ = search
    ask = dataclasses.replace(ask, trials=ask.trials or 12)
    found = attempt(limit, ask, costs, Done(), 1)
    if found is None:
        return

    @functools.cache
    def cheapest(count: int, length: int) -> tuple[float, int]:
        """(cost of a stage of so many trials, width of its first population)"""
        return min(
            (length * costs.step[width] + costs.evaluate[width]
             + (cheapest(count - width, length)[0] if count > width else 0.0), width)
            for width in costs.step
        )  # fmt: skip

    used, through = 0.0, [0] * len(ask.stages)
    for stage, length in enumerate(ask.stages):
        while through[stage] < found.enter[stage]:
            left = found.enter[stage] - through[stage]
            width = cheapest(left, length)[1]
            used += length * costs.step[width] + costs.evaluate[width]
            used += min(width, left) * costs.keep
            through[stage] += min(width, left)
            found = plan(limit, ask, costs, Done(used * (1 - 1e-9), tuple(through)))
            assert found.fits
    assert through[-1] >= 1
    assert used + costs.close <= limit * (1 + 1e-6)


def test_measurements_become_costs_with_some_caution():
    seen = Measured(close=2.0)
    assert seen.costs() is None
    seen.stepped(8, 2.0)
    seen.stepped(8, 6.0, count=3)
    seen.evaluated(8, 1.0)
    seen.kept(0.5)
    costs = seen.costs()
    assert costs is not None
    assert costs.step == pytest.approx({8: 1.05 * 2.0})
    assert costs.evaluate == pytest.approx({8: 1.05})
    assert costs.close == pytest.approx(1.05 * 3.5)
    for _ in range(100):  # it has become twice as fast
        seen.stepped(8, 1.0)
    faster = seen.costs()
    assert faster is not None
    assert faster.step[8] == pytest.approx(1.05)


def test_what_ending_a_trial_takes():
    assert budget.finish(COSTS, 48) == pytest.approx(48 * 0.5 + 0.2 + 0.1 + 5.0)
