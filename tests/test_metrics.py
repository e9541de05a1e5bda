"""metrics.jsonl and its resume, byte by byte; TensorBoard and W&B; tokens per second."""

import contextlib
import importlib
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtune.errors import ConfigError, StorageError
from jaxtune.metrics import Meter, Writer, read_metrics
from tests.faults.storage import file_size_limit


def writer(workdir: Path, resume_step: int = 0, **options: Any) -> Writer:
    return Writer(
        workdir, **{"tensorboard": False, "wandb": "", "resume_step": resume_step, **options}
    )


def write_steps(workdir: Path, first: int, last: int, resume_step: int = 0) -> None:
    out = writer(workdir, resume_step)
    for step in range(first, last + 1):
        out.write(step, "train", {"loss": 1.0 / step, "tokens": 512 * step})
    out.close()


def test_a_line_is_one_json_object_on_the_disk_at_once(tmp_path: Path):
    out = writer(tmp_path / "new")
    out.write(10, "train", {"loss": 2.5, "tokens": 512})
    out.write(10, "eval", {"loss": 3.0})
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == (
        '{"step": 10, "split": "train", "loss": 2.5, "tokens": 512}\n'
        '{"step": 10, "split": "eval", "loss": 3.0}\n'
    )
    out.close()


def test_what_is_not_finite_is_valid_json_and_comes_back(tmp_path: Path):
    out = writer(tmp_path)
    out.write(1, "train", {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "lr": 0.5})
    out.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 1, "split": "train", "loss": null, "grad_norm": null, "low": null, "lr": 0.5, '
        '"non_finite": {"loss": "nan", "grad_norm": "inf", "low": "-inf"}}\n'
    )
    [row] = read_metrics(tmp_path)
    assert math.isnan(row.pop("loss"))
    assert row == {
        "step": 1,
        "split": "train",
        "grad_norm": math.inf,
        "low": -math.inf,
        "lr": 0.5,
    }


def test_floats_come_back_bit_for_bit(tmp_path: Path):
    values = {"a": 0.1 + 0.2, "b": 1e-308, "c": 2.0**53 + 2}
    out = writer(tmp_path)
    out.write(1, "train", values)
    out.close()
    assert read_metrics(tmp_path) == [{"step": 1, "split": "train", **values}]


def test_no_file_is_no_metrics(tmp_path: Path):
    assert read_metrics(tmp_path) == []


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path):
    write_steps(tmp_path / "whole", 1, 12)
    write_steps(tmp_path / "cut", 1, 9)
    write_steps(tmp_path / "cut", 6, 12, resume_step=5)
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert cut == whole


def test_a_run_that_starts_anew_starts_the_file_anew(tmp_path: Path):
    out = writer(tmp_path)
    out.write(0, "eval", {"loss": 4.0})
    out.close()
    write_steps(tmp_path, 1, 3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_line_torn_anywhere_costs_that_line_only(tmp_path: Path, data: st.DataObject):
    write_steps(tmp_path, 1, 6)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    kept = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:kept])
    whole = content[:kept].count(b"\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, whole + 1))
    resume = data.draw(st.integers(1, 7))
    write_steps(tmp_path, resume + 1, 8, resume_step=resume)
    expected = [*range(1, min(whole, resume) + 1), *range(resume + 1, 9)]
    assert [row["step"] for row in read_metrics(tmp_path)] == expected
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "x"}', "null", "\0\0"])
def test_damage_elsewhere_is_named_by_line(tmp_path: Path, line: str):
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, f"{line}\n", *rest]))
    before = path.read_bytes()
    for action in (lambda: read_metrics(tmp_path), lambda: writer(tmp_path, resume_step=2)):
        with pytest.raises(StorageError, match=r"metrics\.jsonl:2 is not a line of metrics"):
            action()
    assert path.read_bytes() == before


def test_a_full_disk_is_a_storage_error_and_keeps_the_whole_lines(tmp_path: Path):
    out = writer(tmp_path)
    out.write(1, "train", {"loss": 1.0})
    out.write(2, "train", {"loss": 1.0})
    with file_size_limit(100), pytest.raises(StorageError, match="metrics of step 3") as caught:
        out.write(3, "train", {"loss": 1.0})
    assert caught.value.exit_code == 74
    with file_size_limit(100):
        out.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_an_unwritable_workdir_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", Path("/proc/run")):
        with pytest.raises(StorageError, match="cannot be written"):
            writer(workdir)


