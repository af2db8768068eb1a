"""Regular expressions that llguidance reads differently from Python and ECMAScript, or would not enforce within JSON:
they are refused or rewritten.

Rust's syntax has classes within classes, operations on them, names of classes, and flags of its own. In a JSON string a
class that holds all control characters would match quotes and backslashes too, and a single one nothing at all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from shared.errors import InvalidGrammar

# The parts of a pattern, in order: an escape, the flags of a group, or a character.
PARTS = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x\{|u\{|U\{|(?s:.))|\(\?[a-zA-Z]+|(?s:.)")
CODE = re.compile(r"\\[xuU]([0-9a-fA-F]+)")
FOREIGN = ("\\p", "\\P", "\\z", "\\x{", "\\u{", "\\U{")
FLAGS = re.compile(r"\(\?[a-zA-Z]*[xUR]")
OPERATIONS = ("&&", "--", "~~")
TOLD = "\b\t\n\f\r"                                     # control characters with a short escape in JSON
BELLS = {r"\a": "\a", r"\v": "\v"}                      # and those that only regular expressions have one for
NOT_ALIKE = ("This cannot be enforced: a regular expression has what languages read in different ways (classes within "
             "classes, or named by Unicode, or a flag x, U or R).")
CONTROL = "This cannot be enforced: a pattern has a control character that JSON has no short escape for."


def require_alike(regex: str) -> None:
    """Raises InvalidGrammar where Python reads it differently."""
    is_in_class, is_first = False, False
    for part in PARTS.finditer(regex):
        text = part[0]
        if text in FOREIGN or (not is_in_class and FLAGS.match(text)) or (
                is_in_class and (text == "[" or regex.startswith(OPERATIONS, part.start()))):
            raise InvalidGrammar(NOT_ALIKE)
        if is_in_class:
            is_in_class = text != "]" or is_first
            is_first = is_first and text == "^"
        elif text == "[":
            is_in_class, is_first = True, True


def within_json(pattern: str) -> str:
    """The same, of a string's text. NUL is taken out of every class that is told by what it excludes. Raises
    InvalidGrammar."""
    require_alike(pattern)
    return "".join(_parts(pattern))


def _parts(pattern: str) -> Iterator[str]:
    is_in_class = is_negated = False
    parts = [part[0] for part in PARTS.finditer(pattern)]
    for number, part in enumerate(parts):
        before = parts[number - 1] if number else ""
        if is_in_class and part == "^" and before == "[":
            is_negated = True
            part += r"\x00"
        elif is_negated and before == "^" and parts[number - 2] == "[" and part in "]-":
            part = "\\" + part                          # which are literal there
        elif is_in_class and part == "]" and before != "[":
            is_in_class = is_negated = False
        elif not is_in_class and part == "[":
            is_in_class = True
        elif not is_negated and _is_untold(part):
            raise InvalidGrammar(CONTROL)
        yield part


def _is_untold(part: str) -> bool:
    """Whether a part stands for a control character without a short escape."""
    code = CODE.fullmatch(part)
    character = chr(min(int(code[1], 16), sys.maxunicode)) if code else BELLS.get(part, part)
    return (character < " " and character not in TOLD) or character == "\x7f"
