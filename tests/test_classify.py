"""Classes: which there are, rows to tokens, the token that is read, the loss of it."""

import io
import json
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from jaxtune import tree
from jaxtune.config import Config, DataConfig, TrainConfig
from jaxtune.data import audit
from jaxtune.data.labels import Form, spell
from jaxtune.data.packing import Batch, digest
from jaxtune.data.pipeline import Prepared, prepare
from jaxtune.errors import ConfigError, DataError, ModelError
from jaxtune.models import families
from jaxtune.models.decoder import Decoder, DecoderConfig
from jaxtune.models.encoder import Encoder
from jaxtune.objectives.classify import classify
from tests.byte_tokenizer import byte_tokenizer
from tests.test_encoder import BERT

WORDS = ["[PAD]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f", "g", "h"]
CLS, SEP = 1, 2
FIRST = Form("first", types=True)


def pair_tokenizer() -> Any:
    """One token a letter, and BERT's marks around texts and pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, "[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def write(path, *rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def run(train, form=FIRST, tokenizer=None, **data) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    options: dict[str, Any] = {"max_length": 16} | data
    config = Config(
        task="classify",
        data=DataConfig(train=train, **options),
        train=TrainConfig(batch_size=1),
    )
    return prepare(config, tokenizer or pair_tokenizer(), said.append, form), said


def text(label: Any, words: Any = "a b c") -> dict[str, Any]:
    return {"text": words, "label": label}


def test_the_target_is_the_class_at_the_one_token_that_is_read(tmp_path):
    file = write(tmp_path / "a.jsonl", text("no"), text("yes", "d e"))
    prepared, said = run(file)
    batch = prepared.train.batch([0])
    assert batch.tokens[0, :9].tolist() == [CLS, 3, 4, 5, SEP, CLS, 6, 7, SEP]
    assert batch.targets[0, :9].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert batch.weights[0].nonzero()[0].tolist() == [0, 5]
    assert batch.segments[0, :9].tolist() == [1] * 5 + [2] * 4
    assert prepared.labels == ("no", "yes")
    assert prepared.train.loss_tokens == 2
    assert said[-2:] == [
        "train: 2 classes of the training rows: no 1, yes 1",
        "train: 2 examples packed into 1 rows of 16, 56.2% filled; 9 tokens",
    ]
    batch = run(file, Form())[0].train.batch([0])
    assert batch.weights[0].nonzero()[0].tolist() == [4, 8]
    assert batch.targets[0, [4, 8]].tolist() == [0, 1]
    assert batch.types is None


@pytest.mark.parametrize(
    "names",
    [
        ("text", "text_pair"),
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("question", "passage"),
    ],
)
def test_pairs_have_the_tokenizers_marks_and_types(tmp_path, names):
    rows = [{names[0]: "a b", names[1]: "c", "label": n, "idx": n} for n in range(2)]
    prepared, said = run(write(tmp_path / "a.jsonl", *rows), packing=False)
    batch = prepared.train.batch([0])
    assert batch.tokens[0, :7].tolist() == [CLS, 3, 4, SEP, 5, SEP, 0]
    assert batch.types is not None
    assert batch.types[0, :7].tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert f"rows from {names[0]}, {names[1]}, label; not used: idx" in said[0]
    assert run(write(tmp_path / "a.jsonl", *rows), Form())[0].train.batch([0]).types is None


def test_columns_name_the_texts_and_the_class(tmp_path):
    rows = [{"headline": "a", "body": "b", "topic": topic} for topic in "xy"]
    columns = {"text": "{headline} {body}", "label": "topic"}
    source = {"path": write(tmp_path / "a.jsonl", *rows), "columns": columns}
    assert run((source,))[0].train.example(0)[0].tolist() == [CLS, 3, 4, SEP]
    with pytest.raises(DataError) as caught:
        run(source["path"])
    assert "wanted: text + text_pair + label; " in caught.value.what
    (suggested,) = json.loads(caught.value.fix.split("data.train=")[1])
    assert suggested["columns"] == {"text": "headline", "label": "topic"}


def test_a_row_too_long_keeps_its_last_mark_and_loses_the_longer_text_first(tmp_path):
    pair: dict[str, Any] = {"text": "a b c d e f", "text_pair": "g h", "label": 0}
    turned = {"text": pair["text_pair"], "text_pair": pair["text"], "label": 1}
    file = write(tmp_path / "a.jsonl", pair, turned, pair | {"text": "a"})
    prepared, said = run(file, max_length=8)
    assert prepared.train.example(0)[0].tolist() == [CLS, 3, 4, 5, SEP, 9, 10, SEP]
    assert prepared.train.example(1)[0].tolist() == [CLS, 9, 10, SEP, 3, 4, 5, SEP]
    assert any("cut 2 rows to max_length 8" in line for line in said)
    assert prepared.report.train[0].cut == 2
    file = write(tmp_path / "b.jsonl", text(0, "a b c d"), text(1))
    assert run(file, max_length=5)[0].train.example(0)[0].tolist() == [CLS, 3, 4, 5, SEP]
    prepared, said = run(file, max_length=5, too_long="drop", labels=("n", "y"))
    assert prepared.report.train[0].dropped == (f"{file}:1",)
    with pytest.raises(ConfigError, match="half a row has no class"):
        run(file, too_long="split")
    with pytest.raises(DataError, match="no room beside 2 special tokens"):
        run(file, max_length=2)


def test_causal_tokenizers_keep_their_habits(tmp_path):
    pair: dict[str, Any] = {"text": "ab", "text_pair": "c", "label": 0}
    file = write(tmp_path / "a.jsonl", pair, pair | {"label": 1})
    tokenizer = byte_tokenizer(bos=True)
    prepared, said = run(file, Form(), tokenizer, packing=False)
    a, b, c = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert prepared.train.example(0)[0].tolist() == [256, a, b, 256, c]
    assert not any("nothing stands between" in line for line in said)
    prepared, said = run(file, Form(), byte_tokenizer(), packing=False)
    assert prepared.train.example(0)[0].tolist() == [a, b, c]
    assert any("in 2 rows nothing stands between the two texts" in line for line in said)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (["b", " a ", "b"], ("a", "b")),
        ([10, 9, 2], ("2", "9", "10")),
        (["10", "9"], ("9", "10")),
        ([True, False], ("0", "1")),
        ([1.0, 0.0], ("0", "1")),
    ],
)
def test_classes_found_in_the_rows_are_in_order(tmp_path, found, wanted):
    prepared, _ = run(write(tmp_path / "a.jsonl", *map(text, found)), packing=False)
    assert prepared.labels == wanted
    spelt = [wanted[n] for n in prepared.train.labels]
    assert spelt == [spell(value) for value in found]


def test_the_setting_rules_then_the_base_then_the_rows(tmp_path):
    file = write(tmp_path / "a.jsonl", text("no"), text("yes"))
    base = Form("first", labels=("yes", "no", "perhaps"))
    assert run(file, base)[0].labels == base.labels
    assert run(file, base)[0].train.labels.tolist() == [1, 0]
    assert run(file, base, labels=("yes", "no"))[0].labels == ("yes", "no")
    # Numbers are places, unless names are numbers too.
    file = write(tmp_path / "b.jsonl", text(2), text("0"))
    assert run(file, base)[0].train.labels.tolist() == [2, 0]
    assert run(file, labels=("2", "0"))[0].train.labels.tolist() == [0, 1]


def test_a_label_that_is_no_class_is_named_with_its_row(tmp_path):
    train = write(tmp_path / "a.jsonl", text("no"), text("yes"))
    held = write(tmp_path / "b.jsonl", text("no"), text("Yes"))
    with pytest.raises(DataError) as caught:
        run(train, eval=held)
    assert f"{held}:2: label 'Yes' is none of the 2 classes of the training rows: no, yes" in str(
        caught.value
    )
    with pytest.raises(DataError, match=r"a\.jsonl:2: label 'yes' is none of .* of data\.labels"):
        run(train, labels=("no", "nay"))
    stars = write(tmp_path / "c.jsonl", text(1), text(2))
    with pytest.raises(DataError, match="label '0' is none of"):
        run(stars, eval=write(tmp_path / "d.jsonl", text(0)))


@pytest.mark.parametrize("setting", [("a",), ("a", "a", "b")])
def test_fewer_than_two_classes_or_one_twice_are_an_error(tmp_path, setting):
    with pytest.raises(DataError, match=r"the classes of data\.labels are 'a'"):
        run(write(tmp_path / "a.jsonl", text("a")), labels=setting)
    with pytest.raises(DataError, match="the classes of the training rows are 'a'"):
        run(write(tmp_path / "a.jsonl", text("a")))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (text([0, 1]), "label is a list; a row has one class"),
        (text(0.5), "label is 0.5"),
        (text(" "), "label is empty"),
        (text({}), "label is a dict"),
        (text(None), "the row lacks label"),
        (text("a", 3), "text is a int, not text"),
    ],
)
def test_rows_that_cannot_be_classified_are_bad_rows(tmp_path, row, why):
    file = write(tmp_path / "a.jsonl", text("a"), row, text("b"))
    with pytest.raises(DataError) as caught:
        run(file)
    assert caught.value.what.startswith(f"{file}:2: {why}")
    assert run(file, skip_bad_rows=1)[0].train.examples == 2


def test_an_empty_text_is_bad_only_where_no_token_is_left(tmp_path):
    file = write(tmp_path / "a.jsonl", text("a", ""), text("b"))
    assert run(file)[0].train.example(0)[0].tolist() == [CLS, SEP]
    with pytest.raises(DataError, match="the text is empty"):
        run(file, Form(), byte_tokenizer())


def test_names_of_saved_datasets_and_their_parquet_stand_for_the_numbers(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    table = Dataset.from_dict(rows, features)
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    for path in ("saved", "a.parquet"):
        prepared, _ = run(str(tmp_path / path), skip_bad_rows=1, packing=False)
        assert prepared.labels == ("neg", "pos")
        assert prepared.train.labels.tolist() == [1, 0]
        assert prepared.report.train[0].bad[0].why.startswith("the row lacks label")


def test_classes_of_a_base_are_its_own_only_when_it_names_them():
    trained = {"architectures": ["BertForSequenceClassification"]}
    names = {"10": "k", **{str(n): chr(97 + n) for n in range(10)}}
    assert families.base_labels(trained | {"id2label": names}) == tuple("abcdefghijk")
    for hf in (
        {"architectures": ["BertForTokenClassification"], "id2label": names},
        trained | {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
        trained | {"id2label": {"0": "score"}},
        trained,
    ):
        assert families.base_labels(hf) == ()
    for problem in ("regression", "multi_label_classification"):
        with pytest.raises(ModelError, match=problem):
            families.base_labels(trained | {"problem_type": problem})


def test_a_label_or_a_type_makes_other_data(tmp_path):
    rows = [{"text": "a", "text_pair": "b", "label": n} for n in (0, 1, 0)]
    file = write(tmp_path / "a.jsonl", *rows)
    other = write(tmp_path / "b.jsonl", *rows[:2], rows[1])
    prepared = [run(file)[0], run(other)[0], run(file, Form("first"))[0]]
    assert len({digest(one.train) for one in prepared}) == 3


def test_held_out_rows_and_leaks_go_by_text(tmp_path):
    file = write(tmp_path / "a.jsonl", *(text(n % 2, WORDS[3 + n % 8]) for n in range(16)))
    prepared, said = run(file, eval_fraction=0.25, packing=False)
    assert prepared.eval is not None
    assert (prepared.train.examples, prepared.eval.examples) == (12, 4)
    assert prepared.report.leaked_rows == 0
    assert any(line.startswith("eval: 2 classes of the training rows: ") for line in said)
    # What stands before the token that is read is no prompt.
    held = write(tmp_path / "b.jsonl", text(0, "abd"))
    train = write(tmp_path / "c.jsonl", text(0, "abc"), text(1, "x"))
    prepared, _ = run(train, Form(), byte_tokenizer(), eval=held)
    assert prepared.report.leaked_prompts == 0


def test_the_audit_counts_classes_and_names_them_beside_the_rows(tmp_path):
    file = write(tmp_path / "a.jsonl", text("yes"), text("\x1b[2J"), text("yes", "d"))
    prepared, _ = run(file, packing=False)
    console = Console(file=io.StringIO(), width=100)
    audit.show(prepared, pair_tokenizer(), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "\x1b[2J" not in shown
    assert "-- segment 1: 5 tokens, yes\n\u00ab[CLS]\u00bb a b c [SEP]" in shown
    assert audit.as_json(prepared)["train"]["classes"] == {"\x1b[2J": 1, "yes": 2}


def _causal() -> Decoder:
    config = DecoderConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=6,
        max_position=32,
        num_labels=3,
    )
    return Decoder(config, rngs=nnx.Rngs(0), remat="none")


def _both_ways() -> Encoder:
    return Encoder(families.read(BERT)[1], rngs=nnx.Rngs(0), remat="none")


def _batch(form: Form, tmp_path) -> tuple[Batch, Batch]:
    """The same four documents, two to a row and one to a row."""
    words = ("a b c", "d e", "f g h a b", "c")
    rows = [text(n % 3, words) for n, words in enumerate(words)]
    file = write(tmp_path / "a.jsonl", *rows)
    both = [run(file, form, labels=("x", "y", "z"), packing=p)[0].train for p in (True, False)]
    packed, apart = (rows.batch(range(len(rows))) for rows in both)
    assert len(packed.tokens) == 2
    return packed, apart


@pytest.mark.parametrize(("make", "form"), [(_causal, Form()), (_both_ways, FIRST)])
def test_the_loss_is_the_cross_entropy_of_the_classes_packed_or_not(make, form, tmp_path):
    graphdef, params = tree.split(make())
    rng = np.random.default_rng(0)
    params = {k: v + rng.normal(0, 0.3, v.shape).astype(np.float32) for k, v in params.items()}
    packed, apart = _batch(form, tmp_path)
    real = apart.segments

    @jax.jit
    def loss(params, batch):
        term = classify(tree.merge(graphdef, params), batch, None)
        return term.total, term

    slope = jax.jit(jax.grad(loss, has_aux=True))
    grads, term = slope(params, packed)
    model: Any = tree.merge(graphdef, params)
    logits = np.asarray(jax.jit(partial(model, segments=real))(apart.tokens), np.float64)
    wanted = apart.targets.sum(axis=1)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(term.total, -log_probs[np.arange(4), wanted].sum(), rtol=1e-5)
    assert (int(term.weight), int(term.correct)) == (4, (logits.argmax(axis=1) == wanted).sum())
    other, same = slope(params, apart)
    np.testing.assert_allclose(term.total, same.total, rtol=1e-5)
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, other[path], atol=2e-5, err_msg=path)
    rows = np.abs(grads["embed_tokens.embedding"]).sum(axis=1)
    assert set(np.flatnonzero(rows)) == set(np.unique(packed.tokens[packed.segments > 0]))


def test_equal_logits_are_no_prediction(tmp_path):
    graphdef, params = tree.split(_both_ways())
    flat = {k: v * 0 if k.startswith("classifier.") else v for k, v in params.items()}
    packed, _ = _batch(FIRST, tmp_path)
    term = jax.jit(classify, static_argnums=2)(tree.merge(graphdef, flat), packed, None)
    assert float(term.correct) == 0
    np.testing.assert_allclose(term.total, 4 * np.log(3), rtol=1e-6)
