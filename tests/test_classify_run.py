"""A classifier from a language model and back: train, score, export, open again."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from jaxtune import config as settings
from jaxtune.compare import verify
from jaxtune.errors import ConfigError
from jaxtune.hf import files
from jaxtune.hf.load import load_model
from jaxtune.train import fit
from jaxtune.tuned import evaluate, export, generate
from tests import tiny

WORDS = {"warm": "good", "cold": "bad"}


def _rows(file, names):
    rows = [{"text": f"{word} {i}", "label": names[word]} for i in range(40) for word in WORDS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _config(base, rows, **lora):
    values = settings.Config().to_dict()
    values["task"] = "classify"
    values["model"] |= {"path": str(base), "dtype": "float32", "param_dtype": "float32"}
    values["lora"] |= {"r": 4} | lora
    values["data"] |= {"train": rows, "eval_fraction": 0.2, "max_length": 64}
    values["train"] |= {"steps": 60, "batch_size": 8, "tensorboard": False}
    values["optim"] |= {"lr": 1e-2}
    return settings.freeze(values)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir of a classifier with adapters, and what training said about it."""
    folder = tmp_path_factory.mktemp("classifier")
    base = tiny.write_complete(folder / "base")
    result = fit(_config(base, _rows(folder / "rows.jsonl", WORDS)), folder / "run")
    return folder, result


def test_it_learns_and_knows_its_classes(run):
    folder, result = run
    assert result["loss_before"] == pytest.approx(np.log(2), rel=0.2)
    assert result["loss_after"] < 0.1
    assert json.loads((folder / "run" / "config.json").read_text())["data"]["labels"] == [
        "bad",
        "good",
    ]
    scores = evaluate(folder / "run")
    assert scores["task"] == "classify"
    assert scores["tuned"]["accuracy"] == 1.0
    with pytest.raises(ConfigError, match="writes no text"):
        generate(folder / "run", ["warm"])


def test_the_export_is_a_sequence_classifier(run, tmp_path):
    folder, _ = run
    export(folder / "run", tmp_path / "out")
    hf = files.read_json(tmp_path / "out" / "config.json")
    assert hf["architectures"] == ["LlamaForSequenceClassification"]
    assert hf["id2label"] == {"0": "bad", "1": "good"}
    assert hf["pad_token_id"] is not None
    stored = files.tensors(tmp_path / "out")
    assert "lm_head.weight" not in stored
    assert stored["score.weight"].shape == (2, 16)
    assert load_model(str(tmp_path / "out"))(np.array([[256, 4, 5]])).shape == (1, 2)


def test_servers_get_it_merged_with_the_reason(run, tmp_path, capsys):
    folder, _ = run
    result = export(folder / "run", tmp_path / "out", format="serve")
    assert result["format"] == "hf"
    assert "merged instead of an adapter: modules are trained in full" in capsys.readouterr().err
    export(folder / "run", tmp_path / "peft", format="peft")
    assert "inference servers such as vLLM do not take" in capsys.readouterr().err


def test_other_classes_than_the_bases_start_the_head_anew(run, tmp_path, capsys):
    folder, _ = run
    export(folder / "run", tmp_path / "base")
    three = {"warm": "hot", "cold": "icy"}
    config = _config(tmp_path / "base", _rows(tmp_path / "rows.jsonl", three))
    one = dataclasses.replace(config.train, steps=1)
    fit(dataclasses.replace(config, train=one), tmp_path / "two")  # the data's own classes
    assert "2 classes of the training rows: " in (said := capsys.readouterr().err)
    assert "no head for these classes, new: score.kernel" in said
    data = dataclasses.replace(config.data, labels=("hot", "icy", "mild"))
    short = dataclasses.replace(config.train, steps=1)
    fit(dataclasses.replace(config, data=data, train=short), tmp_path / "run")
    assert "no head for these classes, new: score.kernel" in capsys.readouterr().err
    export(tmp_path / "run", tmp_path / "out")
    assert files.tensors(tmp_path / "out")["score.weight"].shape == (3, 16)
    assert files.read_json(tmp_path / "out" / "config.json")["id2label"]["2"] == "mild"


def test_the_bases_own_classes_keep_its_head(run, tmp_path, capsys):
    folder, _ = run
    export(folder / "run", tmp_path / "base")
    config = _config(tmp_path / "base", _rows(tmp_path / "rows.jsonl", WORDS))
    short = dataclasses.replace(config.train, steps=1)
    result = fit(dataclasses.replace(config, train=short), tmp_path / "run")
    assert "is kept, its classes are: bad, good" in capsys.readouterr().err
    assert result["loss_before"] < 0.1  # it goes on from what it knows


def test_a_new_head_that_a_rule_freezes_is_part_of_the_model(tmp_path):
    base = tiny.write_complete(tmp_path / "base")
    config = _config(base, _rows(tmp_path / "rows.jsonl", WORDS))
    optim = dataclasses.replace(config.optim, rules=((r"^score\.", "freeze"),))
    short = dataclasses.replace(config.train, steps=1)
    fit(dataclasses.replace(config, optim=optim, train=short), tmp_path / "run")
    for kind in ("hf", "peft"):
        export(tmp_path / "run", tmp_path / kind, format=kind)
        assert verify(str(tmp_path / "run"), str(tmp_path / kind))["differ"] == 0


def test_an_encoder_writes_no_text_and_says_so(tmp_path):
    base = tmp_path / "bert"
    base.mkdir()
    hf = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 40}
    hf |= {"num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 64}
    (base / "config.json").write_text(json.dumps(hf))
    config = _config(base, _rows(tmp_path / "rows.jsonl", WORDS))
    with pytest.raises(ConfigError, match="task=sft needs a model that writes text"):
        fit(dataclasses.replace(config, task="sft"), tmp_path / "run")


def test_a_run_of_another_machine_opens_on_the_devices_there_are(run, tmp_path, capsys):
    folder, _ = run
    shutil.copytree(folder / "run", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    values["mesh"] |= {"data": 16, "fsdp": 1, "expert": 2}
    file.write_text(json.dumps(values))
    assert evaluate(tmp_path / "run")["tuned"]["accuracy"] == 1.0
    assert "mesh does not fit here: 8 device(s)" in capsys.readouterr().err
