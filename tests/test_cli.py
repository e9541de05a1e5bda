"""The command line from outside: help, JSON, and one line with the right code for every mistake."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune import cli
from tests import tiny

LORA = str(Path(__file__).parents[1] / "configs" / "lora.py")


def flags(inputs: Path, workdir: Path, **changes: object) -> list[str]:
    """`jaxtune train` on the tiny base; changes are config keys with __ for the dot."""
    values = {
        "model.path": inputs / "base",
        "model.dtype": "float32",
        "data.train": inputs / "rows.jsonl",
        "data.max_length": 64,
        "data.eval_fraction": 0.2,
        "train.steps": 2,
        "train.batch_size": 8,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [
        "train", f"--config={LORA}", f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]  # fmt: skip


def run(capfd, arguments: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    code = cli.main(arguments)
    return code, *capfd.readouterr()


def test_help_imports_nothing_heavy():
    names = "jax flax numpy transformers orbax grain datasets ml_collections rich"
    heavy = names.split()
    script = (
        "import sys\nfrom jaxtune import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "[]\n"
    for verb in ("train", "eval", "generate", "export", "data"):
        assert verb in done.stdout


def test_the_whole_way(inputs, tmp_path, capfd):
    """train, eval, generate, export: one JSON object each, and nothing else on stdout."""
    workdir = tmp_path / "run"
    code, out, _ = run(capfd, [*flags(inputs, workdir), "--json"])
    assert code == 0
    assert json.loads(out)["steps"] == 2
    code, out, _ = run(capfd, ["eval", f"--workdir={workdir}", "--json"])
    assert code == 0
    scores = json.loads(out)
    assert scores["base"]["tokens"] == scores["tuned"]["tokens"] > 0
    code, out, _ = run(
        capfd,
        ["generate", f"--workdir={workdir}", "--prompt=7 then", "--prompt=", "--max-new-tokens=4",
         "--json"],
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["prompts"] == ["7 then", ""]
    for kind in ("hf", "peft"):
        target = tmp_path / kind
        arguments = ["export", f"--workdir={workdir}", f"--format={kind}", f"--out={target}"]
        code, out, _ = run(capfd, [*arguments, "--json"])
        assert code == 0
        assert json.loads(out)["out"] == str(target)
        assert {file.stat().st_mode & 0o777 for file in target.iterdir()} == {0o666 & ~_umask()}
        assert list(target.glob("*.safetensors"))
        code, _, said = run(capfd, arguments)  # a second time: the folder is not empty
        assert code == 2
        assert str(target) in said.splitlines()[-1]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_damaged_best_checkpoint_gives_way_to_the_newest_that_verifies(inputs, tmp_path, capfd):
    changes = {"train__steps": 3, "checkpoint__every": 1, "eval__every": 3, "checkpoint__keep": 2}
    assert run(capfd, flags(inputs, tmp_path / "run", **changes))[0] == 0
    for file in (tmp_path / "run" / "checkpoints" / "3").rglob("*"):
        if file.is_file() and file.name != "jaxtune.json":
            file.write_bytes(b"")
    code, out, said = run(capfd, ["eval", f"--workdir={tmp_path / 'run'}", "--json"])
    assert code == 0
    assert json.loads(out)["step"] == 2
    assert "the best checkpoint cannot be used" in said


def test_rows_are_no_longer_than_the_models_positions(inputs, tmp_path, capfd):
    arguments = [a for a in flags(inputs, tmp_path, data__max_length=999) if "--workdir" not in a]
    code, out, said = run(capfd, ["data", *arguments[1:], "--json"])
    assert code == 0
    assert "data.max_length 999 is more than the model's 128 positions" in said
    assert json.loads(out)["train"]["width"] <= 128


def test_data_verb_writes_nothing(inputs, tmp_path, capfd):
    arguments = [a for a in flags(inputs, tmp_path / "no") if not a.startswith("--workdir")]
    code, out, said = run(capfd, ["data", *arguments[1:], "--json"])
    assert code == 0
    assert json.loads(out)
    assert "then" in said
    assert not (tmp_path / "no").exists()


def _pickled(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def _other_config(base: Path) -> None:
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 4}))


def _wider(base: Path) -> None:
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"intermediate_size": 32}))


def _unknown_family(base: Path) -> None:
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"model_type": "lama"}))


def _truncated(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pointer(base: Path) -> None:
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def _small_embedding(base: Path) -> None:
    tiny.write(base, vocab_size=200)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_pickled, ["pytorch_model.bin", "pickled"]),
        (_other_config, ["9 missing", "model.layers.3.self_attn.q_proj.weight"]),
        (_wider, ["wrong shape", "[24, 16] instead of [32, 16]"]),
        (_unknown_family, ["'lama'", "closest: llama"]),
        (_truncated, ["model.safetensors", "bytes"]),
        (_pointer, ["git-lfs pointer"]),
        (_small_embedding, ["200"]),
    ],
)
def test_a_bad_model(tmp_path, inputs, capfd, damage, words):
    base = tiny.write_complete(tmp_path / "base")
    damage(base)
    _expect(capfd, flags(inputs, tmp_path / "run", model__path=base), 65, words, tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (None, "rows.jsonl", ["rows.jsonl"]),
        ("", "rows.jsonl", ["rows.jsonl"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "rows.jsonl", ["rows.jsonl:2"]),
        ('{"question": "a", "reply": "b"}\n', "rows.jsonl", ["question", "reply"]),
        ('{"input_ids": [1, 2], "labels": [-100, -100]}\n' * 9, "rows.jsonl", ["rows.jsonl", "9"]),
        ("Yoruba\tEnglish\nb\ta\n", "rows.tsv", ["Yoruba", "English", "columns"]),
    ],
)
def test_bad_data(tmp_path, inputs, capfd, text, name, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    arguments = flags(inputs, tmp_path / "run", data__train=tmp_path / name)
    _expect(capfd, arguments, 65, words, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__lrr": 1}, ["did you mean optim.lr?"]),
        ({"train__batchsize": 8}, ["did you mean train.batch_size?"]),
        ({"lora__r": "many"}, ["config.lora.r", "int"]),
        ({"lora__target_modules": "qproj,vproj"}, ["qproj", "q_proj", "gate_proj"]),
        ({"optim__rules": '[["layers.9.","freeze"]]'}, ["layers.9.", "decides nothing"]),
        ({"train__batch_size": 7}, ["7 rows", "8 devices"]),
        ({"mesh__tensor": 3}, ["8 devices"]),
        ({"train__wandb": "mine"}, ["wandb"]),
        ({"lora__init": "nowhere"}, ["nowhere"]),
    ],
)
def test_bad_settings(tmp_path, inputs, capfd, changes, words):
    if "train__wandb" in changes and _installed("wandb"):
        pytest.skip("wandb is installed here: asking for it is no mistake")
    code = 65 if "lora__init" in changes else 2
    _expect(capfd, flags(inputs, tmp_path / "run", **changes), code, words, tmp_path / "run")


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--confg=x"], ["--confg=x", "--config"]),
        (["train"], ["--config=configs/lora.py"]),
        (["train", "--config=no.py"], ["no.py"]),
        (["train", f"--config={LORA}"], ["no workdir"]),
        (["train", f"--config={LORA}", "--workdir=run"], ["model.path"]),
        (["train", f"--config={LORA}", "--config.optim.lr"], ["--config.optim.lr=VALUE"]),
        (["eval", "--workdir=nowhere"], ["nowhere holds no run"]),
        (["export", "--workdir=nowhere"], ["--out=DIR"]),
        (["export", "--workdir=nowhere", "--out=x", "--format=gguf"], ["gguf", "hf"]),
        (["generate", "--workdir=nowhere"], ["--prompt"]),
        (["eval", "--config.optim.lr=1", "--workdir=x"], ["unknown argument"]),
    ],
)
def test_bad_usage(capfd, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _expect(capfd, arguments, 2, words, tmp_path / "run")


def test_a_workdir_that_cannot_be_written(tmp_path, inputs, capfd):
    (tmp_path / "file").write_text("")
    _expect(capfd, flags(inputs, tmp_path / "file" / "run"), 74, ["file"], tmp_path / "run")
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir()
        locked.chmod(stat.S_IREAD | stat.S_IEXEC)
        _expect(capfd, flags(inputs, locked / "run"), 74, ["locked"], locked / "run")


def _expect(capfd, arguments: list[str], code: int, words: list[str], workdir: Path) -> None:
    """The code, one error line with these words at the end, no traceback, nothing left behind."""
    found, out, said = run(capfd, arguments)
    last = said.splitlines()[-1]
    assert found == code, said
    assert out == ""
    assert last.startswith("jaxtune: error[")
    assert "; try: " in last
    assert sum(line.startswith("jaxtune: error[") for line in said.splitlines()) == 1
    assert "Traceback" not in said
    for word in words:
        assert word in last
    assert not workdir.exists()
