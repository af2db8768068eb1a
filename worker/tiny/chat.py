"""Messages to tokens and back, as the shipped template and tokenizer would, but without the folder.

It knows the chat format only through `tokenizer.CHAT_TEMPLATE`.
"""

import json
from collections.abc import Sequence
from functools import cache

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from worker.tiny.question import Message, Tool
from worker.tiny.tokenizer import CHAT_TEMPLATE, END, END_OF_TEXT, NUM_BYTES, SPECIAL_TOKENS, START, build_tokenizer

PAD_ID = NUM_BYTES + SPECIAL_TOKENS.index(END_OF_TEXT)
START_ID = NUM_BYTES + SPECIAL_TOKENS.index(START)
END_ID = NUM_BYTES + SPECIAL_TOKENS.index(END)


def render(
    messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
) -> str:
    return _template().render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)


def encode(
    messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
) -> list[int]:
    text = render(messages, tools, add_generation_prompt)
    token_ids: list[int] = _tokenizer().encode(text, add_special_tokens=False).ids
    return token_ids


def decode(token_ids: Sequence[int]) -> str:
    return str(_tokenizer().decode(list(token_ids)))


def is_answer(token_ids: Sequence[int]) -> list[bool]:
    """Which tokens the model must produce: what follows `<|im_start|>assistant\\n`, and its `<|im_end|>`."""
    head = [START_ID, *b"assistant\n"]
    mask, inside = [False] * len(token_ids), False
    for i, token_id in enumerate(token_ids):
        mask[i] = inside
        if token_id == END_ID:
            inside = False
        elif list(token_ids[i + 1 - len(head) : i + 1]) == head:
            inside = True
    return mask


@cache
def _tokenizer() -> Tokenizer:
    return build_tokenizer()


@cache
def _template() -> Template:
    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE)
