"""What a sweep shows while it runs: events as lines, a table, sparklines, speed and budget."""

import dataclasses
import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jaxtune.sweep import live, wording
from jaxtune.sweep.records import Record, Result, Summary
from tests import synthetic_sweep


@pytest.fixture
def summary() -> Summary:
    return synthetic_sweep.half_way(synthetic_sweep.sweep())


def changed(summary: Summary, number: int, **values) -> Summary:
    records = [
        dataclasses.replace(r, **values) if r.number == number else r for r in summary.records
    ]
    return dataclasses.replace(summary, records=tuple(records))


def screen(summary: Summary, width: int = 150, **options) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(live.render(summary, width=width, **options))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_sparkline():
    assert live.sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert live.sparkline([1.0, 1.0]) == "▁▁"
    assert live.sparkline([]) == ""
    assert live.sparkline([2.0, math.nan, 1.0]) == "█!▁"
    assert live.sparkline([3, 1, 2, 2], width=2) == "▁▁"  # means of equal parts: 2 and 2
    assert live.sparkline([2, 1], blocks=live.PLAIN_BLOCKS) == "#_"


@given(st.lists(st.floats(), max_size=60))
def test_a_sparkline_never_fails_and_never_is_too_long(losses: list[float]):
    assert len(live.sparkline(losses)) == min(len(losses), live.SPARK)


def test_rung_done_and_new_best_are_a_line_each(summary: Summary):
    first = summary.records[0]
    result = Result(1, 32, 0.5, 0.5, 24_000, 2.4)
    now = changed(summary, 0, results=(*first.results, result))
    done, best = live.events(summary, now)
    assert done == (
        "trial 0 rung 2/3: loss 0.5000  "
        "optim.lr=2e-4 lora.r=16 optim.schedule=cosine lora.dropout=0"
    )
    assert best.startswith("best so far: 0.5000 of trial 0 after rung 2 of 3: optim.lr=2e-4")
    assert "59 min 00 s left" in best


def test_an_end_is_told_once_with_its_reason(summary: Summary):
    now = changed(summary, 1, status="stopped", why="dominated from row 40 on")
    (line,) = live.events(summary, now)
    assert line.startswith("trial 1 stopped: dominated from row 40 on  optim.lr=")
    assert live.events(now, now) == []


def test_repeats_and_finals_are_named(summary: Summary):
    result = Result(2, 128, 2.5, 0.5, 24_000, 2.4)
    more = (
        Record(90, {"train.seed": 1001}, "finished", (result,), role="repeat", repeats="winner"),
        Record(91, {}, "finished", (result,), role="final", of=3),
    )
    now = dataclasses.replace(summary, records=(*summary.records, *more))
    repeat, final = (line.strip() for line in live.events(summary, now))
    assert repeat == "trial 90 (winner, seed 1001) rung 3/3: loss 2.5000"
    assert final == "trial 91 (trial 3 on everything) rung 3/3: loss 2.5000"


def test_decisions_are_told_once(summary: Summary):
    now = dataclasses.replace(summary, notes=(*summary.notes, "rung 3 has room for 2 trials"))
    assert live.events(summary, now) == ["rung 3 has room for 2 trials"]


def test_a_sweep_that_goes_on_does_not_tell_everything_again(summary: Summary):
    (line,) = live.events(None, summary)
    assert line.startswith("going on after 3 rungs done; best so far: ")
    assert live.events(None, dataclasses.replace(summary, records=())) == []


def test_into_a_pipe_there_are_lines(summary: Summary, capsys: pytest.CaptureFixture[str]):
    newer = dataclasses.replace(summary.records[2], status="diverged", why="loss not finite")
    with live.table() as show:
        show(summary)
        show(summary, [newer])
        show(summary, [newer])
    going_on, ended = capsys.readouterr().err.splitlines()
    assert going_on.startswith("going on after 3 rungs")
    assert ended.startswith("trial 2 diverged: loss not finite")


def test_a_quiet_minute_is_broken_by_how_things_stand(
    summary: Summary, capsys: pytest.CaptureFixture[str]
):
    begun = dataclasses.replace(summary, records=())
    with live.table() as show:
        for seconds, tokens in ((0.0, 0), (59.0, 5900), (60.0, 6000), (119.0, 11_900)):
            show(dataclasses.replace(begun, seconds=seconds, tokens=tokens))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no trials yet · 100 tokens/s · 6.00k tokens · 1 min 00 s used")


def test_the_table_has_the_running_trials(summary: Summary):
    text = screen(summary, rate=5400.0)
    head, *rows = text.splitlines()
    assert head.split() == ["trial", "lr", "r", "schedule", "dropout", "rung", "done", "training",
                            "held", "out", "curve"]  # fmt: skip
    running = [r for r in summary.records if r.status == "running"]
    assert len(running) == 3
    at = live.sparkline([loss for _, loss in running[0].curve])
    zero = next(row for row in rows if row.split()[:1] == ["0"])
    assert zero.split()[1:7] == ["2e-4", "16", "cosine", "0", "2/3", "9%"]
    assert zero.rstrip().endswith(at)
    assert "3 running" in text
    assert "13 waiting" in text
    assert "5.40k tokens/s" in text
    assert "1 min 00 s used, 59 min 00 s left" in text
    assert "best so far: " in text


