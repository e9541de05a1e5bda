"""`jaxtune sweep` whole, on a tiny model: what it leaves, how it goes on, how it fails."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import optuna
import pytest

from jaxtune import cli, config, sharding, train, tuned
from jaxtune.config import SweepConfig
from jaxtune.errors import StorageError
from jaxtune.sweep import attributes, command
from jaxtune.sweep.records import Record
from jaxtune.workdir import lock

PAGE = """
from jaxtune.config import choice, default_config, log

def get_config():
    config = default_config()
    config.model.path = {base!r}
    config.model.dtype = config.model.param_dtype = "float32"
    config.model.remat = "none"
    config.lora.r = 4
    config.lora.target_modules = ("q_proj", "v_proj")
    config.data.train = {rows!r}
    config.data.max_length = 64
    config.data.eval_fraction = 0.2
    config.train.steps = 8
    config.train.batch_size = 4
    config.train.tensorboard = False
    config.optim.lr = 1e-3
    config.sweep.space = {{"optim.lr": log(1e-3, 1e-2), "lora.r": choice(2, 4)}}
    config.sweep.trials = 4
    config.sweep.sampler = "random"
    config.sweep.population = 4
    config.sweep.rungs = 2
    config.sweep.repeats = 1
    return config
"""


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Of the virtual devices only the first."""
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch.setattr)
        yield


def on_one_device(setattr_: Callable[..., None] = setattr) -> None:
    make = sharding.make_mesh
    setattr_(sharding, "make_mesh", lambda mesh: make(mesh, jax.devices()[:1]))


@pytest.fixture(scope="module")
def page(inputs, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "sweep.py"
    text = PAGE.format(base=str(inputs / "base"), rows=str(inputs / "rows.jsonl"))
    file.write_text(text)
    return file


def run(page: Path, workdir: Path, *more: str) -> tuple[int, dict, str]:
    """(exit code, JSON of stdout, stderr) of `jaxtune sweep`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["sweep", f"--config={page}", f"--workdir={workdir}", "--json", *more])
    return code, json.loads(out.getvalue() or "{}"), err.getvalue()


def records(workdir: Path) -> list[Record]:
    """The trials, as Optuna itself opens them."""
    study = optuna.load_study(study_name=workdir.name, storage=f"sqlite:///{workdir}/sweep.db")
    return [attributes.record(trial) for trial in study.trials]


def facts(workdir: Path) -> list[tuple]:
    """All that is recorded of trials but who had them, for how long, and how they were stopped."""
    return [
        (
            r.number, r.params, r.status, r.role, r.rung, r.curve, r.lost_tokens,
            [result._replace(seconds=0.0) for result in r.results],
        )
        for r in records(workdir)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def swept(page, tmp_path_factory) -> tuple[Path, dict]:
    """A sweep that nothing happened to, and what it printed."""
    workdir = tmp_path_factory.mktemp("swept") / "sweep"
    code, result, said = run(page, workdir)
    assert code == 0, said
    return workdir, result


def test_a_sweep_finds_and_hands_over(swept):
    workdir, result = swept
    found = records(workdir)
    search = [r for r in found if r.role != "repeat"]
    assert [r.status for r in search].count("finished") == 2
    assert len(search) == 4
    assert {r.role for r in search} >= {"baseline", "search"}
    winner = found[result["winner"]]
    assert winner.status == "finished"
    assert winner.params == result["params"]
    assert winner.loss == pytest.approx(result["loss"], rel=1e-5)
    assert result["loss"] < result["loss_before"]
    assert result["tokens"] == sum(r.tokens for r in found)
    assert sum(result["trials"].values()) == 4
    assert [(r.repeats, r.params["train.seed"]) for r in found if r.role == "repeat"] == [
        ("winner", 1000), ("defaults", 1000),
    ]  # fmt: skip
    assert len(result["repeats"]["winner"]) == len(result["repeats"]["defaults"]) == 1
    for name in ("best", "config", "export", "report"):
        assert Path(result[name]).exists()
    assert json.loads((workdir / "result.json").read_text()).items() >= result.items()


def test_the_page_of_the_winner_trains_to_its_score(swept, page, tmp_path):
    workdir, result = swept
    text = (workdir / "best.py").read_text()
    low, high = "searched: 0.001 to 0.01, log", "the sweep's config has 0.001"
    assert f"config.optim.lr = {result['params']['optim.lr']!r}  # {low}; {high}" in text
    own = config.load(str(workdir / "best.py"), {})
    base = dataclasses.replace(config.load(str(page), {}), sweep=SweepConfig())
    assert config.replaced(base, result["params"]) == own
    assert train.fit(own, tmp_path / "again")["loss_after"] == pytest.approx(
        result["loss"], rel=1e-4
    )


def test_best_is_a_run_that_is_done(swept):
    workdir, result = swept
    before = (workdir / "best" / "checkpoints" / "8" / "jaxtune.json").read_bytes()
    done = train.fit(config.load(str(workdir / "best.py"), {}), workdir / "best")
    assert (done["steps"], done["tokens"]) == (8, records(workdir)[result["winner"]].tokens)
    assert done["loss_before"] == pytest.approx(result["loss_before"], rel=1e-5)
    assert done["loss_after"] == pytest.approx(result["loss"], rel=1e-5)
    assert (workdir / "best" / "checkpoints" / "8" / "jaxtune.json").read_bytes() == before
    texts = tuned.generate(workdir / "best", ["3 then"], max_new_tokens=2)
    assert len(texts) == 1


def test_defaults_that_beat_the_winner_with_other_seeds_are_handed_over(page, tmp_path):
    low = tmp_path / "low.py"
    text = page.read_text()
    for old, new in {"log(1e-3, 1e-2)": "choice(1e-6, 2e-6)", '"random"': '"grid"',
                     "lr = 1e-3": "lr = 1e-2"}.items():  # fmt: skip
        assert text.count(old) == 1
        text = text.replace(old, new)
    low.write_text(text)
    code, result, said = run(low, tmp_path / "sweep")
    assert code == 0, said
    assert "the defaults are better" in said
    assert result["handed_over"] == "defaults"
    assert result["params"] == {"optim.lr": 1e-2, "lora.r": 4, "train.seed": 1000}
    assert result["loss"] == pytest.approx(result["repeats"]["defaults"][0], rel=1e-5)
    again = ["train", f"--config={result['config']}", f"--workdir={tmp_path / 'again'}", "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(again) == 0
    assert json.loads(out.getvalue())["loss_after"] == pytest.approx(result["loss"], rel=1e-5)


def test_the_same_command_again_trains_nothing(swept, page):
    workdir, result = swept
    before = facts(workdir)
    code, again, said = run(page, workdir)
    assert (code, again) == (0, result)
    assert "this sweep is over" in said
    assert facts(workdir) == before


def test_more_trials_go_on_with_what_is_there(swept, page, tmp_path):
    """Another number of trials is no other sweep, and what was stopped stays stopped."""
    workdir, _ = swept
    more = tmp_path / "sweep"
    shutil.copytree(workdir, more)
    changes = {"sweep.trials": "5", "sweep.repeats": "0"}
    assert command.work(config.load(str(page), changes), more)["trials"] == 7
    assert [r.role for r in records(more)].count("search") == 1 + [
        r.role for r in records(workdir)
    ].count("search")
    assert facts(more)[:6] == facts(workdir)


KILLED = """
import os, signal, sys
from jaxtune import cli
from jaxtune.population import Engine
from jaxtune.sweep import worker
from tests.test_sweep_cli import on_one_device

on_one_device()
at, what, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
worker.SAVE_SECONDS = 0.0  # every micro-batch
calls = [0]

def counted(function):
    def called(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), getattr(signal, what))
        return function(*args, **kwargs)
    return called

