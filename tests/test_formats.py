"""Reading: every format, real quirks of real files, and what is wrong named by file and line."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.formats import LABELLED, Source, parse_sources, read
from jaxtune.data.readers import BadRow, Row
from jaxtune.errors import DataError


def rows_of(path, **options):
    (source,) = parse_sources(({"path": str(path), **options},), "train")
    return list(read(source).rows)


def values_of(path, **options):
    return [row.values for row in good_rows(path, **options)]


def good_rows(path, **options) -> list[Row]:
    rows = rows_of(path, **options)
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [row for row in rows if isinstance(row, Row)]


PAIR = {"prompt": "a\u2028b", "completion": "ọ̀\tc"}


def test_json_lines_survive_bom_crlf_blank_lines_and_line_separators(tmp_path):
    line = json.dumps(PAIR, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{line}\r\n\r\n{line}\n".encode())
    rows = good_rows(tmp_path / "a.jsonl")
    assert [row.values for row in rows] == [PAIR, PAIR]
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["1", "3"]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([PAIR, PAIR], indent=1),
        f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n",
        json.dumps({"version": 1, "data": [PAIR, PAIR]}),
    ],
    ids=["a list", "JSON Lines in a .json", "a list under data"],
)
def test_json_files_of_three_shapes(tmp_path, content):
    (tmp_path / "a.json").write_text("\ufeff" + content, encoding="utf-8")
    assert values_of(tmp_path / "a.json") == [PAIR, PAIR]


def test_csv_and_tsv_fields_may_hold_line_ends_tabs_and_quotes(tmp_path):
    records = [["prompt", "completion"], ['say "hi"\nthere', "a\tb"], ["x", "y,z"]]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(records)
        rows = good_rows(tmp_path / name)
        assert [list(row.values.values()) for row in rows] == records[1:]
        assert [row.where.rsplit(":", 1)[1] for row in rows] == ["2", "4"]


@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=8))
def test_whatever_the_csv_module_writes_is_read_back(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("csv") / "a.tsv"
    encodable = [
        tuple("".join(c for c in field if not "\ud800" <= c <= "\udfff") or "x" for field in record)
        for record in records
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("prompt", "completion"), *encodable])
    assert [tuple(values.values()) for values in values_of(path)] == encodable


def test_parquet_saved_datasets_and_text(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([PAIR, PAIR])
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert values_of(tmp_path / "a.parquet") == [PAIR, PAIR]
    assert values_of(tmp_path / "one") == [PAIR, PAIR]
    assert values_of(tmp_path / "two", split="test") == [PAIR]
    with pytest.raises(DataError, match=r"no split 'dev'; it has train, test"):
        rows_of(tmp_path / "two", split="dev")

    (tmp_path / "a.txt").write_bytes("\ufeff\n one\r\ntwo\r\n \r\n\r\nthree".encode())
    rows = good_rows(tmp_path / "a.txt")
    assert [row.values["text"] for row in rows] == [" one\ntwo", "three"]
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["2", "6"]


def test_a_folder_is_read_file_by_file_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "README.md").write_text("not data")
    assert [v["text"] for v in values_of(tmp_path)] == ["first", "second"]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [], "prompt": "p", "prompt_id": 1}, "messages"),
        ({"conversations": [], "id": 1}, "sharegpt"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"instruction": "i", "input": "", "output": "o", "text": "t"}, "alpaca"),
        ({"instruction": "i", "output": "o"}, "alpaca"),
        ({"text": "t", "label": 1}, "text"),
        ({"input_ids": [1], "labels": [1]}, "tokens"),
    ],
)
def test_rows_are_recognised_by_columns(tmp_path, row, kind):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read(Source(str(tmp_path / "a.jsonl"))).kind == kind


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "t", "label": 1, "messages": []}, "labelled_text"),
        ({"sentence": "t", "label": 1}, "labelled_sentence"),
        ({"text": "t", "text_pair": "u", "label": 1}, "text_pair"),
        ({"question": "q", "sentence": "s", "label": 1}, "question_sentence"),
        ({"premise": "p", "hypothesis": "h", "label": 1}, "premise_hypothesis"),
    ],
)
def test_rows_with_a_class_are_recognised_when_classes_are_asked_for(tmp_path, row, kind):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    table = read(Source(str(tmp_path / "a.jsonl")), LABELLED)
    assert (table.kind, table.columns[-1]) == (kind, "label")
    entry = {"path": str(tmp_path / "a.jsonl"), "format": kind}
    assert parse_sources((entry,), "train", LABELLED)[0].format == kind
    with pytest.raises(DataError, match="format"):
        parse_sources((entry,), "train")


def test_columns_name_map_nest_number_and_fill_in(tmp_path):
    (tmp_path / "a.tsv").write_text("English\tYoruba\nGood day\tẸ káàsán\n", encoding="utf-8")
    columns = {"prompt": "Translate {English}:\n", "completion": "Yoruba"}
    assert values_of(tmp_path / "a.tsv", columns=columns) == [
        {"prompt": "Translate Good day:\n", "completion": "Ẹ káàsán"}
    ]
    (tmp_path / "b.jsonl").write_text('{"t": {"en": "a"}, "instances": [{"output": "b"}]}')
    columns = {"prompt": "t.en", "completion": "instances.0.output"}
    assert values_of(tmp_path / "b.jsonl", columns=columns) == [{"prompt": "a", "completion": "b"}]
    (tmp_path / "c.tsv").write_text("id1\tone\nid2\ttwo\n")
    assert values_of(tmp_path / "c.tsv", columns={"text": 2}) == [{"text": "one"}, {"text": "two"}]
    numbered = {"prompt": "{1}>", "completion": 2}
    assert values_of(tmp_path / "c.tsv", columns=numbered)[0] == {
        "prompt": "id1>",
        "completion": "one",
    }


def test_unknown_columns_list_those_found_and_the_setting_that_names_them(tmp_path):
    (tmp_path / "a.tsv").write_text("English\tYoruba\na\tb\n")
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / "a.tsv")
    assert "columns found: English, Yoruba; wanted: input_ids; messages" in caught.value.what
    # The suggested setting is valid and works as it stands.
    (setting,) = json.loads(caught.value.fix.split("data.train=")[1])
    assert values_of(**setting) == [{"prompt": "a", "completion": "b"}]


def test_preference_pairs_are_not_taken_for_conversations(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"conversations": [], "chosen": {}, "rejected": {}}')
    with pytest.raises(DataError, match="preference pairs"):
        rows_of(tmp_path / "a.jsonl")


BAD_LINES = {
    "broken": (b'{"text": "b"', "not JSON: Expecting ',' delimiter at column 13"),
    "not UTF-8": (b'{"text": "\xff"}', "can't decode byte 0xff"),
    "not an object": (b"[1, 2]", "a JSON list, not an object"),
    "other columns": (b'{"txt": "b"}', "the row lacks text (it has: txt)"),
    "null": (b'{"text": null}', "the row lacks text (it has: nothing)"),
    "deep": (b"[" * 100_000, "not JSON: "),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}", "not JSON: "),
}


@pytest.mark.parametrize(("line", "why"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_and_the_others_are_still_read(tmp_path, line, why):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    first, bad, last = rows_of(path)
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert isinstance(bad, BadRow)
    assert bad.where == f"{path}:2"
    assert why in bad.why


def test_bad_csv_rows_are_named_and_an_open_quote_does_not_swallow_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\na,b\na\n"x"y,b\na,\xff\nc,d\n"open,e\n')
    rows = rows_of(path)
    bad = [(row.where.rsplit(":", 1)[1], row.why) for row in rows if isinstance(row, BadRow)]
    assert [line for line, _ in bad] == ["3", "4", "5", "7"]
    assert bad[0][1] == "1 fields, where the header has 2"
    assert "expected after" in bad[1][1]
    assert bad[2][1] == "not UTF-8"
    assert "unexpected end of data" in bad[3][1]
    assert [row.values["prompt"] for row in rows if isinstance(row, Row)] == ["a", "c"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "holds no rows"),
        ("header.csv", b"prompt,completion\n", "holds no rows"),
        ("twice.csv", b"text,text\na,b\n", "names text twice"),
        ("one.json", b"3", "holds one int"),
        ("broken.json", b'[{"text": "a"},\n {"text": ]', "line 2 column 11"),
        ("a.parquet", b"PAR1 not really", "damaged Parquet"),
        ("a.docx", b"x", "no reader for .docx"),
        ("utf16.jsonl", '{"text": "a"}'.encode("utf-16"), "not JSON"),
    ],
)
def test_files_that_cannot_be_used_are_one_error(tmp_path, name, content, why):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / name)
    assert why in caught.value.what
    assert name in caught.value.what
    assert "\n" not in caught.value.line()


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (3, "has the entry 3"),
        ({"weight": 1}, "has the entry"),
        ({"path": "a", "wieght": 1}, "unknown key 'wieght'"),
        ({"path": "a", "weight": 0}, "weight 0"),
        ({"path": "a", "weight": True}, "weight True"),
        ({"path": "a", "format": "chatty"}, "format 'chatty'"),
        ({"path": "a", "columns": {"question": "q"}}, "name 'question' on our side"),
        ({"path": "a", "columns": {"text": 0}}, "columns of a are"),
        ({"path": "a", "split": 1}, "split of a is not a text"),
    ],
)
def test_wrong_entries_of_data_train_are_refused(entry, why):
    with pytest.raises(DataError) as caught:
        parse_sources((entry,), "train")
    assert why in caught.value.what


def test_a_format_that_the_columns_do_not_make_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match="lacks the column 'messages'"):
        rows_of(tmp_path / "a.jsonl", format="messages")


def test_urls_are_never_fetched_and_saved_datasets_do_not_lead_outside(tmp_path):
    with pytest.raises(DataError, match="never fetched"):
        rows_of("https://example.org/a.jsonl")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    for name in ("../outside.arrow", str(tmp_path / "outside.arrow"), 3):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match="outside itself"):
            rows_of(folder)
    (folder / "outside.arrow").symlink_to(tmp_path / "outside.arrow")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "outside.arrow"}]}')
    with pytest.raises(DataError, match="outside itself"):
        rows_of(folder)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"]),
    st.one_of(
        st.binary(max_size=80),
        st.text('[]{}",:\\\t\n\r\ufeff\x00ab1', max_size=60).map(str.encode),
    ),
)
def test_any_bytes_are_rows_bad_rows_or_one_error(tmp_path_factory, suffix, content):
    path = tmp_path_factory.mktemp("any") / f"a{suffix}"
    path.write_bytes(content)
    try:
        rows = list(read(Source(str(path))).rows)
    except DataError as failure:
        rows, error = [], failure.what
    else:
        error = path.name
    assert path.name in error
    assert all(isinstance(row, (Row, BadRow)) for row in rows)


def test_real_tables_keep_their_rows_and_quotes(shared_data):
    columns = {"prompt": "English", "completion": "Yoruba"}
    rows = {
        name: values_of(shared_data / f"yoruba/menyo20k/{name}.tsv", columns=columns)
        for name in ("train", "dev", "test")
    }
    assert {name: len(r) for name, r in rows.items()} == {"train": 10070, "dev": 3397, "test": 6633}
    quoted = '"Mum meet Esther, she\'s my friend and I want to marry her"'
    assert rows["train"][1677]["prompt"] == quoted
    assert sum("\t" in field for row in rows["dev"] for field in row.values()) == 1
    assert sum("\ufeff" in field for row in rows["train"] for field in row.values()) == 2
    news = values_of(shared_data / "yoruba/masakhanews/train.tsv")
    assert len(news) == 1_433
    columns = {"prompt": "translation.en", "completion": "translation.pcm"}
    assert len(values_of(shared_data / "pidgin/lafand-mt/train.json", columns=columns)) == 4_790
    assert len(values_of(shared_data / "text/c4_en_minimal.parquet")) == 200