@pytest.mark.parametrize("width", [150, 110, 90, 70])
def test_values_are_whole_however_many_keys_there_are(summary: Summary, width: int):
    wide = synthetic_sweep.wider(summary, synthetic_sweep.MORE)
    text = screen(wide, width)
    head, *rows = text.splitlines()
    assert max(map(len, text.splitlines())) <= width
    dropped = text.partition("no room for ")[2].partition("\n")[0].split(", ")
    for record in wide.records[:3]:
        row = next(row for row in rows if row.split()[:1] == [str(record.number)])
        kept = [wording.value(v) for k, v in record.params.items() if k not in dropped]
        assert all(value in row for value in kept)
        assert "…" not in row
        assert wording.loss(record.loss) in row
    assert ("curve" in head, "training" in head, "…" in head) == {
        150: (True, True, False),
        110: (False, True, False),
        90: (False, False, True),
        70: (False, False, True),
    }[width]
    assert dropped == (["lora.target_modules"] if width == 70 else [""])


def test_a_long_list_is_cut_so_that_numbers_stay(summary: Summary):
    names = tuple(f"{name}_proj" for name in "qkvo")
    text = screen(changed(summary, 0, params=summary.records[0].params | {"lora.r": names}))
    assert "q_proj, k_proj, v_proj,…" in text
    assert wording.value(names) not in text.partition("best so far")[0]


def test_repeats_in_the_table_say_of_whom_they_are(summary: Summary):
    params = summary.records[0].params
    more = (
        Record(90, params, "running", role="repeat", repeats="winner"),
        Record(91, params, "running", role="repeat", repeats="defaults"),
        Record(92, params, "running", role="final", of=3),
    )
    text = screen(dataclasses.replace(summary, records=(*summary.records, *more)))
    for name in ("90, winner again", "91, defaults again", "92, trial 3 again"):
        assert re.search(rf"{name} +2e-4 +16 +cosine", text)


def test_keys_that_end_alike_are_told_in_full():
    keys = ["optim.lr", "head.lr", "lora.r"]
    assert wording.heads(keys) == {"optim.lr": "optim.lr", "head.lr": "head.lr", "lora.r": "r"}


def test_a_table_keeps_to_the_screen(summary: Summary):
    text = screen(summary, room=2)
    assert "and 1 more" in text
    assert sum(live.sparkline([y for _, y in r.curve]) in text for r in summary.records[:3]) >= 2


def test_markup_of_a_value_is_text(summary: Summary):
    params = summary.records[0].params | {"optim.schedule": "[red]x[/red] $y$"}
    assert "[red]x[/red] $y$" in screen(changed(summary, 0, params=params), width=200)


def test_no_trials_yet(summary: Summary):
    text = screen(dataclasses.replace(summary, records=(), budget_tokens=300_000))
    assert "no trials yet" in text
    assert "200k left" in text
    assert "best so far: none yet" in text


def test_tokens_a_second_are_of_the_last_minute(summary: Summary):
    rate = live.Rate()
    at = [(0.0, 0), (10.0, 100), (70.0, 6100), (80.0, 7100)]
    seen = [rate(dataclasses.replace(summary, seconds=s, tokens=t)) for s, t in at]
    assert seen == [0.0, 10.0, 100.0, 100.0]


def test_progress_is_of_the_furthest_that_is_known():
    record = Record(0, {}, "running", (Result(0, 8, 1.0, 0.0, 1, 1.0),))
    assert live.position(record) == 8
    assert live.position(dataclasses.replace(record, curve=((8, 1.0), (11, 0.9)))) == 11


@pytest.mark.parametrize(
    ("value", "text"),
    [(3e-4, "3e-4"), (0.00031623, "3.16e-4"), (0.05, "0.05"), (16, "16"), (0.0, "0"),
     (True, "True"), (("q", "v"), "q, v"), ((), "all"), (1.0, "1"), (-2e-5, "-2e-5"),
     (1e-5, "1e-5"), (20000.0, "2e4"), (math.inf, "inf"), ("cosine", "cosine"), (None, "None")],
)  # fmt: skip
def test_values(value, text):
    assert wording.value(value) == text


@pytest.mark.parametrize(
    ("of", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (12345, "12.3k"), (999_600, "1.00M"),
     (99_970, "100k"), (1_234_567, "1.23M"), (2.5e9, "2.50G")],
)  # fmt: skip
def test_amounts(of, text):
    assert wording.amount(of) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"),
     (3599.7, "1 h 00 min"), (7500, "2 h 05 min"), (86400, "24 h 00 min"), (4 * 86400, "4 d 00 h")],
)  # fmt: skip
def test_durations(seconds, text):
    assert wording.duration(seconds) == text


def test_ordinals():
    assert [wording.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 111)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "111th"
    ]  # fmt: skip
