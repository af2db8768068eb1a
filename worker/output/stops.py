"""Finds stop strings in text that arrives in pieces, and how much of the end may still become one.

It reads every character once, whatever the pieces: the string that is complete first wins, and of several that end
together the longest. It knows strings alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Scan(NamedTuple):
    found: int | None       # where the stop string begins, counted from the piece's start: negative in earlier pieces
    num_held: int           # characters at the end that may begin a stop string
    stop: str = ""          # the one that was found


class StopScanner:
    def __init__(self, stop: tuple[str, ...]):
        self._stop = [(text, _borders(text)) for text in stop if text]
        self._matched = [0] * len(self._stop)       # per string, how much of it the text now ends with

    def scan(self, piece: str, *, may_find: bool = True) -> Scan:
        """Without `may_find` a stop string that ends here is ignored; one that begins here is found later."""
        for position, character in enumerate(piece if self._stop else ""):
            longest = ""
            for i, (text, borders) in enumerate(self._stop):
                matched = self._matched[i]
                while matched and text[matched] != character:
                    matched = borders[matched]
                self._matched[i] = matched + (text[matched] == character)
                if self._matched[i] == len(text):
                    longest = max(longest, text, key=len)
                    self._matched[i] = borders[len(text)]
            if longest and may_find:
                return Scan(position + 1 - len(longest), 0, longest)
        return Scan(None, max(self._matched, default=0))


def _borders(text: str) -> list[int]:
    """For each length, the longest proper prefix of text[:length] that is also its suffix."""
    borders = [0, 0]
    for length in range(1, len(text)):
        border = borders[length]
        while border and text[border] != text[length]:
            border = borders[border]
        borders.append(border + (text[border] == text[length]))
    return borders
