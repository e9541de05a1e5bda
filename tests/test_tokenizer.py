"""Tokenizers: ids as published, damage as one error, nothing of the folder ever run."""

import json
import shutil

import pytest

from jaxtune.errors import ModelError
from jaxtune.hf.tokenizer import load_tokenizer, stop_ids, tokenizer_digest, tokenizer_files
from tests.byte_tokenizer import byte_tokenizer


@pytest.fixture
def saved(tmp_path):
    """A folder with a tokenizer.json of ours."""
    byte_tokenizer(bos=True, template="T").save_pretrained(str(tmp_path))
    return tmp_path


def vectors(folder):
    texts = (folder / "vectors.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = (folder / "vectors.out").read_text().split("\n")
    return list(zip(texts, [[int(i) for i in line.split()] for line in ids], strict=True))


@pytest.mark.parametrize("name", ["llama2", "gpt2"])
def test_published_vectors_are_reproduced(shared_data, name):
    folder = shared_data / "tokenizers" / name
    tokenizer = load_tokenizer(str(folder))
    wrong = [
        text
        for text, ids in vectors(folder)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids
    ]
    assert len(vectors(folder)) == 47
    assert not wrong


def test_a_bare_sentencepiece_file_agrees_with_sentencepiece_itself(shared_data, tmp_path):
    import sentencepiece

    file = shared_data / "stories260k-hf" / "tokenizer.model"
    shutil.copy(file, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), 512)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(file))
    text = (shared_data / "text" / "tinystories.txt").read_text(encoding="utf-8")
    lines = [*text.split("\n")[:400], " two  spaces ", "ọ̀rọ̀ 🦙\n\t", ""]
    assert tokenizer(lines, add_special_tokens=False)["input_ids"] == truth.encode(lines)
    assert tokenizer("One day")["input_ids"] == [1, *truth.encode("One day")]
    assert tokenizer.decode(truth.encode("One day, ọ̀rọ̀")) == "One day, ọ̀rọ̀"
    whole = load_tokenizer(str(shared_data / "stories260k-hf"), 512)
    assert tokenizer.get_vocab() == whole.get_vocab()


def test_settings_beside_a_sentencepiece_file_are_kept(shared_data, tmp_path):
    shutil.copy(shared_data / "stories260k-hf" / "tokenizer.model", tmp_path)
    settings = {"add_bos_token": False, "add_eos_token": True, "chat_template": "mine"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer("a")["input_ids"]
    assert (ids[0] != 1, ids[-1]) == (True, 2)
    assert tokenizer.chat_template == "mine"
    assert tokenizer.pad_token is None


def test_ids_beyond_the_embedding_name_the_token(saved):
    assert load_tokenizer(str(saved), 260).chat_template == "T"
    with pytest.raises(ModelError, match=r"token '<\|im_end\|>' has id 259, and the embedding has"):
        load_tokenizer(str(saved), 259)


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _no_model(content: bytes) -> bytes:
    return json.dumps({**json.loads(content), "model": {"type": "Nonsense"}}).encode()


def _panic_on_load(content: bytes) -> bytes:
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    return json.dumps({**json.loads(content), "normalizer": normalizer}).encode()


def _panic_on_use(content: bytes) -> bytes:
    document = json.loads(content)
    document["post_processor"]["special_tokens"].clear()
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "JSONDecodeError"),
        (_no_model, "is damaged"),
        (_panic_on_load, "PanicException: Precompiled"),
        (_panic_on_use, "PanicException: no entry found for key"),
        (lambda content: b"", "is damaged"),
        (lambda content: b"[1, 2]", "is damaged"),
    ],
    ids=["cut", "no model", "panic on load", "panic on use", "empty", "a list"],
)
def test_damaged_files_are_one_error(saved, damage, said):
    file = saved / "tokenizer.json"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(saved))
    assert str(saved) in caught.value.what
    assert said in caught.value.what
    assert "\n" not in caught.value.line()


def test_an_interrupt_is_not_taken_for_damage(saved, monkeypatch):
    import transformers

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(str(saved))


def test_broken_sentencepiece_files_and_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_tokenizer(str(tmp_path / "none"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"has no tokenizer; it has model\.safetensors"):
        load_tokenizer(str(tmp_path))
    for content in (b"not a model", b"", b"IQ== 0\nIg== 1\n"):  # the last is tiktoken's form
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ModelError, match="sentencepiece"):
            load_tokenizer(str(tmp_path))


def test_vocabularies_of_an_unknown_class_are_refused(shared_data, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "tokenizers" / "gpt2" / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(ModelError, match="of a CLIPTokenizer; known are"):
        load_tokenizer(str(tmp_path))


def test_code_that_a_folder_names_is_never_run(saved):
    settings = saved / "tokenizer_config.json"
    document = json.loads(settings.read_text())
    document["auto_map"] = {"AutoTokenizer": ["canary.Canary", "canary.Canary"]}
    document["tokenizer_class"] = "Canary"
    settings.write_text(json.dumps(document))
    (saved / "canary.py").write_text(f"open({str(saved / 'ran')!r}, 'w')")
    assert load_tokenizer(str(saved)).encode("a")
    assert not (saved / "ran").exists()


def test_stop_ids_join_the_generation_config_the_tokenizer_and_ends_of_turns():
    tokenizer = byte_tokenizer()  # 257 is its eos, 259 <|im_end|>
    assert stop_ids(tokenizer) == (257, 259)
    assert stop_ids(tokenizer, {"eos_token_id": [258, 257]}) == (257, 258, 259)
    assert stop_ids(tokenizer, {"eos_token_id": 3}) == (3, 257, 259)
    both = (257, 259)  # </s> ends a turn whatever the tokenizer calls its eos
    assert stop_ids(byte_tokenizer(eos=None), {"eos_token_id": None}) == both


def test_files_and_digest_cover_all_that_belongs_to_a_tokenizer(saved):
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    (saved / "config.json").write_text("{}")
    assert [file.name for file in tokenizer_files(str(saved))] == names
    before = tokenizer_digest(str(saved))
    (saved / "config.json").write_text('{"a": 1}')
    assert tokenizer_digest(str(saved)) == before
    extra = saved / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool.jinja").write_text("t")
    assert tokenizer_files(str(saved))[0] == extra / "tool.jinja"
    assert tokenizer_digest(str(saved)) != before
