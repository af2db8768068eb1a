"""The languages of the clients: how an answer is requested, how it ends, and what its events contain.

It knows neither connections nor what an answer should be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 260                                        # some 65 numbers: a second or more beside others
DONE = b"[DONE]"
HEAD = ("id", "created", "model", "system_fingerprint", "object")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of one choice."""

    index: int = 0
    text: str = ""
    reason: str | None = None                           # its finish reason
    logprobs: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Said:
    """The content of an event."""

    head: dict[str, Any] | None = None                  # of the answer, if the event has it
    parts: tuple[Part, ...] = ()
    usage: tuple[int, int] | None = None                # tokens of the prompt, tokens of the answer
    whole: str | None = None                            # the text, repeated as a whole


@dataclass(frozen=True, slots=True)
class Language:
    """`ends` and `fails` are the beginnings of the last event."""

    address: str
    body: Callable[[str], dict[str, Any]]
    read: Callable[[dict[str, Any]], Said]
    ends: tuple[bytes, ...]
    fails: tuple[bytes, ...]
    first: int = 1                                      # number of the first event that a client receives
    has_get: bool = True                                # else a client resumes by repeating the request, with its key
    by_transport: bool = False                          # a transport that resumes by itself: api/client.py


def _chat_body(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, "stream": True,
            "stream_options": {"include_usage": True}}


def _read_chat(chunk: dict[str, Any]) -> Said:
    parts = tuple(Part(choice["index"], choice["delta"].get("content") or "", choice["finish_reason"],
                       (choice["logprobs"] or {}).get("content", ())) for choice in chunk.get("choices", ()))
    usage = chunk.get("usage")
    return Said({name: chunk.get(name) for name in HEAD}, parts,
                usage and (usage["prompt_tokens"], usage["completion_tokens"]))


def _response_body(content: str) -> dict[str, Any]:
    return {"input": content, "max_output_tokens": MAX_TOKENS, "stream": True}


def _background_body(content: str) -> dict[str, Any]:
    return _response_body(content) | {"background": True, "stream": False}


def _read_response(event: dict[str, Any]) -> Said:
    if event["type"] == "response.output_text.delta":
        return Said(parts=(Part(text=event["delta"], logprobs=event["logprobs"]),))
    response = event.get("response")
    if response is None:
        return Said()
    head = {name: response[name] for name in ("id", "created_at", "model", "object")}
    if not (usage := response["usage"]):
        return Said(head)
    whole = "".join(part["text"] for item in response["output"] for part in item["content"])
    return Said(head, (Part(reason=response["status"]),), (usage["input_tokens"], usage["output_tokens"]), whole)


def _message_body(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, "stream": True}


def _read_message(event: dict[str, Any]) -> Said:
    if event["type"] == "message_start":
        return Said({name: event["message"][name] for name in ("id", "model", "role")})
    if event["type"] == "content_block_delta":
        return Said(parts=(Part(text=event["delta"]["text"]),))
    if event["type"] == "message_delta":
        usage = event["usage"]
        return Said(parts=(Part(reason=event["delta"]["stop_reason"]),),
                    usage=(usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]))
    return Said()


CHAT = Language("/v1/chat/completions", _chat_body, _read_chat, (DONE,), (b'{"error"',))
RESPONSES = Language("/v1/responses", _response_body, _read_response,
                     (b'{"type":"response.completed"', b'{"type":"response.incomplete"'),
                     (b'{"type":"response.failed"',), first=0, by_transport=True)
# Begun by one request and read by others, from after its first event.
BACKGROUND = Language("/v1/responses", _background_body, _read_response, RESPONSES.ends, RESPONSES.fails)
MESSAGES = Language("/v1/messages", _message_body, _read_message, (b'{"type":"message_stop"',), (b'{"type":"error"',),
                    has_get=False)
