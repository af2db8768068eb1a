"""Harmony, the format of gpt-oss: messages with a channel and perhaps a recipient, the last one without an end.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>
    <|start|>assistant to=functions.NAME<|channel|>commentary json<|message|>{…}<|call|>

The analysis channel is reasoning, a message to a function is its call, all else is text. The prompt ends where the
first message has begun. Markers and heads are never text; inside a string of a call's arguments they are part of it. An
answer without a head is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from api.wire.dialects.dialect import (
    MAX_HEAD_CHARS,
    MAX_NAME_CHARS,
    AddedId,
    Dialect,
    Piece,
    Tools,
    marker,
    object_of,
    quoted,
    require_names,
    text_but,
)
from api.wire.dialects.json_value import JsonValue
from api.wire.markers import Splitter
from shared.grammar import within

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, CALL, RETURN = "<|constrain|>", "<|call|>", "<|return|>"
MARKERS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, CALL, RETURN)

CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*+(\w+)")
FUNCTION = re.compile(r"(?<!\S)to=functions\.([^\s<]+)")
ANY_MARKER = re.compile("|".join(map(re.escape, MARKERS)))
RECIPIENT = "to="           # may follow at the prompt's end, as a channel may; nothing else
BETWEEN = "\n"              # separates two messages of a kind, which are shown as one
# In a grammar, the body of a message: it never spells this marker, so no other message can begin in it.
TEXT = f"TEXT: {text_but(f'(?s:.)*{re.escape(MESSAGE)}')}"


@dataclass(frozen=True)
class Harmony(Dialect):
    def grammar(self, tools: Tools, *, is_one: bool, added_id: AddedId) -> str:
        """One call, after optional reasoning. The token that ends the answer ends the call."""
        tools = list(tools)
        require_names(tools, _is_name)
        channel, message, constrain = (marker(text, added_id) for text in (CHANNEL, MESSAGE, CONSTRAIN))
        bodies = [f"{quoted(tool['name'] + ' ')} {constrain} {quoted('json')} {message} {object_of(tool)}"
                  for tool in tools]
        rules = [f"call: {channel} {quoted('commentary to=functions.')} body", "body: " + "\n | ".join(bodies)]
        return "\n".join(["start: thought call", _thought(added_id), *rules]) + "\n"

    def among_text(self, calls: str, *, is_one: bool, may_think: bool, added_id: AddedId) -> str:
        """Messages in its channels, the last of which may be a call; a single one where no token ends the others."""
        channel, message, end, start = (marker(text, added_id) for text in (CHANNEL, MESSAGE, END, START))
        before = "" if added_id(END) is None else f'(said {end} {start} "assistant")*'
        rules = [f"start: {before} (said | @calls)", TEXT,
                 f'said: {channel} ("analysis" | "commentary" | "final") {message} TEXT?']
        return within("\n".join(rules) + "\n", calls=calls)

    def framed(self, form: str, added_id: AddedId) -> str:
        """In the final channel, after optional reasoning."""
        if added_id(END) is None:
            return form
        channel, message = marker(CHANNEL, added_id), marker(MESSAGE, added_id)
        return within(f'start: thought {channel} "final" {message} @form\n{_thought(added_id)}\n', form=form)

    def reader(self) -> HarmonyReader:
        return HarmonyReader(can_call=self.can_call)


def _thought(added_id: AddedId) -> str:
    """A rule for optional reasoning; for none where no token ends it."""
    if added_id(END) is None:
        return 'thought: ""'
    channel, message, end, start = (marker(text, added_id) for text in (CHANNEL, MESSAGE, END, START))
    return f'thought: "" | {channel} "analysis" {message} TEXT? {end} {start} "assistant"\n{TEXT}'


class HarmonyReader:
    def __init__(self, *, can_call: bool) -> None:
        self._can_call = can_call
        self._splitter = Splitter(MARKERS)
        self._state: Literal["head", "body", "call", "between"] = "head"
        self._head = ""                     # including its markers
        self._kind: Literal["text", "reasoning"] = "text"       # of the body
        self._name = ""                     # of the function, until its call was reported
        self._value = JsonValue()
        self._is_new = True                 # nothing of the message was reported
        self._said: set[str] = set()        # kinds reported so far

    @property
    def is_inside(self) -> bool:
        return self._state == "body" and self._kind == "reasoning"

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        for is_marker, run in self._splitter.feed(text):
            if is_marker and not (self._state == "call" and self._value.in_string):
                self._marker(run, pieces)
            else:
                self._text(run, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """The text where a head should be; nothing for a head that was cut off."""
        pieces: list[Piece] = []
        for _, run in self._splitter.finish():
            self._text(run, pieces)
        self._leave_head(pieces)
        return pieces

    def _marker(self, marker: str, pieces: list[Piece]) -> None:
        if marker == MESSAGE:
            self._open()
        elif marker == START or (marker == CHANNEL and self._state != "head"):
            self._close(pieces)
            self._state, self._head = "head", marker
        elif self._state == "head" and marker in (CHANNEL, CONSTRAIN):
            self._head += marker if len(self._head) + len(marker) <= MAX_HEAD_CHARS else ""
        elif marker != CONSTRAIN:
            self._close(pieces)
            self._state = "between"

    def _open(self) -> None:
        """Begins a message, as its head says."""
        channel, function = CHANNEL_NAME.search(self._head), FUNCTION.search(self._head)
        self._state, self._is_new = "body", True
        self._kind = "reasoning" if channel and channel[1] == "analysis" else "text"
        if function and self._can_call and len(function[1]) <= MAX_NAME_CHARS:
            self._state, self._kind = "call", "text"
            self._name, self._value = function[1], JsonValue()
        self._head = ""

    def _close(self, pieces: list[Piece]) -> None:
        self._leave_head(pieces)
        if self._state == "call" and self._name:
            pieces += Piece("call", self._name), Piece("arguments", "{}")
        self._name = ""

    def _leave_head(self, pieces: list[Piece]) -> None:
        head, self._head = self._head, ""
        if self._state == "head" and not ANY_MARKER.search(head):
            self._say(head, pieces)

    def _text(self, run: str, pieces: list[Piece]) -> None:
        if self._state == "head":
            self._head += run
            if not _may_be_head(self._head):
                head, self._head = self._head, ""
                self._state, self._kind, self._is_new = "body", "text", True
                self._say(ANY_MARKER.sub("", head), pieces)
        elif self._state == "call":
            self._call(run, pieces)
        elif self._state == "body" or (run := run.lstrip()):
            if self._state == "between":
                self._state, self._kind, self._is_new = "body", "text", True
            self._say(run, pieces)

    def _call(self, run: str, pieces: list[Piece]) -> None:
        """One JSON object; whitespace around it is dropped."""
        if self._name:
            run = run.lstrip()
            if run and run[0] != "{":
                self._state, self._name = "body", ""
                self._say(run, pieces)
            if not run or not self._name:
                return
            pieces.append(Piece("call", self._name))
            self._name = ""
        size = self._value.feed(run)
        pieces.append(Piece("arguments", run[:size]))
        if self._value.is_closed:
            self._state = "between"
            self._text(run[size:], pieces)

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if not text:
            return
        if self._is_new and self._kind in self._said:
            text = BETWEEN + text
        self._is_new = False
        self._said.add(self._kind)
        pieces.append(Piece(self._kind, text))


def _may_be_head(text: str) -> bool:
    """Whether this may become the head of a message begun by the prompt, or after a marker."""
    begun = text.lstrip()[:len(RECIPIENT)]
    return len(text) <= MAX_HEAD_CHARS and (RECIPIENT.startswith(begun) or ANY_MARKER.search(text) is not None)


def _is_name(name: str) -> bool:
    return not re.search(r"[\s<]", name)


SIGNS = ((CHANNEL, MESSAGE),)
WITHOUT_TOOLS = Harmony("harmony_without_tools", SIGNS, MARKERS, END, can_call=False)
HARMONY = Harmony("harmony", SIGNS, MARKERS, END, WITHOUT_TOOLS)
