"""Tokens and masks: read off as text, with the learnt part in brackets."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data import chat
from jaxtune.data.formats import KINDS
from jaxtune.data.packing import Example
from jaxtune.data.readers import BadRow, Row
from jaxtune.data.templates import TEMPLATES, chat_template, render
from jaxtune.errors import DataError
from tests.byte_tokenizer import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "Bye"},
]


def encode(kind, values, tokenizer, template=None, completion_only=True):
    return chat.encode(kind, [Row(values, "f:1")], tokenizer, template, completion_only)


def drawn(encoded, tokenizer) -> str:
    """The text of the one result, what bears loss in brackets."""
    (example,) = encoded.results
    assert isinstance(example, Example), example
    text, inside = "", False
    for token, learnt in zip(example.tokens.tolist(), example.mask.tolist(), strict=True):
        if learnt != inside:
            text += "[" if learnt else "]"
        text += tokenizer.decode([token])
        inside = learnt
    return text + "]" * inside


def why(encoded) -> str:
    (bad,) = encoded.results
    assert isinstance(bad, BadRow), bad
    return bad.why


def test_prompt_and_completion_meet_at_the_common_prefix_and_end_in_eos():
    tokenizer = byte_tokenizer(bos=True)
    row = {"prompt": "2+2=", "completion": " 4"}
    encoded = encode("prompt_completion", row, tokenizer)
    assert drawn(encoded, tokenizer) == "<s>2+2=[ 4</s>]"
    ended = encode("prompt_completion", {**row, "completion": " 4</s>"}, tokenizer)
    assert drawn(ended, tokenizer) == "<s>2+2=[ 4</s>]"  # not doubled
    everything = encode("prompt_completion", row, tokenizer, completion_only=False)
    assert drawn(everything, tokenizer) == "[<s>2+2= 4</s>]"
    assert everything.results[0].loss_tokens == 7  # type: ignore[union-attr]  # drawn checked it


def test_a_token_that_straddles_the_boundary_is_learnt(shared_data):
    from jaxtune.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared_data / "tokenizers/gpt2"))
    encoded = encode("prompt_completion", {"prompt": "Hel", "completion": "lo there"}, tokenizer)
    assert drawn(encoded, tokenizer) == "[Hello there<|endoftext|>]"


def test_touching_prompts_and_empty_answers_are_remarked_upon():
    tokenizer = byte_tokenizer()
    touching = encode("prompt_completion", {"prompt": "a", "completion": "b"}, tokenizer)
    assert any("touch" in remark for remark in touching.remarks)
    spaced = encode("prompt_completion", {"prompt": "a\n", "completion": "b"}, tokenizer)
    assert not spaced.remarks
    empty = encode("prompt_completion", {"prompt": "a\n", "completion": ""}, tokenizer)
    assert drawn(empty, tokenizer) == "a\n[</s>]"
    assert any("empty" in remark for remark in empty.remarks)


def test_alpaca_takes_the_preamble_without_a_template_and_turns_with_one():
    tokenizer = byte_tokenizer()
    row = {"instruction": "Add {x}", "input": "1, 2", "output": "3"}
    text = drawn(encode("alpaca", row, tokenizer), tokenizer)
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd {x}\n\n### Input:\n1, 2\n\n### Response:\n[3</s>]")
    bare = drawn(encode("alpaca", {**row, "input": None}, tokenizer), tokenizer)
    assert bare.endswith("### Instruction:\nAdd {x}\n\n### Response:\n[3</s>]")
    assert drawn(encode("alpaca", row, tokenizer, CHATML), tokenizer) == (
        "<|im_start|>user\nAdd {x}\n1, 2<|im_end|>\n<|im_start|>assistant\n[3<|im_end|>]\n"
    )


def test_texts_are_learnt_whole_and_empty_ones_not_at_all():
    tokenizer = byte_tokenizer(bos=True)
    assert drawn(encode("text", {"text": "ọ̀rọ̀"}, tokenizer), tokenizer).startswith("[<s>")
    (example,) = encode("text", {"text": "ab"}, tokenizer).results
    assert tokenizer.decode(example.tokens) == "<s>ab</s>"  # type: ignore[union-attr]  # an Example
    (empty,) = encode("text", {"text": " \n"}, tokenizer).results
    assert empty.loss_tokens == 0  # type: ignore[union-attr]  # an Example
    without = encode("text", {"text": "ab"}, byte_tokenizer(eos=None))
    assert without.remarks["the tokenizer has no eos token: texts have no end"] == 1


def test_rendering_turn_by_turn_finds_every_answer_and_its_end():
    tokenizer = byte_tokenizer(bos=True)  # bos by habit must not join what a template rendered
    assert drawn(encode("messages", {"messages": TALK}, tokenizer, CHATML), tokenizer) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yo<|im_end|>]\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n[Bye<|im_end|>]\n"
    )


def test_generation_marks_and_turn_by_turn_rendering_agree():
    tokenizer = byte_tokenizer()
    for template in TEMPLATES.values():
        assert "{% generation %}" in template
        unmarked = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        by_marks = encode("messages", {"messages": TALK}, tokenizer, template)
        by_turns = encode("messages", {"messages": TALK}, tokenizer, unmarked)
        assert drawn(by_marks, tokenizer) == drawn(by_turns, tokenizer)
        assert not by_marks.remarks + by_turns.remarks


def test_the_plain_template_reads_as_documented():
    tokenizer = byte_tokenizer(bos=True)
    text = drawn(
        encode("messages", {"messages": TALK[:2]}, tokenizer, TEMPLATES["plain"]), tokenizer
    )
    assert text == "<s>### User:\nHi\n\n### Assistant:\n[Yo</s>]\n\n"
    prompt = chat.prompt_tokens(tokenizer, TALK[:1], TEMPLATES["plain"])
    assert tokenizer.decode(prompt) == "<s>### User:\nHi\n\n### Assistant:\n"


def test_an_end_of_turn_outside_the_generation_marks_is_learnt_and_said():
    tokenizer = byte_tokenizer()
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    )
    encoded = encode("messages", {"messages": TALK[:2]}, tokenizer, template)
    assert drawn(encoded, tokenizer) == "user:Hi</s>assistant:[Yo</s>]"
    assert any("outside {% generation %}" in remark for remark in encoded.remarks)


def test_a_template_without_an_end_of_turn_is_remarked_upon():
    tokenizer = byte_tokenizer()
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoded = encode("messages", {"messages": TALK[:2]}, tokenizer, template)
    assert drawn(encoded, tokenizer) == "user:Hi\nassistant:[Yo\n]"
    assert any("learns no stop" in remark for remark in encoded.remarks)


def test_a_template_that_renders_the_last_answer_otherwise_still_gives_every_answer():
    # As Qwen 3: an empty thought stands before the last answer only.
    tokenizer = byte_tokenizer()
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<t></t>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert drawn(encode("messages", {"messages": TALK}, tokenizer, template), tokenizer) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yo<|im_end|>]\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n[<t></t>Bye<|im_end|>]\n"
    )


def test_messages_say_themselves_whether_they_are_trained():
    tokenizer = byte_tokenizer()
    talk = [{**m, "loss_weight": float(n == 3)} for n, m in enumerate(TALK)]
    text = drawn(encode("messages", {"messages": talk}, tokenizer, TEMPLATES["chatml"]), tokenizer)
    assert text.count("[") == 1
    assert "[Bye<|im_end|>]" in text
    half = [{**m, "loss_weight": 0.5} for m in TALK]
    assert "only 0 and 1" in why(encode("messages", {"messages": half}, tokenizer, CHATML))


def test_sharegpt_roles_are_mapped_and_tools_reach_the_template():
    tokenizer = byte_tokenizer()
    turns = [("human", "a"), ("function_call", "{}"), ("observation", "r"), ("gpt", "b")]
    row = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "system": "s",
        "tools": json.dumps([{"name": "f"}]),
    }
    template = "{% for t in tools %}{{ t.name }};{% endfor %}" + CHATML
    assert drawn(encode("sharegpt", row, tokenizer, template), tokenizer) == (
        "f;<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\n[{}<|im_end|>]\n<|im_start|>tool\nr<|im_end|>\n"
        "<|im_start|>assistant\n[b<|im_end|>]\n"
    )
    untold = encode("sharegpt", row, tokenizer, CHATML)
    assert any("tools column is not used" in remark for remark in untold.remarks)


def test_prompts_and_completions_as_messages_go_through_the_template_row_by_row():
    tokenizer = byte_tokenizer()
    rows = [
        Row({"prompt": "p\n", "completion": "c"}, "f:1"),
        Row({"prompt": TALK[:3], "completion": TALK[3:]}, "f:2"),
        Row({"prompt": TALK[:1], "completion": "Yo"}, "f:3"),
    ]
    encoded = chat.encode("prompt_completion", rows, tokenizer, CHATML)
    texts = [drawn(chat.Encoded([r], encoded.remarks), tokenizer) for r in encoded.results]
    assert texts == [
        "p\n[c</s>]",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n[Bye<|im_end|>]\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yo<|im_end|>]\n",
    ]
    assert encoded.remarks[chat.NOT_TEMPLATED] == 1


def test_content_may_be_text_parts_and_images_are_refused():
    tokenizer = byte_tokenizer()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}, "c"]
    talk = [{"role": "user", "content": parts}, TALK[1]]
    assert "user\nabc<|im_end|>" in drawn(
        encode("messages", {"messages": talk}, tokenizer, CHATML), tokenizer
    )
    talk = [{"role": "user", "content": [{"type": "image", "url": "x"}]}, TALK[1]]
    said = why(encode("messages", {"messages": talk}, tokenizer, CHATML))
    assert said == "messages[0].content[0] is a part of type 'image'; only text can be trained on"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "an empty list"),
        ("hello", "a str, not a list of messages"),
        (3, "a int, not a list of messages"),
        ([3], "messages[0] is a int, not a message"),
        ([{"content": "a"}], "messages[0] has the role None"),
        ([{"role": "wizard", "content": "a"}], "the role 'wizard'; known are"),
        ([{"role": "user"}], "messages[0] has no content"),
        ([{"role": "user", "content": 3}], "messages[0].content is a int, not text"),
        ([{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
    ],
)
def test_conversations_that_are_none_are_bad_rows(messages, said):
    assert said in why(encode("messages", {"messages": messages}, byte_tokenizer(), CHATML))


def test_what_a_template_refuses_is_a_bad_row_and_a_broken_template_an_error():
    tokenizer = byte_tokenizer()
    refusing = "{{ raise_exception('roles must alternate') }}"
    said = why(encode("messages", {"messages": TALK}, tokenizer, refusing))
    assert said == "the chat template refuses it: roles must alternate"
    with pytest.raises(DataError, match="not jinja: line 1"):
        encode("messages", {"messages": TALK}, tokenizer, "{% if %}")
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    assert "unsafe" in why(encode("messages", {"messages": TALK}, tokenizer, attack))


def test_a_conversation_without_a_template_says_what_to_do():
    with pytest.raises(DataError) as caught:
        encode("messages", {"messages": TALK}, byte_tokenizer())
    assert "f:1" in caught.value.what
    assert "data.template=plain" in caught.value.fix


def test_templates_that_print_the_date_print_the_same_one_every_day():
    tokenizer = byte_tokenizer()
    text, _ = render(tokenizer, "\n{{ strftime_now('%d %b %Y') }}", TALK)
    assert text == "\n26 Jul 2024"
    guarded = "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}{% endif %}"
    assert render(tokenizer, guarded, TALK)[0] == "2024-07-26"


def test_the_template_setting_is_a_name_a_file_or_the_tokenizers_own(tmp_path):
    (tmp_path / "t.jinja").write_text("mine", encoding="utf-8")
    tokenizer = byte_tokenizer(template="own")
    assert chat_template(tokenizer) == "own"
    assert chat_template(byte_tokenizer()) is None
    assert chat_template(tokenizer, str(tmp_path / "t.jinja")) == "mine"
    assert chat_template(tokenizer, "chatml") == TEMPLATES["chatml"]
    with pytest.raises(DataError, match="neither a file nor one of plain, chatml"):
        chat_template(tokenizer, "chatlm")
    with pytest.raises(DataError, match="needs None"):
        chat_template(byte_tokenizer(eos=None), "plain")


def test_token_rows_are_taken_as_they_are():
    tokenizer = byte_tokenizer()
    row = {"input_ids": [5, 6, 7, 0], "labels": [-100, -100, 7, -100]}
    (example,) = encode("tokens", {**row, "attention_mask": [1, 1, 1, 0]}, tokenizer).results
    assert isinstance(example, Example)
    assert example.tokens.tolist() == [5, 6, 7]
    assert example.mask.tolist() == [False, False, True]
    (plain,) = encode("tokens", {"input_ids": np.array([5, 6])}, tokenizer).results
    assert plain.mask.all()  # type: ignore[union-attr]  # an Example


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": "5 6"}, "input_ids is not a list of integers"),
        ({"input_ids": [1.5]}, "input_ids is not a list of integers"),
        ({"input_ids": [True]}, "input_ids is not a list of integers"),
        ({"input_ids": [1 << 70]}, "beyond 64 bits"),
        ({"input_ids": [260]}, "holds 260, and the tokenizer has ids 0 to 259"),
        ({"input_ids": [-1]}, "holds -1"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, input_ids 2"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "labels differ from input_ids"),
    ],
)
def test_token_rows_that_cannot_be_right_are_bad(row, said):
    assert said in why(encode("tokens", row, byte_tokenizer()))


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls"]),
            st.one_of(st.sampled_from(["user", "assistant", "human", "text"]), inner),
            max_size=4,
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_any_values_are_an_example_or_a_bad_row(kind, data):
    needed, optional = KINDS[kind]
    values = {name: data.draw(anything) for name in needed + optional}
    (result,) = encode(kind, values, byte_tokenizer(), TEMPLATES["chatml"]).results
    assert isinstance(result, (Example, BadRow))
    if isinstance(result, Example):
        assert len(result.tokens) == len(result.mask)


def test_real_templates_and_conversations(shared_data, tmp_path):
    import gzip
    import shutil

    from jaxtune.hf.tokenizer import load_tokenizer

    real = shared_data / "tokenizers/deepseek-r1"
    shutil.copy(real / "tokenizer_config.json", tmp_path)
    content = gzip.decompress((real / "tokenizer.json.gz").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(content)
    tokenizer = load_tokenizer(str(tmp_path))
    bar, block = "\uff5c", "\u2581"
    end = f"<{bar}end{block}of{block}sentence{bar}>"
    template = chat_template(tokenizer)
    assert drawn(encode("messages", {"messages": TALK}, tokenizer, template), tokenizer) == (
        f"<{bar}begin{block}of{block}sentence{bar}><{bar}User{bar}>Hi<{bar}Assistant{bar}>[Yo{end}]"
        f"<{bar}User{bar}>So?<{bar}Assistant{bar}>[Bye{end}]"
    )
    lines = (shared_data / "instruct/v1_sft_messages.jsonl").read_text("utf-8").splitlines()[:50]
    rows = [Row(json.loads(line), f"f:{n}") for n, line in enumerate(lines)]
    for result in chat.encode("messages", rows, tokenizer, template).results:
        assert isinstance(result, Example)
        assert tokenizer.decode(result.tokens[result.mask]).endswith(end)
