"""Finds the end of a JSON value in text that arrives in pieces: the bracket or the quote that closes it.

It parses brackets and strings only, and does not check that a value is valid.
"""

from __future__ import annotations

import re

OUTSIDE = re.compile(r'["{}\[\]]')
INSIDE = re.compile(r'["\\]')


class JsonValue:
    def __init__(self) -> None:
        self.in_string = False
        self.is_closed = False
        self._depth = 0                     # of brackets
        self._has_begun = self._is_escaped = False

    def feed(self, text: str) -> int:
        """How many of the characters belong to the value: all until it is closed."""
        place = self._begin(text) if text and not self._has_begun else 0
        while not self.is_closed and place < len(text):
            if self._is_escaped:
                place, self._is_escaped = place + 1, False
                continue
            match = (INSIDE if self.in_string else OUTSIDE).search(text, place)
            if match is None:
                return len(text)
            place = match.end()
            self._step(match[0])
        return place

    def _begin(self, text: str) -> int:
        self._has_begun = True
        self._step(text[0])
        return 1

    def _step(self, character: str) -> None:
        if character == "\\" and self.in_string:
            self._is_escaped = True
        elif character == '"':
            self.in_string = not self.in_string
        elif not self.in_string:
            self._depth += (character in "{[") - (character in "}]")
        self.is_closed = self._depth <= 0 and not self.in_string
