"""Text that may contain calls, in dialects whose calls need no token: an answer that begins as calls do is calls.

The dialect gives a regular expression for what its reader takes for a call, and no text may begin with a match of it.
The lexer is greedy, so text continues for as long as it can: it has to become impossible within the first terminal of a
call. It knows no dialect.
"""

from __future__ import annotations

from api.wire.dialects.dialect import AddedId, marker, text_but
from api.wire.reasoning import BEGIN, END
from shared.grammar import within

BLANK = r"[\s\x1C-\x1F]"                                # Python's whitespace
BLANKS = r"BLANKS: /[ \t\r\n]{0,16}/"                   # a rule for whitespace within calls, written by the model


def leading(calls: str, *, called: str, goes_on: str, is_one: bool, may_think: bool, added_id: AddedId,
            may_hide: str = "") -> str:
    """A grammar. No text begins with `called`, and no text after calls with `goes_on`."""
    hidden_id = added_id(may_hide) if may_hide else None
    hidden = "" if hidden_id is None else f"(<[{hidden_id}]> BLANKS?)?"
    thought, rules = ("thought?", _thought(added_id)) if may_think else ("", [])
    times = "?" if is_one else "*"
    begun = "|".join([BLANK, called, *([BEGIN] if may_think else [])])
    frame = [f"start: {thought} BLANKS? {hidden} TEXT? (@calls REST?){times}", f"BLANKS: /{BLANK}{{1,16}}/",
             f"TEXT: {text_but(begun)}", f"REST: {text_but(goes_on)}", *rules]
    return within("\n".join(frame) + "\n", calls=calls)


def _thought(added_id: AddedId) -> list[str]:
    """Rules for reasoning, up to the first marker that ends it."""
    begin, end_id = marker(BEGIN, added_id), added_id(END)
    if end_id is None:
        return [f"thought: BLANKS? {begin} inside", "inside[lazy]: TEXT_END", f'TEXT_END: /(?s:.)*/ "{END}"']
    return [f"thought: BLANKS? {begin} INSIDE? <[{end_id}]>", f"INSIDE: {text_but(f'(?s:.)*{END}')}"]
