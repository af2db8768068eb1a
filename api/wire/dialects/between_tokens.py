"""Shared by readers whose markers are tokens: text that they split, and a call's arguments as JSON.

It knows no marker: the meaning of each, in its place, is the dialect's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from api.wire.dialects.dialect import Piece
from api.wire.dialects.json_value import JsonValue
from api.wire.markers import Splitter, trimmed


class TokenReader(ABC):
    is_inside = False                       # never inside reasoning

    def __init__(self, markers: Iterable[str]) -> None:
        self._splitter = Splitter(tuple(markers))
        self._read: Callable[[str, list[Piece]], None] = self._text
        self._held = ""                     # not yet classified: within text, whitespace only
        self._name = ""                     # of a call that is not complete yet
        self._value = JsonValue()           # the arguments

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        for is_marker, run in self._splitter.feed(text):
            if is_marker and not self._in_string:
                self._marker(run, pieces)
            else:
                self._read(run, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        for _, run in self._splitter.finish():
            self._read(run, pieces)
        return pieces + self._left()

    @property
    def _in_string(self) -> bool:
        """Inside a string of a call's arguments, where markers are part of the string."""
        return self._read == self._arguments and self._value.in_string

    @abstractmethod
    def _marker(self, marker: str, pieces: list[Piece]) -> None:
        """Handles a marker in the current state."""

    @abstractmethod
    def _left(self) -> list[Piece]:
        """The held text; nothing for a call that was cut off."""

    def _text(self, run: str, pieces: list[Piece]) -> None:
        """Text; whitespace at its end is held, as a marker may follow."""
        self._held += run
        cut = trimmed(self._held, len(self._held))
        if cut:
            pieces.append(Piece("text", self._held[:cut]))
            self._held = self._held[cut:]

    def _between(self, run: str, pieces: list[Piece]) -> None:
        """Drops whitespace."""
        if rest := run.lstrip():
            self._read = self._text
            self._text(rest, pieces)

    def _give_up(self, pieces: list[Piece]) -> None:
        """Turns a call that was not completed into text."""
        text, self._name, self._held = self._name + self._held, "", ""
        self._read = self._text
        self._text(text, pieces)

    def _begin_call(self, name: str, arguments: str, pieces: list[Piece]) -> None:
        pieces.append(Piece("call", name))
        self._name, self._value, self._read = "", JsonValue(), self._arguments
        self._arguments(arguments, pieces)

    def _arguments(self, run: str, pieces: list[Piece]) -> None:
        size = self._value.feed(run)
        pieces.append(Piece("arguments", run[:size]))
        if self._value.is_closed:
            self._read = self._behind
            self._behind(run[size:], pieces)

    def _behind(self, run: str, pieces: list[Piece]) -> None:
        """What follows the arguments."""
        self._read = self._between
        self._between(run, pieces)
