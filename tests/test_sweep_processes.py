"""Two processes of the same `jaxtune sweep` on one workdir, one of them killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtune.sweep import halving, storage
from tests.test_sweep_cli import PAGE, records

ROOT = Path(__file__).parents[1]
SCRIPT = "import sys; from jaxtune.cli import main; sys.exit(main())"


@pytest.mark.slow
def test_the_same_command_twice_shares_the_trials_and_survives_the_loss_of_one(inputs, tmp_path):
    page, workdir = tmp_path / "page.py", tmp_path / "sweep"
    text = PAGE.format(base=str(inputs / "base"), rows=str(inputs / "rows.jsonl"))
    changes = {"trials = 4": "trials = 12", "population = 4": "population = 2", "= 8\n": "= 60\n"}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    page.write_text(text)
    flags = ["sweep", f"--config={page}", f"--workdir={workdir}", "--json"]
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    errors = [(tmp_path / f"stderr{n}").open("w+") for n in range(2)]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *flags], cwd=ROOT, env=alone, text=True,
            stdout=subprocess.PIPE, stderr=error,
        )
        for error in errors
    ]  # fmt: skip
    try:
        deadline, owners = time.monotonic() + 240, set()
        while True:
            assert time.monotonic() < deadline, "the two never worked at once"
            assert all(process.poll() is None for process in both)
            if (workdir / "sweep.db").is_file():
                found = so_far(workdir)
                owners = {record.owner for record in found if record.status == "running"}
                if len(owners) == 2 and any(record.results for record in found):
                    break
            time.sleep(0.1)
        lost, left = both
        assert {int(owner.split(":")[1]) for owner in owners} == {lost.pid, left.pid}
        lost.send_signal(signal.SIGKILL)
        out, _ = left.communicate(timeout=240)
    finally:
        for process in both:
            process.kill()
    errors[1].seek(0)
    assert left.returncode == 0, errors[1].read()
    result = json.loads(out.splitlines()[-1])
    assert Path(result["best"]).is_dir()
    found = records(workdir)
    searched = [record for record in found if record.role != "repeat"]
    assert len(searched) == 12
    assert {record.status for record in found} <= {"finished", "stopped"}
    for record in searched:  # no rung twice, none left out
        assert [r.rung for r in record.results] == [0, 1][: len(record.results)]
    ended = [record for record in searched if len(record.results) == 2]
    assert len(ended) == halving.quotas(12, 2, 4, 2)[-1]


def so_far(workdir: Path) -> list:
    """In a turn, as Optuna makes the tables of a file that has none yet: the workers are at it."""
    try:
        with storage.Store(storage.resolve("", workdir), storage.PATIENCE).turn():
            return records(workdir)
    except KeyError:  # the study is about to be made
        return []
