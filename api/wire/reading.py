"""How an answer is parsed (tool dialect and reasoning): chosen from chat template, prompt and request when the job is
made, and kept in the header of its log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api.wire.dialects import Dialect, choose_dialect
from api.wire.dialects.dialect import AddedId
from api.wire.reasoning import BEGIN, END, Mode, mode_of

MAX_OPENING_TOKENS = 16                                 # at a prompt's end, in which a template may open reasoning


@dataclass(frozen=True, slots=True)
class Reading:
    dialect: Dialect | None = None
    reasoning: Mode = ""
    think_end_id: int | None = None                     # the token that ends reasoning, if it is a single token
    shown_token_ids: tuple[int, ...] = ()               # special tokens that the text must show
    typed_arguments: tuple[str, ...] = ()               # tool arguments that are not strings

    @classmethod
    def of(cls, prompt: Sequence[int], templates: Iterable[str], added_id: AddedId, *, wanted: str,
           tools: Sequence[Mapping[str, Any]] | None, keeps_form: bool = False,
           decode: Callable[[Sequence[int]], str] = lambda _: "") -> Reading:
        """`wanted` is the setting `tool_dialect`; `tools` are those that the request offers. In an answer with a
        constraint, text that only looks like a call is not one. `decode` shows special tokens."""
        templates = list(templates)
        chosen = choose_dialect(wanted, templates, has_tools=bool(tools))
        dialect = chosen.of(added_id) if chosen else None
        if dialect and dialect.is_leading and keeps_form:
            dialect = None
        begin_id, end_id = added_id(BEGIN), added_id(END)
        ending = prompt[-MAX_OPENING_TOKENS:]
        reasoning = mode_of(ending, begin_id, end_id, templates, decode(ending) if begin_id is None else "")
        if dialect and dialect.end_of_thought:
            reasoning, end_id = "", added_id(dialect.end_of_thought)
        elif not reasoning:
            end_id = None
        markers = (dialect.markers if dialect else ()) + ((BEGIN, END) if reasoning else ())
        shown = (token_id for token_id in map(added_id, markers) if token_id is not None)
        typed = dialect.typed_arguments(tool["function"] for tool in tools) if dialect and tools else ()
        return cls(dialect, reasoning, end_id, tuple(shown), typed)
