"""The items of an answer in the language of responses, as they grow, and the events that report it.

It knows deltas and items, nothing of the response around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from api.wire.chat import logprobs_body
from api.wire.fold import TokenBytes
from api.wire.items import item_id
from api.wire.parts import Parts
from shared.job import Delta, Header, TokenLogprob

Event = tuple[str, dict[str, Any]]                      # its type and its content
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
KINDS = {"text": "message", "reasoning": "reasoning", "call": "function_call", "arguments": "function_call"}
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class Output:
    def __init__(self, completion_id: str, header: Header, token_bytes: TokenBytes) -> None:
        self.items: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self.parts = Parts(completion_id, header, 0)
        self._id = completion_id
        self._token_bytes = token_bytes
        self._has_logprobs = header.logprobs
        self._is_open = False
        self._grown: list[str] = []                     # of the open item: appending to one string would copy it
        self._untold: list[TokenLogprob] = []           # of tokens without text of their own: partial characters

    def read(self, delta: Delta) -> Iterator[Event]:
        """What the next delta of the answer changes. Use each event before requesting the next."""
        self._untold += delta.logprobs if self._has_logprobs else ()
        shows = False
        for piece in self.parts.read(delta):
            kind, shows = KINDS[piece.kind], True
            if piece.kind == "call" or not self._is_open or self.items[-1]["type"] != kind:
                yield from self._close("completed")
                yield from self._open(kind, piece.value)
            if piece.kind == "arguments":
                self._grown.append(piece.value)
                yield "response.function_call_arguments.delta", self._place() | {"delta": piece.value}
            elif piece.kind != "call":
                yield self._grow(kind, piece.value)
        if shows:
            self._untold = []                           # reasoning and calls have no log probabilities
        if delta.finish_reason:
            self.finish_reason = delta.finish_reason
            if self._untold and self._is_open and self.items[-1]["type"] == "message":
                yield self._grow("message", "")
            is_cut = delta.finish_reason == "length" or (
                self._is_open and self.items[-1]["type"] == "function_call" and not self.parts.is_call_whole)
            yield from self._close("incomplete" if is_cut else "completed")

    def _open(self, kind: str, name: str) -> Iterator[Event]:
        item: dict[str, Any] = {"id": item_id(PREFIXES[kind], len(self.items), self._id), "type": kind,
                                "status": "in_progress"}
        if kind == "function_call":
            item |= {"call_id": self.parts.call_id, "name": name, "arguments": ""}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            item |= {"role": "assistant", "content": []}
        self.items.append(item)
        self._is_open = True
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": item}
        if kind in PARTS:
            part: dict[str, Any] = {"type": PARTS[kind], "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
            item["content"] = [part]
            yield "response.content_part.added", self._part_place() | {"part": part}

    def _grow(self, kind: str, text: str) -> Event:
        self._grown.append(text)
        if kind == "reasoning":
            return "response.reasoning_text.delta", self._part_place() | {"delta": text}
        logprobs, self._untold = logprobs_body(self._untold, self._token_bytes), []
        self.items[-1]["content"][0]["logprobs"] += logprobs
        return "response.output_text.delta", self._part_place() | {"delta": text, "logprobs": logprobs}

    def settle(self) -> list[dict[str, Any]]:
        """The items as they stand."""
        if self._is_open and self._grown:
            item, grown = self.items[-1], "".join(self._grown)
            if item["type"] == "function_call":
                item["arguments"] = grown
            else:
                item["content"][0]["text"] = grown
        return self.items

    def cut(self) -> None:
        """The answer was ended from outside: only the items themselves show it."""
        if self._is_open:
            self.settle()
            self.items[-1]["status"], self._is_open = "incomplete", False

    def _close(self, status: str) -> Iterator[Event]:
        if not self._is_open:
            return
        self.settle()
        item, self._is_open, self._grown = self.items[-1], False, []
        item["status"] = status
        if item["type"] == "function_call":
            yield "response.function_call_arguments.done", self._place() | {
                "name": item["name"], "arguments": item["arguments"]}
        else:
            part, name = item["content"][0], PARTS[item["type"]]
            logprobs = {"logprobs": part["logprobs"]} if name == "output_text" else {}
            yield f"response.{name}.done", self._part_place() | {"text": part["text"]} | logprobs
            yield "response.content_part.done", self._part_place() | {"part": part}
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _part_place(self) -> dict[str, Any]:
        return self._place() | {"content_index": 0}