if what == "SIGKILL":
    os.fsync = counted(os.fsync)
else:
    Engine.step = counted(Engine.step)
sys.exit(cli.main(["sweep", *arguments]))
"""


def killed(page: Path, workdir: Path, at: int, what: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLED, str(at), what]
    command += [f"--config={page}", f"--workdir={workdir}"]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True)


def test_killed_in_the_middle_of_a_save_it_goes_on_bit_for_bit(swept, page, tmp_path):
    workdir = tmp_path / "sweep"
    # 4 trials are saved after each micro-batch, file and folder: the ninth flush is of the second.
    done = killed(page, workdir, 9, "SIGKILL")
    assert done.returncode == -signal.SIGKILL
    assert [r.status for r in records(workdir)] == ["running"] * 4
    command.work(config.load(str(page), {}), workdir)
    assert facts(workdir) == facts(swept[0])


def test_a_stop_pauses_the_trials_and_says_how_to_go_on(swept, page, tmp_path):
    workdir = tmp_path / "sweep"
    done = killed(page, workdir, 4, "SIGTERM")
    assert done.returncode == 75
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"jaxtune: error[interrupted]: the sweep in {workdir} is stopped")
    assert "the same command to go on" in line
    assert {r.status for r in records(workdir)} <= {"waiting", "paused"}
    command.work(config.load(str(page), {}), workdir)
    assert facts(workdir) == facts(swept[0])


@pytest.mark.slow
def test_finalists_are_trained_again_on_everything(page, tmp_path):
    code, result, said = run(
        page, tmp_path / "sweep", "--config.sweep.data_fraction=0.5",
        "--config.sweep.max_length=48", "--config.sweep.finalists=2", "--config.sweep.repeats=0",
    )  # fmt: skip
    assert code == 0, said
    found = records(tmp_path / "sweep")
    finals = [r for r in found if r.role == "final"]
    assert len(finals) == 2
    assert result["winner"] == min(finals, key=lambda r: r.results[-1].loss).of
    assert config.load(result["config"], {}).data.max_length == 64
    scores = tuned.evaluate(result["best"])
    assert scores["tuned"]["loss"] == pytest.approx(result["loss"], rel=1e-5)


def last(said: str) -> str:
    return said.splitlines()[-1]


def test_what_no_search_can_be_done_with_ends_before_the_model_is_read(page, tmp_path):
    bad = {
        "data.eval_fraction=0": "config]: a sweep compares losses on held-out rows",
        'sweep.space={"optim.momentum":["log",0.1,1]}': "config]: sweep.space has an unknown",
        'sweep.space={"model.dtype":["choice","bfloat16"]}': "which cannot vary",
        "sweep.budget=soon": "sweep.budget 'soon' is no amount of time or tokens",
        "train.budget=1h": "train.budget is of one training",
        "sweep.eta=1": "sweep.eta is 1; try: 2 or more",
        "sweep.max_length=65": "sweep.max_length is 65, more than data.max_length, 64",
        "sweep.data_fraction=1.5": "sweep.data_fraction is 1.5; try: from 1e-06 to 1.0",
        "sweep.storage=/nowhere/to/be/found/sweep.db": "storage]: sweep.storage /nowhere/to",
        "sweep.trials=0": "sweep.trials is 0, and there is no sweep.budget",
        "sweep.storage=/dev/null/sweep.db": "storage]: sweep.storage /dev/null/sweep.db",
    }
    for override, expected in bad.items():
        code, _, said = run(page, tmp_path / "sweep", f"--config.{override}")
        assert code == (74 if "storage" in expected[:8] else 2), override
        assert expected in last(said)
        assert "; try: " in last(said)


def test_a_grid_of_few_points_is_halved_by_their_number(page, tmp_path):
    text = page.read_text().replace("log(1e-3, 1e-2)", "choice(1e-3, 5e-3)")
    few = tmp_path / "few.py"
    few.write_text(text.replace('"random"', '"grid"').replace("trials = 4", "trials = 16"))
    more = ["--config.sweep.repeats=0", "--config.sweep.finalists=1"]
    code, result, said = run(few, tmp_path / "sweep", *more)
    assert code == 0, said
    assert "sweep.space has 4 different trials, so there are not 16" in said
    assert result["trials"] == {"finished": 1, "stopped": 3}


def test_a_training_does_not_write_over_a_sweep(swept):
    workdir, result = swept
    before = (workdir / "result.json").read_bytes()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main(["train", f"--config={result['config']}", f"--workdir={workdir}"])
    assert code == 2
    assert "holds a sweep; try: another --workdir" in said.getvalue()
    assert (workdir / "result.json").read_bytes() == before
    assert not (workdir / "checkpoints").exists()


def test_another_model_at_the_same_path_is_another_sweep(page, tmp_path, inputs):
    base = tmp_path / "base"
    shutil.copytree(inputs / "base", base)
    flags = [f"--config.model.path={base}", "--config.sweep.repeats=0"]
    code, _, said = run(page, tmp_path / "sweep", *flags)
    assert code == 0, said
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = bytes(4)
    weights.write_bytes(content)
    code, _, said = run(page, tmp_path / "sweep", *flags)
    assert code == 2
    assert "model was" in said


def test_a_workdir_of_a_training_or_in_use_is_refused(page, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    code, _, said = run(page, tmp_path / "run")
    assert code == 2
    assert "holds a training; try: another --workdir" in last(said)
    with lock(tmp_path / "used"):
        code, _, said = run(page, tmp_path / "used")
    assert code == 2
    assert f"is in use by pid {os.getpid()}" in last(said)


def test_a_study_of_another_space_or_model_is_refused_by_name(swept, page):
    workdir, _ = swept
    before = facts(workdir)
    code, _, said = run(page, workdir, "--config.sweep.eta=3")
    assert code == 2
    assert "is another one" in last(said)
    assert facts(workdir) == before


def test_a_budget_too_short_says_so(page, tmp_path):
    code, _, said = run(page, tmp_path / "sweep", "--budget=1s")
    assert code == 2
    assert "a budget of 1 s is too short for one trial" in last(said)


@pytest.mark.slow
def test_all_trials_diverging_says_what_was_tried(page, tmp_path):
    space = json.dumps({"optim.lr": ["log", 1e37, 1e38]})
    code, _, said = run(
        page, tmp_path / "sweep", f"--config.sweep.space={space}", "--config.optim.lr=3e37"
    )
    assert code == 76, said
    assert "all 4 trials diverged; try: sweep.space optim.lr below 1e+37" in last(said)
    assert {r.status for r in records(tmp_path / "sweep")} == {"diverged"}


@pytest.mark.slow
def test_a_full_disk_in_the_middle_keeps_what_was_found(swept, page, tmp_path, monkeypatch):
    real, calls = os.fsync, [0]

    def fsync(handle):
        calls[0] += 1
        if calls[0] == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    own = config.load(str(page), {})
    with pytest.raises(StorageError, match=r"could not be saved.*no finished rung is lost"):
        command.work(own, tmp_path / "sweep")
    monkeypatch.undo()
    assert sum(len(r.results) for r in records(tmp_path / "sweep")) == 2
    command.work(own, tmp_path / "sweep")
    # The two that are left are no population of four: another program, which rounds otherwise.
    for one, other in zip(facts(tmp_path / "sweep"), facts(swept[0]), strict=True):
        assert one[:5] == other[:5]
        losses = [[result.loss for result in facts_of[-1]] for facts_of in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
