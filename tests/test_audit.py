"""The audit: colours follow the mask, numbers the data, and data cannot drive the terminal."""

import io
import json

import pytest
from rich.console import Console

from jaxtune.config import Config, DataConfig
from jaxtune.data import audit
from jaxtune.data.pipeline import prepare
from tests.byte_tokenizer import byte_tokenizer

GREEN, DIM = "\x1b[32m", "\x1b[2m"


@pytest.fixture
def shown(tmp_path):
    """(prepared, text with colours) of a small file with one of each thing to report."""
    rows = [
        {"prompt": "2+2=\n", "completion": "four"},
        {"prompt": "2+2=\n", "completion": "four"},
        {"prompt": "x" * 40 + "\n", "completion": "lost"},
        {"prompt": "evil\n", "completion": "\x1b[2Jgone [bold]not markup[/bold]"},
    ]
    train, held = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train.write_text("\n".join(map(json.dumps, rows)) + "\nbroken\n")
    held.write_text(json.dumps(rows[0]))
    data = DataConfig(train=str(train), eval=str(held), max_length=40, skip_bad_rows=1)
    tokenizer = byte_tokenizer()
    prepared = prepare(Config(data=data), tokenizer, lambda line: None)
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system="standard")
    audit.show(prepared, tokenizer, console)
    return prepared, console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


def test_learnt_tokens_are_green_and_context_is_dim(shown):
    _, text = shown
    assert f"{GREEN}four</s>" in text
    assert f"{DIM}2+2=" in text
    assert "segment 2: 10 tokens" in text


def test_refusals_repeats_and_leaks_are_named(shown):
    prepared, text = shown
    path = prepared.report.train[0].path
    assert f"bad: {path}:5: not JSON" in text
    assert f"refused: {path}:3: no token bears loss" in text
    assert "1 training examples repeat an earlier one; 1 evaluation examples are also" in text


def test_control_characters_and_markup_of_the_data_are_spelt_out(shown):
    _, text = shown
    assert "\x1b[2J" not in text
    assert "\\x1b[2Jgone [bold]not markup[/bold]" in text


def test_json_has_the_same_numbers(shown):
    prepared, _ = shown
    result = json.loads(json.dumps(audit.as_json(prepared)))
    assert result["train"]["examples"] == 3
    assert result["train"]["loss_tokens"] == prepared.train.loss_tokens
    assert sum(count for _, _, count in result["train"]["histogram"]) == 3
    assert result["train"]["lengths"]["max"] == result["train"]["histogram"][-1][1]
    assert result["train"]["sources"][0]["bad"][0]["where"].endswith(":5")
    assert result["train"]["sources"][0]["masked"][0].endswith(":3")
    assert (result["duplicates"], result["leaked_rows"]) == (1, 1)
    assert result["eval"]["rows"] == 1
    assert result["said"] == list(prepared.report.said)


@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_without_colour_learnt_runs_stand_in_marks(tmp_path, colours):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Q: ", "completion": "yes"}\n' * 3)
    config = Config(data=DataConfig(train=str(file), max_length=32))
    tokenizer = byte_tokenizer()
    out = io.StringIO()
    console = Console(file=out, width=80, color_system=colours, force_terminal=True)
    audit.show(prepare(config, tokenizer, lambda _: None), tokenizer, console)
    assert ("Q: \u00abyes</s>\u00bb" in out.getvalue()) == (colours is None)
