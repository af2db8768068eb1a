"""JSON in text that arrives in pieces: the end of a value, which is the bracket or the quote that closes it, and what
its strings may not contain.

It parses brackets and strings only, and does not check that a value is valid.
"""

from __future__ import annotations

import json
import re

OUTSIDE = re.compile(r'["{}\[\]]')
INSIDE = re.compile(r'["\\]')
MARKS = re.compile(r'\\.|\\\Z|"|[\x00-\x1f]', re.DOTALL)


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


class Strings:
    """Escapes control characters in strings: models write line breaks as they are, which JSON (RFC 8259, section 7)
    forbids."""

    def __init__(self) -> None:
        self._in_string = self._is_escaped = False

    def escaped(self, text: str) -> str:
        """The next piece."""
        begin = int(self._is_escaped and text != "")
        self._is_escaped &= not begin
        return text[:begin] + MARKS.sub(self._said, text[begin:])

    def _said(self, match: re.Match[str]) -> str:
        mark = match[0]
        if mark == '"':
            self._in_string = not self._in_string
        elif mark == "\\":
            self._is_escaped = True
        elif mark < " " and self._in_string:
            return json.dumps(mark)[1:-1]
        return mark
