"""Chooses the fold for the language in which an answer was requested. It knows only the names of languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.wire.chat import ChunkFold, CompletionFold
from api.wire.completions import TextChunkFold, TextFold
from api.wire.fold import EventFold, TokenBytes, WholeFold
from api.wire.message_fold import MessageEventFold, MessageFold
from api.wire.response_fold import ResponseFold, ResponseWhole
from shared.job import Header, Language

Asked = Mapping[str, Any]
"""What was asked for, as far as the answer repeats it."""

ID_KINDS: dict[Language, str] = {"chat": "chatcmpl-", "completions": "cmpl-", "responses": "resp_", "messages": "msg_"}


def num_events_until(language: Language, position: int | None) -> int:
    """The number of events that a client has whose last one has this position."""
    if position is None:
        return 0
    return position + 1 if language == "responses" else position


def event_fold(completion_id: str, header: Header, token_bytes: TokenBytes, asked: Asked | None = None, *,
               after: int = 0, is_numbered: bool = True) -> EventFold:
    """The fold of a stream that continues after its first `after` events. OpenAI's older APIs number no events, and
    many of their clients read lines of data alone: there only who returns needs numbers."""
    if header.language == "responses":
        return ResponseFold(completion_id, header, token_bytes, asked or {}, after)
    if header.language == "messages":
        return MessageEventFold(completion_id, header, after)
    fold = (TextChunkFold(completion_id, header, after) if header.language == "completions" else
            ChunkFold(completion_id, header, token_bytes, after))
    fold.is_numbered = is_numbered
    return fold


def whole_fold(completion_id: str, header: Header, token_bytes: TokenBytes, asked: Asked | None = None) -> WholeFold:
    if header.language == "responses":
        return ResponseWhole(completion_id, header, token_bytes, asked or {})
    if header.language == "completions":
        return TextFold(completion_id, header)
    if header.language == "messages":
        return MessageFold(completion_id, header)
    return CompletionFold(completion_id, header, token_bytes)
