"""The reasoning of a model before its answer: the text between <think> and </think>, however the text is split.

A template may open it, or the model does, first of all. Whitespace around the two markers is dropped. It knows text and
token ids, nothing of events.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from api.wire.markers import MAX_BLANKS, num_begun, trimmed

BEGIN, END = "<think>", "</think>"

Mode = Literal["", "open", "maybe"]                     # none; begun by the prompt; begun, perhaps, by the model
State = Literal["begin", "first", "thought", "behind", "answer"]
FIRST: dict[Mode, State] = {"open": "first", "maybe": "begin", "": "answer"}


class Thought(NamedTuple):
    is_reasoning: bool
    text: str


def mode_of(prompt: Sequence[int], begin_id: int | None, end_id: int | None, templates: Iterable[str],
            spelled: str = "") -> Mode:
    """The mode for a prompt and the templates of its model. `spelled` is the prompt's end as text, where the marker is
    no token."""
    if begin_id is None and spelled.rstrip().endswith(BEGIN):
        return "open"
    last = next((token_id for token_id in reversed(prompt) if token_id in (begin_id, end_id)), None)
    if last is not None and last == begin_id:
        return "open"
    return "maybe" if any(END in template for template in templates) else ""


class ThoughtReader:
    """Reads text in pieces; every character a bounded number of times."""

    def __init__(self, mode: Mode) -> None:
        self._state = FIRST[mode]
        self._held = ""

    @property
    def is_inside(self) -> bool:
        return self._state in ("first", "thought")

    def feed(self, text: str) -> list[Thought]:
        self._held += text
        thoughts: list[Thought] = []
        while self._read(thoughts):
            pass
        return thoughts

    def finish(self) -> list[Thought]:
        held, self._held = self._held, ""
        return [Thought(self.is_inside, held)] if held else []

    def _read(self, thoughts: list[Thought]) -> bool:
        """Whether more of the held text can be classified."""
        if self._state == "begin":
            return self._begin()
        if self._state in ("first", "behind"):
            self._held = self._held.lstrip()
            if self._held:
                self._state = "thought" if self._state == "first" else "answer"
            return bool(self._held)
        if self._state == "thought":
            return self._think(thoughts)
        if self._held:
            thoughts.append(Thought(False, self._held))
            self._held = ""
        return False

    def _begin(self) -> bool:
        """Whether the answer begins with the marker."""
        word = self._held.lstrip()
        if word.startswith(BEGIN):
            self._state, self._held = "first", word[len(BEGIN):]
            return True
        if BEGIN.startswith(word) and len(self._held) < MAX_BLANKS:
            return False
        self._state = "answer"
        return True

    def _think(self, thoughts: list[Thought]) -> bool:
        place = self._held.find(END)
        cut = trimmed(self._held, place if place >= 0 else len(self._held) - num_begun(self._held, END))
        if cut:
            thoughts.append(Thought(True, self._held[:cut]))
        if place < 0:
            self._held = self._held[cut:]
            return False
        self._state, self._held = "behind", self._held[place + len(END):]
        return True
