"""Chat templates: the tokenizer's own, two by name, or a file; and conversations rendered by them.

Templates are jinja text of others, rendered in transformers' sandbox.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune.data.conversations import Unusable
from jaxtune.errors import DataError

# Templates by name, for tokenizers that have none. `plain` needs nothing but an eos token, so it
# suits any base model; `chatml` needs its two marks in the vocabulary.
TEMPLATES = {
    "plain": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '### ' + message['role'] | capitalize + ':\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
# Turn-end tokens of known families: the end of an answer is trained even where a template leaves it
# outside {% generation %}, since a model that never sees it never stops.
TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end|>", "<end_of_turn>", "<turn|>"),
    *(
        "<|end_of_text|>",
        "<|endoftext|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|return|>",
        "</s>",
    ),
)
# Templates that print today's date would give other tokens tomorrow, and no run could be resumed:
# the date stands still on the day that is Llama 3's own default.
FIXED_DAY = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07')"
    " | replace('%Y', '2024') | replace('%y', '24') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%a', 'Fri') | replace('%A', 'Friday') | replace('%H', '00') | replace('%M', '00')"
    " | replace('%S', '00') }}{% endmacro %}{{ '' }}"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(tokenizer: Any, setting: str = "") -> str | None:
    """The jinja text of `data.template`: a name in `TEMPLATES`, a file, or the tokenizer's own.

    Returns None where the tokenizer has none. Raises DataError for a name or file that is not there
    and for a template whose marks the vocabulary lacks.
    """
    if not setting:
        own = tokenizer.chat_template
        return own.get("default") if isinstance(own, dict) else own
    text = TEMPLATES.get(setting)
    if text is None:
        try:
            return Path(setting).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(
                f"data.template {setting!r} is neither a file nor one of {', '.join(TEMPLATES)}",
                fix="a jinja file, or data.template=plain",
            ) from error
    marks = {"plain": [tokenizer.eos_token], "chatml": ["<|im_start|>", "<|im_end|>"]}[setting]
    vocabulary = tokenizer.get_vocab()
    missing = [mark for mark in marks if mark not in vocabulary]
    if missing:
        raise DataError(
            f"data.template {setting!r} needs {' and '.join(map(str, missing))}, "
            "which the tokenizer does not have",
            fix="data.template=plain or a jinja file of its own",
        )
    return text


def render(
    tokenizer: Any,
    template: str,
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None = None,
    *,
    prompting: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The messages as text, and the character ranges that `{% generation %}` marks in it.

    With `prompting` the text ends where the assistant is to speak. Raises Unusable with the
    template's own words where it refuses the messages, DataError where it is not jinja.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    if "strftime_now" in template:
        template = FIXED_DAY + template
    try:
        texts, ranges = render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=bool(GENERATION.search(template)),
            add_generation_prompt=prompting,
            **tokenizer.special_tokens_map,
        )
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not jinja: line {error.lineno}: {error}", fix="data.template"
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise Unusable(f"the chat template refuses it: {error}") from error
    return texts[0], [(int(start), int(end)) for start, end in ranges[0]] if ranges else []
