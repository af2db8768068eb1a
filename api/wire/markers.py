"""Markers in text that comes in pieces: what is held back because one may begin, or because blanks before it go."""

from __future__ import annotations

MAX_BLANKS = 64             # at most so many before a marker are nobody's


def num_begun(text: str, marker: str) -> int:
    """How much of a text's end may begin the marker."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)


def trimmed(text: str, end: int) -> int:
    """Where text[:end] ends without the blanks behind it: the same place whatever pieces they come in."""
    return max(len(text[:end].rstrip()), end - MAX_BLANKS, 0)
