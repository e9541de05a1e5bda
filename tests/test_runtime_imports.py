"""What runs never imports: torch, and the model classes of transformers."""

import subprocess
import sys

from tests import tiny

WHOLE_WAY = """
import json, sys
from pathlib import Path
from jaxtune import cli

work = Path(sys.argv[1])
train = ["train", "--config=configs/lora.py", f"--config.model.path={work}/base",
         f"--config.data.train={work}/rows.jsonl", f"--workdir={work}/run",
         "--config.train.steps=1", "--config.data.max_length=64",
         "--config.train.tensorboard=false"]  # tensorboardX takes torch where it is installed
for command in (train, ["eval", f"--workdir={work}/run"],
                ["generate", f"--workdir={work}/run", "--prompt=1 then", "--max-new-tokens=2"],
                ["export", f"--workdir={work}/run", "--format=peft", f"--out={work}/peft"],
                ["convert", f"{work}/base", f"{work}/out", f"--adapter={work}/peft"],
                ["verify", f"{work}/base", f"{work}/base"]):
    assert cli.main(command) == 0, command
models = [n for n in sys.modules if n.startswith("transformers.models.") and "modeling" in n]
print(json.dumps(models + [n for n in ("torch", "peft", "tensorflow") if n in sys.modules]))
"""


def test_the_whole_way_goes_without_torch_and_model_classes(tmp_path):
    tiny.write_complete(tmp_path / "base")
    tiny.write_rows(tmp_path / "rows.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_WAY, str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[]"
