"""The loop, run whole: it learns, and whatever kills it, the next start goes on bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxtune import config, metrics
from jaxtune.errors import ConfigError, Failure, NumericsError
from jaxtune.train import fit
from tests import tiny


def settings(inputs: Path, **changes) -> config.Config:
    values = config.Config().to_dict()
    values["model"] |= {
        "path": str(inputs / "base"), "dtype": "float32", "param_dtype": "float32", "remat": "none",
    }  # fmt: skip
    values["lora"] |= {"r": 4, "dropout": 0.1}
    values["data"] |= {"train": str(inputs / "rows.jsonl"), "max_length": 64, "eval_fraction": 0.2}
    values["train"] |= {"steps": 12, "batch_size": 8, "log_every": 4, "tensorboard": False}
    values["optim"] |= {"lr": 1e-2}
    values["checkpoint"] |= {"every": 3, "keep": 3}
    values["eval"] |= {"every": 6}
    for key, value in changes.items():
        group, name = key.split("__")
        values[group][name] = value
    return config.freeze(values)


def numbers(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key != "tokens_per_second"}
        for row in metrics.read_metrics(workdir)
    ]


def weights(workdir: Path, step: int) -> dict[str, str]:
    """{array: digest} of a checkpoint's whole state, optimizer included."""
    manifest = json.loads((workdir / "checkpoints" / str(step) / "jaxtune.json").read_text())
    return {name: about["digest"] for name, about in manifest["arrays"].items()}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """A run nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    fit(settings(inputs), workdir)
    return workdir


def test_a_run_learns_and_leaves_what_the_design_says(whole):
    result = json.loads((whole / "result.json").read_text())
    assert result["steps"] == 12
    assert result["loss_after"] < result["loss_before"] - 0.05
    assert result["best_loss"] == min(result["loss_before"], result["loss_after"])
    assert [row["step"] for row in numbers(whole) if row["split"] == "train"] == [4, 8, 12]
    assert [row["step"] for row in numbers(whole) if row["split"] == "eval"] == [0, 6, 12]
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["12", "6", "9"]
    assert config.freeze(json.loads((whole / "config.json").read_text())).lora.r == 4


def _command(inputs: Path, workdir: Path) -> list[str]:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.test_train import settings\n"
        "from jaxtune.train import fit\n"
        "from jaxtune.errors import Failure\n"
        "try:\n"
        "    fit(settings(Path(sys.argv[1])), sys.argv[2])\n"
        "except Failure as error:\n"
        "    print(error.line(), file=sys.stderr)\n"
        "    sys.exit(error.exit_code)\n"
    )
    return [sys.executable, "-c", script, str(inputs), str(workdir)]


def _started(inputs: Path, workdir: Path) -> subprocess.Popen:
    root = Path(__file__).parents[1]
    # Eight virtual devices here, as in the process that made the run to compare with.
    return subprocess.Popen(
        _command(inputs, workdir), cwd=root, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def _wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.01)


def _newest(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def test_killed_twice_it_goes_on_bit_for_bit(inputs, whole, tmp_path):
    for least in (3, 9):  # the first kill falls early, the second late in the run
        process = _started(inputs, tmp_path)
        _wait_for(lambda least=least: _newest(tmp_path) >= least, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    fit(settings(inputs), tmp_path)
    assert numbers(tmp_path) == numbers(whole)
    assert weights(tmp_path, 12) == weights(whole, 12)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 75, "interrupted"), (signal.SIGINT, 130, "cancelled")],
)
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(
    inputs, whole, tmp_path, number, code, word
):
    process = _started(inputs, tmp_path)
    _wait_for(lambda: _newest(tmp_path) >= 3, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=240)
    if process.returncode != 0:  # a very quick run may have ended before the signal
        assert process.returncode == code
        assert f"jaxtune: error[{word}]: stopped and saved at step" in said.splitlines()[-1]
        assert "the same command to go on" in said.splitlines()[-1]
    fit(settings(inputs), tmp_path)
    assert numbers(tmp_path) == numbers(whole)
    assert weights(tmp_path, 12) == weights(whole, 12)


def test_a_finished_run_started_again_does_nothing(inputs, whole):
    before = numbers(whole), weights(whole, 12)
    assert fit(settings(inputs), whole)["steps"] == 12
    assert (numbers(whole), weights(whole, 12)) == before


def test_other_settings_in_the_same_workdir_are_refused_by_name(inputs, whole):
    with pytest.raises(ConfigError, match=r"config\.optim\.lr was 0\.01, is now 0\.02"):
        fit(settings(inputs, optim__lr=2e-2), whole)


def test_patience_stops_early_and_the_best_is_kept(inputs, tmp_path):
    changes = {"eval__every": 2, "eval__patience": 1, "optim__lr": 10.0, "checkpoint__keep": 1}
    result = fit(settings(inputs, **changes), tmp_path)
    assert result["steps"] < 12
    evals = {row["step"]: row["loss"] for row in numbers(tmp_path) if row["split"] == "eval"}
    assert result["best_step"] == min(evals, key=lambda step: evals[step])
    again = fit(settings(inputs, **changes), tmp_path)
    assert again["steps"] == result["steps"]


def test_numbers_gone_bad_end_the_run(inputs, tmp_path):
    base = tmp_path / "base"
    tiny.write_complete(base)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.inf)
    save_file(tensors, base / "model.safetensors")
    bad = settings(inputs, model__path=str(base), data__eval_fraction=0.0)
    with pytest.raises(NumericsError, match="5 steps in a row up to step 5"):
        fit(bad, tmp_path / "run")
    assert NumericsError.exit_code == 76


def test_full_fine_tuning_and_pretraining_run(inputs, tmp_path):
    (tmp_path / "text.txt").write_text("one two three four five six seven\n\n" * 40)
    values = settings(
        inputs, lora__r=0, lora__dropout=0.0, data__train=str(tmp_path / "text.txt"),
        data__eval_fraction=0.0, eval__every=0, optim__name="muon",
    )  # fmt: skip
    values = config.freeze(values.to_dict() | {"task": "pretrain"})
    fit(values, tmp_path / "run")
    losses = [row["loss"] for row in numbers(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_a_failure_before_training_leaves_no_workdir(inputs, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1\n')
    with pytest.raises(Failure):
        fit(settings(inputs, data__train=str(tmp_path / "bad.jsonl")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_workdir(inputs, tmp_path):
    from jaxtune.workdir import lock

    with lock(tmp_path), pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
        fit(settings(inputs), tmp_path)
