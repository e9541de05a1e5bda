"""From settings to batches: what is kept and said; batches depend on (seed, step) alone."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config import Config, DataConfig, TrainConfig
from jaxtune.data.packing import Example, pack
from jaxtune.data.pipeline import batches, eval_batches, prepare
from jaxtune.errors import DataError
from tests.byte_tokenizer import byte_tokenizer


def run(train, tokenizer=None, batch_size=1, seed=0, pretrain=False, **data):
    """Prepared data and everything said about it."""
    said = []
    config = Config(
        task="pretrain" if pretrain else "sft",
        data=DataConfig(train=train, **data),
        train=TrainConfig(batch_size=batch_size, seed=seed),
    )
    prepared = prepare(config, tokenizer or byte_tokenizer(), said.append)
    assert list(prepared.report.said) == said
    return prepared, said


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def pairs(*answers):
    return [{"prompt": f"{n}\n", "completion": answer} for n, answer in enumerate(answers)]


def numbered(count, sources=1, weights=(), width=8):
    """Rows of which every one holds its own number, `count` a source, unpacked."""
    numbers = itertools.count(1)
    examples = [
        [
            Example(np.array([next(numbers), 9], np.int32), np.ones(2, bool), "")
            for _ in range(count)
        ]
        for _ in range(sources)
    ]
    return pack(examples, width, False, weights)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def numbers_of(found):
    return [batch.tokens[:, 0].tolist() for batch in found]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_rows_are_recognised_encoded_packed_and_said(tmp_path):
    file = write(tmp_path / "a.jsonl", pairs("aaaa", "bb", "c"))
    prepared, said = run(file, max_length=16)
    assert said == [
        f"train: {file}: prompt_completion rows from prompt, completion",
        f"train: {file}: 3 rows read, 3 examples to learn from",
        "train: 3 examples packed into 1 rows of 16, 100.0% filled; 16 tokens, 10 bear loss",
    ]
    batch = prepared.train.batch([0])
    assert batch.segments[0].tolist() == [1] * 7 + [2] * 5 + [3] * 4
    assert batch.weights.sum() == 10


def test_bad_rows_stop_the_run_unless_tolerated(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n{"text": 3}\n{"text": "b"}\n')
    with pytest.raises(DataError) as caught:
        run(str(path))
    assert caught.value.what == f"{path}:2: not JSON: Expecting value at column 9"
    with pytest.raises(DataError, match=r"one more than data.skip_bad_rows=1 allows"):
        run(str(path), skip_bad_rows=1)
    prepared, said = run(str(path), skip_bad_rows=2)
    (report,) = prepared.report.train
    assert (report.read, len(report.bad), report.examples) == (4, 2, 2)
    assert [bad.where for bad in report.bad] == [f"{path}:2", f"{path}:3"]
    assert f"train: {path}: skipped 2 bad rows ({path}:2, {path}:3)" in said


def test_bad_rows_are_counted_over_all_sources(tmp_path):
    files = []
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\nbroken\n')
        files.append(str(tmp_path / name))
    run(tuple(files), skip_bad_rows=2)
    with pytest.raises(DataError, match=r"b\.jsonl:2"):
        run(tuple(files), skip_bad_rows=1)


def test_rows_without_loss_are_refused_by_name_and_count(tmp_path):
    rows = [{"input_ids": [1, 2], "labels": [1, -100]}] * 7 + [{"input_ids": [1, 2]}]
    file = write(tmp_path / "a.jsonl", rows)
    prepared, said = run(file)
    assert prepared.train.examples == 1
    named = ", ".join(f"{file}:{n}" for n in range(1, 6))
    assert any("refused 7 rows without a token that bears loss" in s for s in said)
    assert any(f"({named} and 2 more)" in s for s in said)
    only = write(tmp_path / "b.jsonl", rows[:7])
    with pytest.raises(DataError, match="7 without a token that bears loss") as caught:
        run((file, only))
    assert f"{only}:1, " in caught.value.what


@pytest.mark.parametrize(
    ("too_long", "examples", "said_part"),
    [
        ("drop", 1, "dropped 2 rows over max_length 16"),
        ("cut", 2, "cut 1 rows to max_length 16"),
        ("split", 4, "split 2 rows into windows of max_length 16"),
    ],
)
def test_rows_over_max_length_are_always_said(tmp_path, too_long, examples, said_part):
    rows = [
        {"prompt": "short\n", "completion": "a"},
        {"prompt": "p\n", "completion": "x" * 20},  # 23 tokens: two windows
        {"prompt": "p" * 20 + "\n", "completion": "y"},  # answer in the second window only
    ]
    file = write(tmp_path / "a.jsonl", rows)
    prepared, said = run(file, too_long=too_long, max_length=16)
    assert prepared.train.examples == examples
    assert any(said_part in s for s in said)
    (report,) = prepared.report.train
    if too_long == "cut":  # nothing of the last row's answer is left
        assert report.masked == (f"{file}:3",)
    if too_long == "split":
        assert report.windows_without_loss == 1
        assert prepared.train.loss_tokens == 2 + 21 + 2


def test_pretraining_learns_every_token_of_every_document_once(tmp_path):
    text = "".join(chr(97 + n % 26) for n in range(100))
    (tmp_path / "a.txt").write_text(f"{text}\n\nsecond")
    prepared, said = run(str(tmp_path / "a.txt"), pretrain=True, max_length=16)
    assert prepared.train.loss_tokens == 100 + 6  # with an eos each, without the first tokens
    assert any("split 1 rows into windows" in s for s in said)


def test_a_split_is_the_same_for_every_seed_and_keeps_equal_examples_together(tmp_path):
    file = write(tmp_path / "a.jsonl", pairs(*"abcdefghij") * 3)  # ten texts, each three times
    splits = []
    for seed in (0, 1):
        prepared, said = run(file, eval_fraction=0.2, seed=seed, packing=False)
        assert prepared.eval is not None
        assert (prepared.train.examples, prepared.eval.examples) == (24, 6)
        held = {prepared.eval.example(n)[0].tobytes() for n in range(6)}
        trained = {prepared.train.example(n)[0].tobytes() for n in range(24)}
        assert len(held) == 2
        assert not held & trained
        assert not any("leak" in s for s in said)
        splits.append(frozenset(held))
    assert splits[0] == splits[1]
    one = write(tmp_path / "b.jsonl", pairs("a"))
    with pytest.raises(DataError, match="leaves none to hold out"):
        run(one, eval_fraction=0.5)


def test_leaks_and_duplicates_are_counted(tmp_path):
    train = write(tmp_path / "a.jsonl", pairs("a", "b", "c") + pairs("a"))
    held = write(
        tmp_path / "b.jsonl", [*pairs("a", "other", "c"), {"prompt": "new\n", "completion": "d"}]
    )
    prepared, said = run(train, eval=held)
    report = prepared.report
    assert (report.duplicates, report.leaked_rows, report.leaked_prompts) == (1, 2, 1)
    assert any(
        s.startswith("leak: 2 evaluation examples are also in training, 1 more") for s in said
    )


def test_fewer_rows_than_a_batch_work_by_repeating_and_say_so(tmp_path):
    file = write(tmp_path / "a.jsonl", pairs("a", "b", "c"))
    prepared, said = run(file, batch_size=8, packing=False)
    assert any("3 rows are fewer than train.batch_size 8" in s for s in said)
    (batch,) = take(batches(prepared.train, 8, seed=0), 1)
    assert batch.tokens.shape[0] == 8
    assert (batch.weights.sum(axis=1) > 0).all()


def test_missing_settings_and_wrong_paths_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"data\.train is empty"):
        run("")
    with pytest.raises(DataError, match="does not exist"):
        run(str(tmp_path / "no.jsonl"))
    with pytest.raises(DataError, match="neither a file nor one of"):
        run(write(tmp_path / "a.jsonl", pairs("a")), template="nope")


def test_each_epoch_has_every_row_once_in_an_order_of_its_own():
    rows = numbered(12)
    epochs = _epochs(numbers_of(take(batches(rows, 4, seed=3), 9)), 3)
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 13))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])
    other = _epochs(numbers_of(take(batches(rows, 4, seed=4), 3)), 3)
    assert other[0] != epochs[0]
    still = _epochs(numbers_of(take(batches(rows, 4, seed=3, shuffle=False), 6)), 3)
    assert still == [list(range(1, 13))] * 2


def _epochs(found, steps):
    """The numbers of every `steps` batches, joined."""
    return [list(itertools.chain(*found[at : at + steps])) for at in range(0, len(found), steps)]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**63), st.integers(0, 9), st.booleans())
def test_batches_depend_on_seed_and_step_alone(count, seed, start, shuffle):
    rows = numbered(count)
    whole = numbers_of(take(batches(rows, 4, seed, shuffle), start + 4))
    resumed = numbers_of(take(batches(rows, 4, seed, shuffle, start_step=start), 4))
    assert resumed == whole[start:]
    for hosts in (2, 4):
        parts = [
            numbers_of(take(batches(rows, 4, seed, shuffle, start, mine), 4))
            for mine in np.split(np.arange(4), hosts)
        ]
        joined = [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
        assert joined == whole[start:]


def test_weights_set_the_shares_of_the_mix_and_the_mix_resumes():
    rows = numbered(10, sources=2, weights=(3.0, 1.0))
    found = numbers_of(take(batches(rows, 8, seed=0), 10))
    flat = [n for batch in found for n in batch]
    assert sum(n <= 10 for n in flat) == 60  # of 80
    assert numbers_of(take(batches(rows, 8, seed=0, start_step=5), 5)) == found[5:]
    unweighted = numbers_of(take(batches(numbered(10, sources=2), 4, seed=0), 5))
    assert sorted(n for batch in unweighted for n in batch) == list(range(1, 21))


def test_weights_are_read_from_the_sources(tmp_path):
    a, b = (write(tmp_path / f"{name}.jsonl", pairs(name)) for name in "ab")
    prepared, said = run(({"path": a, "weight": 3}, b))
    assert prepared.train.weights == (3.0, 1.0)
    assert f"mix of rows by weight: {a} 75.0%, {b} 25.0%" in said


def test_evaluation_sees_every_row_once_and_pads_without_weight():
    rows = numbered(7)
    for hosts in (1, 2, 4):
        parts = [list(eval_batches(rows, 4, mine)) for mine in np.split(np.arange(4), hosts)]
        assert {len(part) for part in parts} == {2}
        assert {b.tokens.shape[0] for part in parts for b in part} == {4 // hosts}
        seen = [n for step in zip(*parts, strict=True) for b in step for n in b.tokens[:, 0]]
        assert [n for n in seen if n] == list(range(1, 8))
        assert sum(b.weights.sum() for part in parts for b in part) == 7


def test_real_data_is_encoded_whole(shared_data):
    from jaxtune.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared_data / "stories260k-hf"), 512)
    prepared, _ = run(str(shared_data / "instruct/alpaca_2k.json"), tokenizer, max_length=512)
    (report,) = prepared.report.train
    assert (report.read, report.kind) == (2000, "alpaca")
    assert report.examples + len(report.masked) == 2000
    assert prepared.train.fill > 0.9
    columns = {"prompt": "{English}\n", "completion": "Yoruba"}
    source = {"path": str(shared_data / "yoruba/menyo20k/train.tsv"), "columns": columns}
    held = {"path": str(shared_data / "yoruba/menyo20k/dev.tsv"), "columns": columns}
    prepared, _ = run((source,), tokenizer, eval=(held,), max_length=512)
    # 18 English sentences are in both, in 61 rows of dev.
    leaks = prepared.report.leaked_rows + prepared.report.leaked_prompts
    assert (prepared.report.leaked_rows, leaks) == (46, 61)
