"""Markers in text that arrives in pieces: what to hold back because a marker, or whitespace before one, may begin."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_BLANKS = 64             # at most so much whitespace before a marker is dropped


def num_begun(text: str, marker: str) -> int:
    """How many characters at the end of a text may begin the marker."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)


def trimmed(text: str, end: int) -> int:
    """Where text[:end] ends without trailing whitespace: the same place however the text was split."""
    return max(len(text[:end].rstrip()), end - MAX_BLANKS, 0)


class Run(NamedTuple):
    is_marker: bool
    text: str


class Splitter:
    """Splits text at its markers, which all begin with one character that does not occur elsewhere in them."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = markers
        self._first = markers[0][0]
        self._found = re.compile("|".join(map(re.escape, markers)))
        self._held = ""                     # may begin a marker
        assert all(marker.rfind(self._first) == 0 for marker in markers)

    def feed(self, text: str) -> list[Run]:
        text, self._held = self._held + text, ""
        runs, place = [], 0
        for match in self._found.finditer(text):
            runs.append(Run(False, text[place:match.start()]))
            runs.append(Run(True, match[0]))
            place = match.end()
        begun = text.rfind(self._first, place)
        if begun >= 0 and any(marker.startswith(text[begun:]) for marker in self._markers):
            text, self._held = text[:begun], text[begun:]
        runs.append(Run(False, text[place:]))
        return [run for run in runs if run.text]

    def finish(self) -> list[Run]:
        held, self._held = self._held, ""
        return [Run(False, held)] if held else []