# --- other sinks ------------------------------------------------------------------------------


def events(folder: Path) -> list[Any]:
    """TensorBoard's records: length, its checksum, the event, its checksum."""
    event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):
            size = int.from_bytes(data[start : start + 8], "little")
            event = event_pb2.Event()
            event.ParseFromString(data[start + 12 : start + 12 + size])
            found.append(event)
            start += 16 + size
    return found


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) that TensorBoard shows: a session start hides the steps from it on."""
    shown: list[tuple[str, int, float]] = []
    for event in events(folder):
        if event.session_log.status == 1:
            shown = [scalar for scalar in shown if scalar[1] < event.step]
        shown += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return shown


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path: Path):
    for resume_step, last in ((0, 5), (3, 6)):
        out = writer(tmp_path, resume_step, tensorboard=True)
        for step in range(resume_step + 1, last + 1):
            out.write(step, "train", {"loss": 2.0 * step + resume_step})
        out.close()
        # tensorboardX names files by the second, and these two are of the same one.
        [path] = (tmp_path / "tensorboard").glob("events*")
        path.rename(path.with_name(f"{resume_step}"))
    assert scalars(tmp_path / "tensorboard") == [
        *(("train/loss", step, 2.0 * step) for step in (1, 2, 3)),
        *(("train/loss", step, 2.0 * step + 3) for step in (4, 5, 6)),
    ]


def test_tensorboard_is_off_when_not_asked_for(tmp_path: Path):
    write_steps(tmp_path, 1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_that_is_missing_stops_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.wandb is 'runs' and wandb is not") as caught:
        writer(tmp_path / "new", wandb="runs")
    assert "pip install 'jaxtune[wandb]'" in caught.value.fix
    assert not (tmp_path / "new").exists()


def test_wandb_gets_every_value_and_goes_on_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[dict[str, Any]] = []
    calls: list[Any] = []
    run = types.SimpleNamespace(
        define_metric=lambda name, step_metric: calls.append(("define", name, step_metric)),
        log=lambda values: calls.append(("log", values)),
        finish=lambda: calls.append(("finish",)),
    )
    fake = types.SimpleNamespace(
        init=lambda **options: (started.append(options), run)[1], __spec__=object()
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]  # not a real module
    for resume_step in (0, 3, 0):
        out = writer(tmp_path, resume_step, wandb="runs")
        out.write(resume_step + 1, "eval", {"loss": 0.5})
        out.close()
    assert calls[:3] == [
        ("define", "*", "step"),
        ("log", {"step": 1, "eval/loss": 0.5}),
        ("finish",),
    ]
    first, resumed, anew = (options.pop("id") for options in started)
    assert first == resumed != anew
    assert started == [{"project": "runs", "dir": str(tmp_path), "resume": "allow"}] * 3


# --- tokens per second ------------------------------------------------------------------------


def test_excluded_seconds_do_not_count_and_windows_are_not_averaged():
    now = 100.0
    meter = Meter(clock=lambda: now)
    with meter.excluded():
        now += 50.0  # compilation
    meter.add(100)
    now += 1.0
    with meter.excluded():
        now += 7.0  # evaluation
    meter.add(100)
    now += 1.0
    assert meter.window() == 100.0  # 200 tokens in 2 seconds
    meter.add(100)
    now += 8.0
    assert meter.overall() == 30.0  # 300 tokens in 10 seconds; the mean of 100 and 12.5 is wrong
    assert meter.window() == 12.5
    assert meter.window() == 0.0
    assert meter.overall() == 30.0


def test_an_interrupted_exclusion_counts_from_its_end():
    now = 0.0
    meter = Meter(clock=lambda: now)
    with contextlib.suppress(KeyboardInterrupt), meter.excluded():
        now += 5.0
        raise KeyboardInterrupt
    meter.add(10)
    now += 2.0
    assert meter.window() == 5.0
