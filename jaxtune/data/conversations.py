"""Rows that hold a conversation to one form: messages of role and text, and which are trained.

Understood: `messages` (role, content as text or as a list of text parts, optional tool_calls),
ShareGPT `conversations` (from, value), prompt and completion as messages, and Alpaca columns.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Role words of ShareGPT exports (LLaMA-Factory, axolotl, FastChat) -> role words of chat templates.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}
EXTRA_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")


class Unusable(Exception):
    """Why one row cannot be trained on."""


@dataclass(frozen=True)
class Conversation:
    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]  # per message; only assistant messages can be
    tools: list[Any] | None  # JSON schemas, for templates that list them
    chosen: bool  # the row itself says which turns to train


def from_row(kind: str, values: Mapping[str, Any]) -> Conversation:
    """The conversation of a row of this kind. Raises Unusable."""
    tools = _tools(values.get("tools"))
    if kind == "alpaca":
        question = text_of(values, "instruction")
        context = text_of(values, "input")
        # instruction, newline, input: LLaMA-Factory's convention.
        content = f"{question}\n{context}" if context else question
        turns = [("user", content), ("assistant", text_of(values, "output"))]
        messages = [{"role": role, "content": content} for role, content in turns]
        return Conversation(tuple(messages), (False, True), tools, False)
    if kind == "prompt_completion":
        asked = _messages(values["prompt"], "prompt", "user")
        answered = _messages(values["completion"], "completion", "assistant")
        trained = (False,) * len(asked) + tuple(m["role"] == "assistant" for m in answered)
        return Conversation((*asked, *answered), trained, tools, True)
    key = "messages" if kind == "messages" else "conversations"
    raw = values[key]
    messages = _messages(raw, key)
    system = text_of(values, "system") if kind == "sharegpt" else ""
    flags = [_flag(message) for message in raw]
    if system:
        messages, flags = ({"role": "system", "content": system}, *messages), [None, *flags]
    trained = tuple(
        message["role"] == "assistant" and flag is not False
        for message, flag in zip(messages, flags, strict=True)
    )
    chosen = any(
        flag is not None and flag != (message["role"] == "assistant")
        for message, flag in zip(messages, flags, strict=True)
    )
    return Conversation(messages, trained, tools, chosen)


def text_of(values: Mapping[str, Any], name: str) -> str:
    """A column as text; absent and null are empty. Raises Unusable for anything else."""
    value = values.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"{name} is a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{name} holds half a surrogate pair, which is not text") from error
    return value


def _messages(raw: Any, name: str, role: str = "") -> tuple[dict[str, Any], ...]:
    """Checked messages; with `role` a plain text is one message of it."""
    if isinstance(raw, str) and role:
        raw = [{"role": role, "content": raw}]
    if not isinstance(raw, list) or not raw:
        what = "an empty list" if raw == [] else f"a {type(raw).__name__}"
        raise Unusable(f"{name} is {what}, not a list of messages")
    return tuple(_message(message, f"{name}[{n}]") for n, message in enumerate(raw))


def _message(raw: Any, name: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise Unusable(f"{name} is a {type(raw).__name__}, not a message")
    given = raw.get("role", raw.get("from"))
    if not isinstance(given, str) or given not in ROLES:
        raise Unusable(f"{name} has the role {given!r}; known are {', '.join(ROLES)}")
    content = raw.get("content", raw.get("value"))
    kept = {key: raw[key] for key in EXTRA_FIELDS if raw.get(key) is not None}
    return {"role": ROLES[given], "content": _content(content, name, kept), **kept}


def _content(content: Any, name: str, kept: Mapping[str, Any]) -> str:
    """Text, or a list of text parts joined; a tool call may come without content."""
    if content is None and "tool_calls" in kept:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, f"{name}.content[{n}]") for n, part in enumerate(content))
    if content is None:
        raise Unusable(f"{name} has no content")
    return text_of({f"{name}.content": content}, f"{name}.content")


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return text_of({name: part}, name)
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise Unusable(f"{name} is a part of type {kind!r}; only text can be trained on")
    key = "text" if "text" in part else "value"
    if not isinstance(part.get(key), str):
        raise Unusable(f"{name} is a text part without text")
    return text_of({name: part[key]}, name)


def _flag(message: Mapping[str, Any]) -> bool | None:
    """A message's own say in whether it is trained: `loss_weight`, `weight` or `train`."""
    for key in ("loss_weight", "weight", "train"):
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise Unusable(f"{key} is {value!r}; only 0 and 1 are supported")
        return bool(value)
    return None


def _tools(raw: Any) -> list[Any] | None:
    """Tool schemas, which some exports store as JSON text."""
    if isinstance(raw, str) and raw.strip():
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise Unusable(f"tools is not JSON: {error}") from error
    if not raw:
        return None
    if not isinstance(raw, list) or not all(isinstance(tool, dict) for tool in raw):
        raise Unusable("tools is not a list of schemas")
    return raw
