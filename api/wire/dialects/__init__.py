"""How models write tool calls, and some their reasoning, as text: a small module per family.

A dialect is recognised by words in the model's chat template. Its grammar makes a model call a tool; its reader finds
calls that a model makes by itself, however the text is split. It knows text, nothing of events or requests.
"""

from __future__ import annotations

from collections.abc import Iterable

from api.wire.dialects.deepseek import DEEPSEEK
from api.wire.dialects.dialect import MAX_HEAD_CHARS, MAX_NAME_CHARS, Dialect, Piece, Reader
from api.wire.dialects.harmony import HARMONY
from api.wire.dialects.json_calls import HERMES, LLAMA
from api.wire.dialects.mistral import MISTRAL
from api.wire.dialects.pythonic import PYTHONIC
from api.wire.dialects.qwen_coder import QWEN_CODER

__all__ = ["CHOICES", "DEEPSEEK", "DIALECTS", "HARMONY", "HERMES", "LLAMA", "MAX_HEAD_CHARS", "MAX_NAME_CHARS",
           "MISTRAL", "PYTHONIC", "QWEN_CODER", "Dialect", "Piece", "Reader", "choose_dialect", "dialect_of"]

# Those with unique signs come first.
CHOICES = (HARMONY, DEEPSEEK, PYTHONIC, QWEN_CODER, HERMES, MISTRAL, LLAMA)
DIALECTS = {dialect.name: dialect for choice in CHOICES
            for dialect in (choice, choice.without_tools, choice.with_tokens) if dialect}


def choose_dialect(wanted: str, templates: Iterable[str], *, has_tools: bool = True) -> Dialect | None:
    """The dialect that the operator names, or that a template shows."""
    found = dialect_of(templates) if wanted in ("auto", "none") else DIALECTS[wanted]
    return found if has_tools and wanted != "none" else found and found.without_tools


def dialect_of(templates: Iterable[str]) -> Dialect | None:
    """The dialect in which a chat template shows calls."""
    texts = list(templates)
    return next((dialect for dialect in CHOICES if any(map(dialect.is_shown_by, texts))), None)
