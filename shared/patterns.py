"""Regular expressions that llguidance reads differently from Python and ECMAScript, or would not enforce within JSON:
they are refused or rewritten.

Rust's syntax has classes within classes, operations on them, names of classes, and flags of its own. In a JSON string a
class that holds all control characters would match quotes and backslashes too, and a single one nothing at all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Literal

from shared.errors import InvalidGrammar

Place = Literal["", "class", "negation", "negated"]    # of a part: outside classes, in one, its ^, in a negated one

# The parts of a pattern, in order: an escape, the flags of a group, or a character.
PARTS = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x\{|u\{|U\{|(?s:.))|\(\?[a-zA-Z]+|(?s:.)")
CODE = re.compile(r"\\[xuU]([0-9a-fA-F]+)")
FOREIGN = ("\\P", "\\z", "\\x{", "\\u{", "\\U{")
NAMED = re.compile(r"\\p(?:[LMNPSZ]|\{[LMNPSZ][a-z]?\})")      # by a category of Unicode without control characters
FLAGS = re.compile(r"\(\?[a-zA-Z]*[xUR]")
OPERATIONS = ("&&", "--", "~~", "[:")
TOLD = "\b\t\n\f\r"                                     # control characters with a short escape in JSON
BELLS = {r"\a": "\a", r"\v": "\v"}                      # and those that only regular expressions have one for
NOT_ALIKE = ("This cannot be enforced: a regular expression has what languages read in different ways (classes within "
             "classes, or named by Unicode, or a flag x, U or R).")
CONTROL = "This cannot be enforced: a pattern has a control character that JSON has no short escape for."


def alike(regex: str) -> str:
    """The regular expression, written so that Rust reads it as Python does. Raises InvalidGrammar where that fails."""
    return "".join(part for part, _ in _parts(regex))


def within_json(pattern: str) -> str:
    """The same for a pattern of JSON strings: NUL is excluded from every negated class. Raises InvalidGrammar."""
    said = []
    for part, place in _parts(pattern):
        if place == "negation":
            part += r"\x00"
        elif place != "negated" and _is_untold(part):
            raise InvalidGrammar(CONTROL)
        said.append(part)
    return "".join(said)


def _parts(regex: str) -> Iterator[tuple[str, Place]]:
    """The parts of a regular expression, those of classes with their place in it. Raises InvalidGrammar."""
    place: Place = ""
    is_first = False                                    # of a class: what would end it, or a range, is itself there
    for found in PARTS.finditer(regex):
        part, begin = found[0], found.start()
        if part in FOREIGN or (part == "\\p" and not NAMED.match(regex, begin)) or (
                FLAGS.match(part) if not place else regex.startswith(OPERATIONS, begin)):
            raise InvalidGrammar(NOT_ALIKE)
        if not place:
            place, is_first = ("class" if part == "[" else ""), True
            yield part, ""
        elif is_first and part == "^" and place == "class":
            place = "negated"
            yield part, "negation"
        elif part == "]" and not is_first:
            place = ""
            yield part, ""
        else:
            is_literal = part == "[" or (is_first and part in "]-")
            is_first = False
            yield ("\\" + part if is_literal else part), place


def _is_untold(part: str) -> bool:
    """Whether a part stands for a control character without a short escape."""
    code = CODE.fullmatch(part)
    character = chr(min(int(code[1], 16), sys.maxunicode)) if code else BELLS.get(part, part)
    return (character < " " and character not in TOLD) or character == "\x7f"
