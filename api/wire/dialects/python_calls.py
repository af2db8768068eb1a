"""Python's calls with literals for arguments, as JSON, in text that comes in pieces: `f(x=[1, {"a": None}], y='b')`.

It accepts Python strings in either quote, triple quotes included, numbers, True, False and None (and as JSON spells
them), lists and dicts. It reads token by token; except in strings, it rereads at most a bounded number of characters of
a token. It knows nothing of what surrounds a call.
"""

from __future__ import annotations

import json
import re

from api.wire.dialects.dialect import MAX_NAME_CHARS, quoted

MAX_DEPTH = 64                  # of lists and dicts
MAX_WORD_CHARS = 256            # of a name or a number

BLANKS = re.compile(r"\s+")
NAME = re.compile(r"[^\W\d][\w.\-]*")
WORD = re.compile(r"[\w.+\-]+")                         # a name or a number: up to what cannot belong to it
QUOTE = re.compile(r'"""|\'\'\'|"(?!")|\'(?!\')|""(?!")|\'\'(?!\')')
NUMBER = re.compile(r"([+-]?)(\d+(?:_\d+)*|(?=\.\d))(\.\d*)?([eE][+-]?\d+)?")
ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|[0-7]{1,2}(?=[^0-7])|[^xuU0-7])",
                    re.DOTALL)
HALF_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]?|u[0-9a-fA-F]{0,3}|U[0-9a-fA-F]{0,7}|[0-7]{0,2})")
SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": "", "\\": "\\", "'": "'",
          '"': '"', "/": "/"}                           # the last is JSON's only
CONSTANTS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
CLOSED_BY = {"(": ")", "[": "]", "{": "}"}
MAY_END = (",", "keyword", "element", "key")            # where a bracket may close: Python allows a final comma


class NoCall(Exception):
    """The text read is not a call."""


class PythonCall:
    """One call, from its name to the bracket that closes it."""

    def __init__(self) -> None:
        self.name = ""
        self.is_closed = False
        self._out: list[str] = []           # the arguments so far, as JSON
        self._stack: list[str] = []         # of open brackets
        self._expected = "name"             # or "(", "keyword", "=", "element", "key", ":", "value", ","
        self._has_comma = False             # before the next item
        self._quote = ""                    # of the string being read
        self._stop = QUOTE                  # where a run of its characters ends

    @property
    def arguments(self) -> str:
        return "".join(self._out)

    @property
    def in_string(self) -> bool:
        return bool(self._quote)

    def feed(self, text: str) -> int:
        """How many characters were read; the rest must be fed again, with more after it. Raises NoCall."""
        place = 0
        while place < len(text) and not self.is_closed:
            size = self._read_string(text, place) if self._quote else self._read_token(text, place)
            if not size:
                break
            place += size
        return place

    def _read_token(self, text: str, place: int) -> int:
        """The length of the token; 0: it is incomplete."""
        if match := BLANKS.match(text, place):
            return len(match[0])
        if text[place] in "\"'":
            return self._open_string(text, place)
        if match := WORD.match(text, place, place + MAX_WORD_CHARS + 1):
            if len(match[0]) > MAX_WORD_CHARS:
                raise NoCall
            if match.end() == len(text):
                return 0
            self._word(match[0])
            return len(match[0])
        self._mark(text[place])
        return 1

    def _word(self, word: str) -> None:
        if self._expected == "name":
            self.name, self._expected = _name(word), "("
        elif self._expected == "keyword":
            self._item(quoted(_name(word)))
            self._expected = "="
        else:
            self._value(CONSTANTS.get(word) or _number(word))

    def _mark(self, mark: str) -> None:
        """Handles a punctuation mark."""
        if mark == self._expected and mark in "=:":
            self._out.append(": ")
            self._expected = "value"
        elif mark == self._expected == ",":
            self._has_comma = True
            self._expected = {"(": "keyword", "[": "element", "{": "key"}[self._stack[-1]]
        elif mark == self._expected == "(":
            self._open("(", "{", "keyword")
        elif mark in "[{" and self._expected in ("value", "element"):
            self._item("")
            self._open(mark, mark, "element" if mark == "[" else "key")
        elif self._stack and mark == CLOSED_BY[self._stack[-1]] and self._expected in MAY_END:
            self._out.append("}" if mark == ")" else mark)
            self._stack.pop()
            self._has_comma, self._expected, self.is_closed = False, ",", not self._stack
        else:
            raise NoCall

    def _open(self, mark: str, shown: str, expected: str) -> None:
        if len(self._stack) > MAX_DEPTH:
            raise NoCall
        self._stack.append(mark)
        self._out.append(shown)
        self._has_comma, self._expected = False, expected

    def _value(self, shown: str) -> None:
        if self._expected not in ("value", "element"):
            raise NoCall
        self._item(shown)
        self._expected = ","

    def _item(self, shown: str) -> None:
        self._out.append((", " if self._has_comma else "") + shown)
        self._has_comma = False

    def _open_string(self, text: str, place: int) -> int:
        match = QUOTE.match(text, place)
        if match is None or (match.end() == len(text) and len(match[0]) < 3):
            return 0                        # several quotes may be one mark
        if self._expected not in ("value", "element", "key"):
            raise NoCall
        self._item('"')
        if len(match[0]) == 2:
            self._close_string()
        else:
            self._quote = match[0]
            self._stop = re.compile(rf"\\|{self._quote}")
        return len(match[0])

    def _close_string(self) -> None:
        self._out.append('"')
        self._quote, self._expected = "", ":" if self._expected == "key" else ","

    def _read_string(self, text: str, place: int) -> int:
        """Reads as much of the string as is certain."""
        match = self._stop.search(text, place)
        if match and match.start() == place:
            if match[0] == "\\":
                return self._escape(text, place)
            self._close_string()
            return len(match[0])
        end = match.start() if match else len(text) - self._num_held(text, place)
        self._out.append(quoted(text[place:end])[1:-1])
        return end - place

    def _num_held(self, text: str, place: int) -> int:
        """Quotes at the end that may belong to a triple quote."""
        mark = self._quote[0]
        return min(len(text) - len(text.rstrip(mark)), len(text) - place) if len(self._quote) == 3 else 0

    def _escape(self, text: str, place: int) -> int:
        match = ESCAPE.match(text, place)
        if match is None:
            if HALF_ESCAPE.fullmatch(text, place):
                return 0
            raise NoCall
        shown = _unescaped(match[0][1:])
        self._out.append(json.dumps(shown)[1:-1])       # in ASCII: unpaired surrogates stay as they are
        return len(match[0])


def _unescaped(code: str) -> str:
    if code in SIMPLE:
        return SIMPLE[code]
    if code[0] in "xuU" or code[0] in "01234567":
        number = int(code, 8) if code[0].isdigit() else int(code[1:], 16)
        if number > 0x10FFFF:
            raise NoCall
        return chr(number)
    return "\\" + code                      # unknown escapes stay as written, as in Python


def _name(word: str) -> str:
    if not NAME.fullmatch(word) or len(word) > MAX_NAME_CHARS:
        raise NoCall
    return word


def _number(word: str) -> str:
    """The number as JSON: with digits on both sides of a point, and no leading zeros."""
    match = NUMBER.fullmatch(word)
    if not match or not word.isascii():
        raise NoCall
    sign, whole, fraction, exponent = match.groups(default="")
    digits = whole.replace("_", "")
    if len(digits) > 1 and digits[0] == "0":
        raise NoCall
    if fraction:
        fraction = fraction if len(fraction) > 1 else ".0"
    return ("-" if sign == "-" else "") + (digits or "0") + fraction + exponent
