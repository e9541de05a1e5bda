"""sweep.html and its pictures: what is claimed and escaped, what is left when writing fails."""

import dataclasses
import errno
import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxtune.config import VARIES
from jaxtune.errors import StorageError
from jaxtune.sweep import canvas, figures, findings, landscape, report, wording
from jaxtune.sweep.records import Record, Result, Summary
from tests import synthetic_sweep

SWEEP = synthetic_sweep.sweep(repeats=0)
NAMES = ["baseline", "bought", "importances", "learning_curves", "lr_map", "parallel", "rungs"]


@pytest.fixture(scope="module")
def summary() -> Summary:
    return synthetic_sweep.sweep()


class Page(HTMLParser):
    """The table of trials, texts, scripts and every address of a page; fails on wrong nesting."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.text, self.rows, self.ids = "", [], []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [values[n] for n in ("src", "href", "xlink:href") if n in values]
        assert not any(name.startswith("on") for name in values)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] += data


def with_repeats(summary: Summary, winner: list[float], defaults: list[float], seeds: bool = True):
    """The summary with repeats of these losses; seeds from 0 on both sides, or no seeds."""
    records = [r for r in summary.records if r.role != "repeat"]
    for side, losses in (("winner", winner), ("defaults", defaults)):
        for seed, loss in enumerate(losses):
            params: dict[str, Any] = {"train.seed": seed} if seeds else {}
            records.append(
                Record(1000 + len(records), params, "finished", (Result(2, 128, loss, 0, 10, 1.0),),
                       role="repeat", repeats=side)
            )  # fmt: skip
    return dataclasses.replace(summary, records=tuple(records))


def the_gain(summary: Summary) -> findings.Gain:
    gain = findings.gain(summary)
    assert gain is not None
    return gain


def test_a_gain_is_paired_by_seed_and_equals_scipy(summary: Summary):
    ours, theirs = [2.00, 2.02, 2.01], [2.05, 2.08, 2.05]
    gain = the_gain(with_repeats(summary, ours, theirs))
    expected = stats.ttest_rel(theirs, ours).confidence_interval(0.95)
    assert gain.paired
    assert gain.difference == pytest.approx(0.05)
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high))
    assert gain.verdict == "better"
    assert "3 seeds of each, paired by seed" in gain.rule


def test_seeds_that_do_not_pair_are_welch(summary: Summary):
    ours, theirs = [2.00, 2.02, 2.01, 2.03], [2.05, 2.08, 2.05]
    gain = the_gain(with_repeats(summary, ours, theirs, seeds=False))
    expected = stats.ttest_ind(theirs, ours, equal_var=False).confidence_interval(0.95)
    assert not gain.paired
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high))
    assert "4 and 3 seeds, Welch" in gain.rule


@pytest.mark.parametrize(
    ("winner", "defaults", "verdict"),
    [
        ([2.00, 2.01, 2.02], [2.10, 2.11, 2.13], "better"),
        ([2.10, 2.11, 2.13], [2.00, 2.01, 2.02], "worse"),
        ([2.00, 2.05, 2.02], [2.04, 2.02, 2.06], "noise"),
        ([2.0, 2.0], [2.0, 2.0], "noise"),
        ([2.0, 2.0], [2.5, 2.5], "better"),
    ],
)
def test_verdicts(summary: Summary, winner: list[float], defaults: list[float], verdict: str):
    changed = with_repeats(summary, winner, defaults)
    gain = the_gain(changed)
    assert gain.verdict == verdict
    words = {"better": "beats", "worse": "defaults are better", "noise": "within noise"}
    assert words[verdict] in report.headline(changed, gain)


@given(
    st.lists(st.floats(1, 3), min_size=2, max_size=6),
    st.lists(st.floats(1, 3), min_size=2, max_size=6),
    st.booleans(),
)
def test_swapping_sides_mirrors_the_interval(ours: list[float], theirs: list[float], seeds: bool):
    summary = SWEEP
    one = the_gain(with_repeats(summary, ours, theirs, seeds))
    other = the_gain(with_repeats(summary, theirs, ours, seeds))
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=1e-9)
    assert one.low <= one.difference <= one.high


def test_one_run_of_each_is_not_called_a_gain(summary: Summary):
    rung = Result(2, 128, 1.9, 0.5, 10, 1.0)
    winner = findings.winner(summary)
    assert winner is not None
    assert winner.loss is not None
    records = tuple(
        dataclasses.replace(r, status="finished", results=(rung._replace(loss=winner.loss + 0.1),))
        if r.role == "baseline" else r for r in summary.records if r.role != "repeat"
    )  # fmt: skip
    alone = dataclasses.replace(summary, records=records)
    gain = the_gain(alone)
    assert gain.verdict == "unknown"
    assert gain.difference == pytest.approx(0.1)
    assert "is not known" in report.headline(alone, gain)
    assert "two seeds or more" in gain.rule


def test_losses_of_different_rungs_are_not_compared(summary: Summary):
    alone = with_repeats(summary, [], [])
    base = findings.baseline(alone)
    assert base is not None
    assert base.status == "stopped"
    assert findings.gain(alone) is None
    assert report.headline(alone, None).startswith("Trial 13 leads with a held-out loss of")


def test_defaults_that_win_are_not_compared_with_themselves(summary: Summary):
    base = findings.baseline(summary)
    assert base is not None
    changed = dataclasses.replace(summary, winner=base.number)
    assert findings.gain(changed) is None
    assert report.headline(changed, None) == "The defaults win: no other trial did better"


def test_places(summary: Summary):
    ranked = findings.placed(summary)
    assert len(ranked) == 16
    assert ranked[0] is findings.winner(summary)
    assert ranked[0].status == "finished"
    assert ranked[-1].status == "diverged"
    rungs = [len(record.results) for record in ranked]
    assert rungs == sorted(rungs, reverse=True)
    for rung in (1, 2):
        losses = [r.loss for r in ranked if len(r.results) == rung]
        assert losses == sorted(losses, key=lambda loss: loss or math.inf)


def test_a_winner_that_was_decided_and_trained_on_everything(summary: Summary):
    second = findings.placed(summary)[1]
    final = Record(99, second.params, "finished", (Result(2, 512, 1.5, 0.6, 7000, 3.0),),
                   role="final", of=second.number)  # fmt: skip
    changed = dataclasses.replace(summary, records=(*summary.records, final), winner=99)
    assert findings.winner(changed) == second
    assert findings.final(changed) == final
    assert [p.name for p in findings.phases(changed)][-2:] == [
        "finalists on everything", "repeated seeds"
    ]  # fmt: skip


def test_cost_counts_every_token_once(summary: Summary):
    cost = findings.cost(summary)
    assert cost.tokens == summary.tokens
    assert cost.tokens == sum(record.tokens for record in summary.records)
    assert cost.full_tokens == 16 * 128_000
    assert {p.name: p.trials for p in cost.phases} == {
        "rung 1": 16, "rung 2": 3, "rung 3": 1, "repeated seeds": 6
    }  # fmt: skip
    assert cost.full_seconds == pytest.approx(16 * 128_000 * cost.seconds / cost.tokens)


def test_importance_finds_what_the_loss_depends_on():
    found = findings.importances(synthetic_sweep.sweep(40))
    assert next(iter(found.shares)) == "optim.lr"
    assert found.shares["optim.lr"] > 0.6
    assert sum(found.shares.values()) == pytest.approx(1)


def test_importance_of_a_few_trials_is_not_told():
    found = findings.importances(synthetic_sweep.sweep(6))
    assert found.shares == {}
    assert re.fullmatch(r"too few trials: \d with a score at the first rung, 8 are needed",
                        found.why)  # fmt: skip


def test_importance_where_every_loss_is_the_same(summary: Summary):
    records = tuple(
        dataclasses.replace(r, results=tuple(x._replace(loss=2.0) for x in r.results))
        for r in summary.records
    )
    found = findings.importances(dataclasses.replace(summary, records=records))
    assert found.why == "every trial has the same loss at the first rung"


def test_importance_takes_tuples_and_values_outside_the_space(summary: Summary):
    space = {"optim.lr": ("log", 1e-4, 1e-3), "lora.target_modules": ("choice", "all", ("q", "v"))}
    records = tuple(
        dataclasses.replace(
            r, params={"optim.lr": r.params["optim.lr"],
                       "lora.target_modules": [("q", "v"), "all", ("k",)][i % 3]},
        )
        for i, r in enumerate(summary.records)
    )  # fmt: skip
    changed = dataclasses.replace(summary, space=space, records=records)
    assert findings.importances(changed).shares.keys() == space.keys()
    texts = _texts(landscape.parallel(changed))
    assert {"q, v", "k", "all"} <= texts


def _texts(figure) -> set[str]:
    from matplotlib.text import Text

    return {artist.get_text() for artist in figure.findobj(Text)}


def test_curves_wear_their_outcome(summary: Summary):
    from matplotlib.lines import Line2D

    figure = figures.learning_curves(summary)
    colours = {
        line.get_gid(): line.get_color()
        for line in figure.findobj(Line2D)
        if line.get_gid() and np.size(line.get_xdata()) > 1
    }
    expected = {
        canvas.trial_gid(r.number): canvas.BEST
        if r is findings.winner(summary)
        else canvas.OUTCOME[r.status]
        for r in summary.records
        if r.role != "repeat"
    }
    assert colours == expected
    low, high = figure.axes[0].get_ylim()
    assert 1.5 < low < high < 5  # the diverged curve goes up to 30
    assert {"stopped (14)", "diverged (1)", "winner: trial 13", "rung 3"} <= _texts(figure)


def test_a_curve_is_averaged_over_the_same_parts_for_all(summary: Summary):
    from matplotlib.lines import Line2D

    micro, last = summary.micro, summary.rungs[-1]
    curve = (*((p, 2.0) for p in range(1, 65)), *((p, 1.0) for p in range(65, last + 1)))
    record = dataclasses.replace(summary.records[13], curve=curve)
    records = tuple(record if r.number == 13 else r for r in summary.records)
    figure = figures.learning_curves(dataclasses.replace(summary, records=records))
    (line,) = (x for x in figure.findobj(Line2D) if x.get_gid() == canvas.trial_gid(13))
    xs, ys = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert len(xs) <= figures.POINTS
    assert xs[0] == micro
    assert (np.diff(xs) > 0).all()
    assert set(ys[xs < 60 * micro]) == {2.0}
    assert set(ys[xs > 75 * micro]) == {1.0}


def test_the_map_is_of_rate_and_rank_or_of_what_matters_most(summary: Summary):
    found = findings.importances(summary)
    (axes,) = landscape.lr_map(summary, found).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optim.lr (log scale)", "lora.r")
    fewer = dataclasses.replace(summary, space={k: v for k, v in summary.space.items()
                                                if k != "lora.r"})  # fmt: skip
    (axes,) = landscape.lr_map(fewer, found).axes
    assert axes.get_ylabel() == "lora.dropout"
    one = dataclasses.replace(summary, space={"optim.schedule": summary.space["optim.schedule"]})
    (axes,) = landscape.lr_map(one, findings.importances(one)).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "optim.schedule", "held-out loss at rung 1, nats a token"
    )  # fmt: skip


@pytest.mark.parametrize(("task", "unit"), [("classify", "nats a row"), ("sft", "nats a token")])
def test_losses_have_the_unit_of_their_task(summary: Summary, tmp_path: Path, task, unit):
    changed = with_repeats(dataclasses.replace(summary, task=task), [2.0, 2.1], [2.2, 2.4])
    found = findings.importances(changed)
    one = dataclasses.replace(changed, space={"optim.lr": summary.space["optim.lr"]})
    drawn = report.draw(changed, found)
    drawn["lr_map"] = landscape.lr_map(one, findings.Importances({}, 0, 0, ""))
    texts = {name: " ".join(_texts(drawn[name])) for name in drawn}
    named = [name for name in texts if unit in texts[name]]
    assert named == ["baseline", "lr_map", "learning_curves", "rungs"]
    page = Page(report.compose(changed, found, dict.fromkeys(NAMES, ""), tmp_path)).text
    assert f"2.0500 against 2.3000 {unit}: " in page
    assert ("nats a token" in f"{page}{texts}") == (task != "classify")


def test_no_axis_of_losses_runs_below_zero(summary: Summary):
    wide = the_gain(with_repeats(summary, [0.12, 0.31], [0.35, 0.5]))
    assert findings.interval(wide.winner)[1] < 0
    (axes,) = figures.baseline(wide, "nats a row").axes
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > findings.interval(wide.winner)[2]
    near = the_gain(with_repeats(summary, [2.0, 2.01], [2.1, 2.12]))
    (axes,) = figures.baseline(near, "nats a token").axes
    assert 1.5 < axes.get_xlim()[0] < 2.0


@pytest.mark.parametrize(
    "more", [{}, synthetic_sweep.MORE, dict.fromkeys(VARIES, ("choice", 1, 2))]
)
def test_names_of_the_parallel_axes_keep_apart(summary: Summary, more):
    wide = synthetic_sweep.wider(summary, more)
    (axes,) = landscape.parallel(wide).axes
    labels = axes.get_xticklabels()
    assert [label.get_text() for label in labels] == [
        *(key.split(".")[1] for key in wide.space), "place"
    ]  # fmt: skip
    boxes = []
    for label in labels:
        angle = math.radians(label.get_rotation())
        label.set_rotation(0)
        boxes.append(label.get_window_extent())
    for (one, other), (tick, following) in zip(
        itertools.pairwise(boxes), itertools.pairwise(axes.get_xticks()), strict=True
    ):
        apart = np.diff(axes.transData.transform([(tick, 0), (following, 0)])[:, 0])[0]
        # Slanted lines of text lie side by side, level ones one after the other.
        level = (one.width + other.width) / 2 < apart
        assert level if angle == 0 else apart * math.sin(angle) > max(one.height, other.height)


def test_why_says_a_thing_once(summary: Summary, tmp_path: Path):
    told = [
        ("baseline", "defaults; place 3 of 16 at rung 1", "defaults; place 3 of 16 at rung 1"),
        ("baseline", "", "defaults"),
        ("prior", "prior, lr by width 0.0005", "prior, lr by width 0.0005"),
        ("prior", "won an earlier sweep", "prior; won an earlier sweep"),
        ("search", "loss not finite", "loss not finite"),
    ]
    records = tuple(
        dataclasses.replace(summary.records[number], role=role, why=why)
        for number, (role, why, _) in enumerate(told)
    )
    few = dataclasses.replace(summary, records=records)
    found = findings.Importances({}, 0, 0, "")
    rows = Page(report.compose(few, found, dict.fromkeys(NAMES, ""), tmp_path)).rows
    last = {row[0]: row[-1] for row in rows[-len(told) :]}
    assert last == {str(number): shown for number, (_, _, shown) in enumerate(told)}


def test_data_are_named_by_their_paths():
    entries = ({"path": "rows/a.tsv", "weight": 2.0, "columns": {"text": "yo"}}, "b.jsonl")
    assert wording.sources(entries) == "rows/a.tsv, b.jsonl"
    assert wording.sources("rows.jsonl") == "rows.jsonl"


@pytest.mark.parametrize("trials", [1, 4, 40])
def test_every_picture_of_every_size(trials: int):
    summary = synthetic_sweep.sweep(trials, seed=trials)
    drawn = report.draw(summary, findings.importances(summary))
    assert sorted(drawn) == NAMES


def test_pictures_of_a_sweep_that_has_just_begun(summary: Summary, tmp_path: Path):
    empty = dataclasses.replace(summary, records=(), tokens=0, notes=())
    files = report.write(empty, report.pictures(empty), tmp_path)
    assert len(files) == 8
    assert "No trial has a score" in Page(files[0].read_text()).text


def test_all_diverged(summary: Summary, tmp_path: Path):
    records = tuple(
        dataclasses.replace(r, status="diverged", results=(Result(0, 8, math.nan, 0, 9, 1.0),))
        for r in summary.records
        if r.role != "repeat"
    )
    lost = dataclasses.replace(summary, records=records)
    found = findings.importances(lost)
    assert sorted(report.draw(lost, found)) == NAMES
    parsed = Page(report.compose(lost, found, dict.fromkeys(NAMES, ""), tmp_path))
    assert "No trial has a score; 16 trials diverged" in parsed.text
    assert "not finite" in parsed.text


def test_the_page_stands_alone(summary: Summary, tmp_path: Path):
    (tmp_path / "best.py").touch()
    page, *pictures = report.write(summary, report.pictures(summary), tmp_path)
    text = page.read_text()
    parsed = Page(text)
    assert page == tmp_path / "sweep.html"
    assert sorted(p.stem for p in pictures) == NAMES
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert all(address.startswith("#") for address in parsed.addresses)
    assert parsed.tags.isdisjoint({"link", "img", "iframe", "base", "object"})
    assert "url(http" not in text
    assert "@import" not in text
    assert "default-src &#x27;none&#x27;" in text
    assert len(parsed.ids) == len(set(parsed.ids))
    assert text.count("<svg") == 7
    assert [*tmp_path.rglob("*.partial")] == []
    assert "Trial 13 won the search, yet over several seeds the defaults are better" in parsed.text
    assert f"jaxtune train --config={tmp_path}/best.py" in parsed.text
    assert "jaxtune eval" not in parsed.text  # there is no best/
    assert all(note in parsed.text for note in summary.notes)


def test_the_table_has_every_trial_with_its_losses(summary: Summary, tmp_path: Path):
    found = findings.importances(summary)
    rows = Page(report.compose(summary, found, dict.fromkeys(NAMES, ""), tmp_path)).rows
    start = next(i for i, row in enumerate(rows) if row[:3] == ["trial", "place", "outcome"])
    head, body = rows[start], rows[start + 1 :]
    assert len(body) == len(summary.records)
    assert head[3:10] == [*summary.space, "loss, rung 1", "loss, rung 2", "loss, rung 3"]
    winner = summary.records[13]
    first = dict(zip(head, body[0], strict=True))
    assert first["trial"] == "13"
    assert first["optim.lr"] == wording.value(winner.params["optim.lr"])
    assert [first[f"loss, rung {n}"] for n in (1, 2, 3)] == [
        f"{result.loss:.4f}" for result in winner.results
    ]
    lost = next(row for row in body if row[2] == "diverged")
    assert lost[-1] == "loss not finite"
    assert body[-1][-1] == "repeat of the defaults"


def test_commands_are_of_what_is_there(summary: Summary, tmp_path: Path):
    folder = tmp_path / "my sweep"
    for name in ("best", "export"):
        (folder / name).mkdir(parents=True)
    for name in ("best.py", "sweep.db"):
        (folder / name).touch()
    found = findings.Importances({}, 0, 0, "")
    text = Page(report.compose(summary, found, dict.fromkeys(NAMES, ""), folder)).text
    at = f"'{folder}"
    for line in (
        f"jaxtune train --config={at}/best.py' --workdir={at}/again'",
        f"jaxtune eval --workdir={at}/best'",
        f"jaxtune verify {at}/export' {at}/best'",
        f"optuna-dashboard 'sqlite:///{folder}/sweep.db'",
    ):
        assert line in text
    other = dataclasses.replace(summary, task="classify", space={"optim.lr": ("log", 1e-5, 1e-3)})
    text = Page(report.compose(other, found, dict.fromkeys(NAMES, ""), folder)).text
    assert "jaxtune generate" not in text  # a classifier writes no text
    assert "--format=peft" not in text  # and no adapter was searched


def test_programs_are_told_only_where_they_were_counted(summary: Summary, tmp_path: Path):
    found = findings.Importances({}, 0, 0, "")
    counted = [0, None]
    texts = [
        Page(report.compose(dataclasses.replace(summary, programs_after_first_rung=n), found,
                            dict.fromkeys(NAMES, ""), tmp_path)).text
        for n in counted
    ]  # fmt: skip
    assert ["programs after the first rung" in text for text in texts] == [True, False]


EVIL = '<script>alert(1)</script> & "quotes" $x_1$ \' </style> <!--'


def test_what_people_write_is_escaped(summary: Summary, tmp_path: Path):
    key = f"{EVIL}.key"
    records = tuple(
        dataclasses.replace(r, params=r.params | {key: EVIL}, why=EVIL) for r in summary.records
    )
    evil = dataclasses.replace(
        summary, name=EVIL + "a\udcffb", model=EVIL, data=EVIL, task=EVIL, notes=(EVIL,),
        records=records,
        space=summary.space | {key: ("choice", EVIL, "other")},
    )  # fmt: skip
    folder = tmp_path / "a <b> & 'c'"
    folder.mkdir()
    (folder / "best.py").touch()
    page, *_ = report.write(evil, report.pictures(evil), folder)
    text = page.read_text()
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert text.count("<!--") == 0
    parsed = Page(text)
    assert parsed.text.count(EVIL) > 20
    assert f"{EVIL}a?b" in parsed.text  # a name whose bytes are no text
    assert EVIL in _texts(landscape.parallel(evil))  # $x_1$ is not read as mathematics


def test_the_same_sweep_gives_the_same_picture(summary: Summary):
    first, second = (canvas.svg(figures.rungs(summary), "rungs", {}) for _ in range(2))
    assert first == second


def test_a_full_disk_leaves_the_page_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / report.FILE
    page.write_text("before")

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    summary = synthetic_sweep.sweep(2)
    drawn = report.pictures(summary)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"sweep\.html cannot be written.*No space left"):
        report.write(summary, drawn, tmp_path)
    assert page.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == [report.FILE]


def test_colours_follow_the_scheme_and_have_contrast():
    """Text and marks on paper, light and dark: WCAG 2.2 asks for 4.5 and 3."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(name: str, scheme: int) -> float:
        pair = sorted(luminance(canvas.COLOURS[n][scheme]) for n in (name, "paper"))
        return (pair[1] + 0.05) / (pair[0] + 0.05)

    for scheme in (0, 1):
        assert min(contrast(name, scheme) for name in ("ink", "dim")) >= 4.5
        marks = ("best", "finished", "running", "diverged")
        assert min(contrast(name, scheme) for name in marks) >= 3
    figure = figures.learning_curves(synthetic_sweep.sweep())
    svg = canvas.svg(figure, "curves", {})
    assert "var(--best)" in svg
    assert not any(light in svg for light, _ in canvas.COLOURS.values())


def test_the_page_on_hyperparameters_names_every_key_that_can_vary():
    text = (Path(__file__).parents[1] / "docs" / "hyperparameters.md").read_text()
    listed = {
        f"{group}.{name}"
        for group, names in re.findall(r"^    (optim|lora|train)\.(\w+ .*)$", text, re.M)
        for name in names.split()
    }
    assert listed == set(VARIES)
    for key in VARIES:
        assert f"`{key}`" in text  # and has a line of its own, or shares one
