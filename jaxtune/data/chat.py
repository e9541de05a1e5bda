"""Rows to tokens and masks: which tokens the model sees, and which of them it learns to write.

Prompt and completion meet at the longest common prefix of the tokens of the prompt and of the whole
(TRL's convention). Conversations are rendered by the chat template and their answers found in it:
by `{% generation %}` where the template marks them, else by rendering turn after turn.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxtune.data.conversations import Conversation, Unusable, from_row, text_of
from jaxtune.data.packing import Example
from jaxtune.data.readers import BadRow, Row
from jaxtune.data.templates import TURN_ENDS, render
from jaxtune.errors import DataError

# Preamble of the Stanford Alpaca data, for tokenizers without a chat template.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

NOT_TEMPLATED = (
    "prompt and completion are texts, which do not go through the chat template; "
    "columns named instruction and output do"
)

T = TypeVar("T")


class Encoded(NamedTuple):
    """One result per row, in order, and remarks with the number of rows each concerns."""

    results: list[Example | BadRow]
    remarks: Counter[str]


def encode(
    kind: str,
    rows: Sequence[Row],
    tokenizer: Any,
    template: str | None,
    completion_only: bool = True,
) -> Encoded:
    """Tokens and mask of each row of this kind (`formats.KINDS`).

    A row that cannot be used becomes a `BadRow`. Plain prompts and completions are not put into the
    chat template (TRL's convention); Alpaca rows are, where there is one.

    Raises:
      DataError: for conversations and a tokenizer without a chat template.
    """
    if kind == "tokens":
        known = max(tokenizer.get_vocab().values()) + 1
        return Encoded(
            _each(rows, lambda row: _from_tokens(row, known, completion_only)), Counter()
        )
    if kind == "text":
        return _encode_texts(rows, tokenizer)
    if kind == "alpaca" and template is None:
        return _encode_pairs(rows, tokenizer, completion_only, _alpaca_pair)
    if kind == "prompt_completion":
        return _encode_prompts(rows, tokenizer, template, completion_only)
    return _encode_conversations(kind, rows, tokenizer, template, completion_only)


def prompt_tokens(tokenizer: Any, prompt: str | Sequence[dict], template: str | None) -> list[int]:
    """Token ids to generate from: a plain text as it is, messages through the template."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt, verbose=False)["input_ids"]
        eos = tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids  # some append it by habit
    if template is None:
        raise DataError("the tokenizer has no chat template", fix="data.template=plain")
    text, _ = render(tokenizer, template, prompt, prompting=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _each(rows: Iterable[Row], make: Callable[[Row], T]) -> list[T | BadRow]:
    """`make` of every row; a row that it cannot use is bad."""
    results: list[T | BadRow] = []
    for row in rows:
        try:
            results.append(make(row))
        except Unusable as error:
            results.append(BadRow(row.where, str(error)))
    return results


def _from_tokens(row: Row, known: int, completion_only: bool) -> Example:
    """`input_ids` as they are; `labels` of -100 bear no loss; padding by attention_mask goes."""
    tokens = _integers(row, "input_ids")
    labels, attention = _integers(row, "labels"), _integers(row, "attention_mask")
    if tokens is None:
        raise Unusable("input_ids is missing")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < known:
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise Unusable(f"input_ids holds {wrong}, and the tokenizer has ids 0 to {known - 1}")
    for name, other in (("labels", labels), ("attention_mask", attention)):
        if other is not None and len(other) != len(tokens):
            raise Unusable(f"{name} has {len(other)} entries, input_ids {len(tokens)}")
    mask = np.ones(len(tokens), bool) if labels is None else labels != -100
    if labels is not None and (labels[mask] != tokens[mask]).any():
        raise Unusable("labels differ from input_ids where they are not -100")
    if not completion_only:
        mask = np.ones(len(tokens), bool)
    if attention is not None:
        tokens, mask = tokens[attention != 0], mask[attention != 0]
    return Example(tokens.astype(np.int32), mask, row.where)


def _integers(row: Row, name: str) -> np.ndarray | None:
    value = row.values.get(name)
    if value is None:
        return None
    if not isinstance(value, (list, np.ndarray)) or not all(
        isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in value
    ):
        raise Unusable(f"{name} is not a list of integers")
    try:
        return np.asarray(value, np.int64)
    except OverflowError as error:
        raise Unusable(f"{name} holds a number beyond 64 bits") from error


def _encode_prompts(
    rows: Sequence[Row], tokenizer: Any, template: str | None, completion_only: bool
) -> Encoded:
    """Texts go as they are, lists of messages through the template: each row by its own form."""
    talks = [
        any(isinstance(row.values.get(name), list) for name in ("prompt", "completion"))
        for row in rows
    ]
    plain = [row for row, talk in zip(rows, talks, strict=True) if not talk]
    chats = [row for row, talk in zip(rows, talks, strict=True) if talk]
    by_text = _encode_pairs(plain, tokenizer, completion_only, _plain_pair)
    by_turn = _encode_conversations(
        "prompt_completion", chats, tokenizer, template, completion_only
    )
    if template is not None and plain:
        by_text.remarks[NOT_TEMPLATED] = len(plain)
    queues = {False: iter(by_text.results), True: iter(by_turn.results)}
    return Encoded([next(queues[talk]) for talk in talks], by_text.remarks + by_turn.remarks)


def _plain_pair(row: Row) -> tuple[str, str]:
    return text_of(row.values, "prompt"), text_of(row.values, "completion")


def _alpaca_pair(row: Row) -> tuple[str, str]:
    fields = {name: text_of(row.values, name) for name in ("instruction", "input")}
    prompt = ALPACA_WITH_INPUT if fields["input"] else ALPACA_WITHOUT_INPUT
    return prompt.format(**fields), text_of(row.values, "output")


def _tokenize(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    """Many texts at once: the tokenizer then works on all cores."""
    return tokenizer(texts, return_attention_mask=False, verbose=False, **options)


def _with_eos(ids: list[int], eos: int | None) -> list[int]:
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def _encode_texts(rows: Sequence[Row], tokenizer: Any) -> Encoded:
    """Whole texts, each ended by eos; an empty one has nothing to learn and keeps no mask."""
    texts = _each(rows, lambda row: text_of(row.values, "text"))
    results, remarks = [], Counter()
    good = [text for text in texts if isinstance(text, str)]
    ids = iter(_tokenize(tokenizer, good)["input_ids"] if good else [])
    if tokenizer.eos_token_id is None:
        remarks["the tokenizer has no eos token: texts have no end"] += len(good)
    for row, text in zip(rows, texts, strict=True):
        if isinstance(text, BadRow):
            results.append(text)
            continue
        tokens = np.array(_with_eos(next(ids), tokenizer.eos_token_id), np.int32)
        results.append(Example(tokens, np.full(len(tokens), bool(text.strip())), row.where))
    return Encoded(results, remarks)


def _encode_pairs(
    rows: Sequence[Row],
    tokenizer: Any,
    completion_only: bool,
    pair_of: Callable[[Row], tuple[str, str]],
) -> Encoded:
    pairs = _each(rows, pair_of)
    results, remarks = [], Counter()
    good = [pair for pair in pairs if isinstance(pair, tuple)]
    prompts = iter(
        _tokenize(tokenizer, [prompt for prompt, _ in good])["input_ids"] if good else []
    )
    wholes = iter(_tokenize(tokenizer, [a + b for a, b in good])["input_ids"] if good else [])
    if tokenizer.eos_token_id is None:
        remarks["the tokenizer has no eos token: answers have no end"] += len(good)
    for row, pair in zip(rows, pairs, strict=True):
        if isinstance(pair, BadRow):
            results.append(pair)
            continue
        prompt_ids, whole_ids = next(prompts), next(wholes)
        tokens = np.array(_with_eos(whole_ids, tokenizer.eos_token_id), np.int32)
        boundary = _common_prefix(prompt_ids, whole_ids) if completion_only else 0
        results.append(Example(tokens, np.arange(len(tokens)) >= boundary, row.where))
        remarks.update(_pair_remarks(*pair))
    return Encoded(results, remarks)


def _pair_remarks(prompt: str, completion: str) -> Iterable[str]:
    if not completion.strip():
        yield "the answer is empty: only the end of text is learnt"
    elif prompt and not prompt[-1].isspace() and not completion[0].isspace():
        yield (
            "prompt and completion touch, with no space or line end between them; "
            'columns={"prompt": "{prompt}\\n", ...} can add one'
        )


def _common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    for n, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return n
    return min(len(a), len(b))


def _encode_conversations(
    kind: str, rows: Sequence[Row], tokenizer: Any, template: str | None, completion_only: bool
) -> Encoded:
    if not rows:
        return Encoded([], Counter())
    if template is None:
        raise DataError(
            f"{rows[0].where}: a conversation, and the tokenizer has no chat template",
            fix="data.template=plain (or chatml, or a jinja file)",
        )
    rendered = _each(
        rows, lambda row: _find_answers(tokenizer, template, from_row(kind, row.values))
    )
    results, remarks = [], Counter()
    texts = [result.text for result in rendered if isinstance(result, _Rendered)]
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    encoding = _tokenize(tokenizer, texts, **options) if texts else {}
    ids, offsets = (iter(encoding.get(name, ())) for name in ("input_ids", "offset_mapping"))
    marks = _marks(tokenizer)
    for row, result in zip(rows, rendered, strict=True):
        if isinstance(result, BadRow):
            results.append(result)
            continue
        tokens = np.array(next(ids), np.int32)
        spans_N2 = np.array(next(offsets), np.int64).reshape(-1, 2)
        mask, said = _answer_mask(result, tokens, spans_N2, marks)
        remarks.update({*result.remarks, *said})  # each once a row
        mask = mask if completion_only else np.ones(len(tokens), bool)
        results.append(Example(tokens, mask, row.where))
    return Encoded(results, remarks)


class _Answer(NamedTuple):
    start: int  # characters
    end: int
    exact: bool  # else more than the answer: it ends at the last end-of-turn token in the range


class _Rendered(NamedTuple):
    text: str
    answers: list[_Answer]
    remarks: list[str]


class _Marks(NamedTuple):
    special: np.ndarray  # ids of all added tokens: marks, not text
    ends: np.ndarray  # those that end a turn


def _marks(tokenizer: Any) -> _Marks:
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary[token] for token in TURN_ENDS if token in vocabulary} & special
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return _Marks(np.array(sorted(special), np.int64), np.array(sorted(ends), np.int64))


def _find_answers(tokenizer: Any, template: str, conversation: Conversation) -> _Rendered:
    """The conversation as text, and where its trained answers stand in it."""
    messages, tools = list(conversation.messages), conversation.tools
    text, marked = render(tokenizer, template, messages, tools)
    said = []
    if tools and "tools" not in template:
        said.append("the template does not show tools, so the tools column is not used")
    if marked and not conversation.chosen:
        return _Rendered(text, [_Answer(*span, True) for span in marked], said)
    answers = []
    for turn, trained in enumerate(conversation.trained):
        if not trained:
            continue
        before = render(tokenizer, template, messages[:turn], tools)[0] if turn else ""
        asked, _ = render(tokenizer, template, messages[:turn], tools, prompting=True)
        # The prefix property: what comes before an answer is how the whole begins.
        start = _common_prefix(asked, text)
        if start >= len(before):
            answers.append(_find_end(tokenizer, template, conversation, turn, start, text))
        else:
            said.append("an answer is not where its question ends, so it is not trained")
    return _Rendered(text, answers, said)


def _find_end(
    tokenizer: Any, template: str, conversation: Conversation, turn: int, start: int, text: str
) -> _Answer:
    """Where the answer of this turn ends in the whole text."""
    messages, tools = list(conversation.messages), conversation.tools
    if turn + 1 == len(messages):
        return _Answer(start, len(text), True)
    after, _ = render(tokenizer, template, messages[: turn + 1], tools)
    if text.startswith(after) and len(after) > start:
        return _Answer(start, len(after), True)
    # Some templates (Qwen 3) render the last answer otherwise than earlier ones. Then the answer
    # goes no further than the next message, which begins where another text makes a difference.
    following = messages[turn + 1]
    other = {**following, "content": "b" if following["content"].lstrip()[:1] == "a" else "a"}
    probe, _ = render(tokenizer, template, [*messages[: turn + 1], other], tools)
    return _Answer(start, _common_prefix(probe, text), False)


def _answer_mask(
    rendered: _Rendered, tokens: np.ndarray, spans_N2: np.ndarray, marks: _Marks
) -> tuple[np.ndarray, list[str]]:
    """The tokens of the answers, each from its first token to the token that ends the turn."""
    mask = np.zeros(len(tokens), bool)
    said = []
    special, ends = np.isin(tokens, marks.special), np.isin(tokens, marks.ends)
    for start, end, exact in rendered.answers:
        inside = np.flatnonzero((spans_N2[:, 1] > start) & (spans_N2[:, 0] < end))
        if not inside.size:
            continue
        first, last = inside[0], inside[-1]
        stops = inside[ends[inside]]
        # White space after the end of the turn belongs to the template, not to the answer.
        if stops.size and not (exact and rendered.text[spans_N2[stops[-1], 1] : end].strip()):
            last = stops[-1]
        elif not exact:
            said.append("the end of an answer was not found, so it is not trained")
            continue
        elif last + 1 < len(tokens) and ends[last + 1] and not special[last]:
            last += 1
            said.append("the end of the turn stands outside {% generation %}; it is trained too")
        elif not special[last]:
            said.append("an answer ends without an end-of-turn token, so the model learns no stop")
        mask[first : last + 1] = True
    return mask, said
