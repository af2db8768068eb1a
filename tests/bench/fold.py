"""The CPU cost of a delta in a pod: parsing its push, and folding it into events. `python -m tests.bench.fold`.

In each language, for plain text; and for text, reasoning and calls, where tools are offered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from api.wire.dialects import CHOICES
from api.wire.languages import event_fold
from shared.job import Delta, Entry, Header, Language, encode_deltas
from shared.queue import parse_push

NUM_ENTRIES = 20_000
PER_PUSH = 16                                           # entries of one step's push: the batch of one worker
ROUNDS = 5
WORD = " word"
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "'
LANGUAGES: tuple[Language, ...] = ("chat", "completions", "responses", "messages")
PLAIN = Header(model="baton-tiny", created_s=1_700_000_000, fingerprint="fp_0123456789", seed=1, n=1,
               num_prompt_tokens=9, stream=True, include_usage=True)
TOOLS = replace(PLAIN, tool_dialect="hermes", reasoning="maybe", fold_version=2)


def main() -> None:
    words = entries_of(WORD)
    messages = ["\n".join(f"chatcmpl-93105beae0-0-b91018ab17a997f8826801358e7a3949 {entry.line}"
                          for entry in words[i:i + PER_PUSH]).encode() for i in range(0, NUM_ENTRIES, PER_PUSH)]
    rows = [("to read it from a push", best_us(lambda: [parse_push(message) for message in messages]))]
    rows += [(f"{language}, text", fold_us(replace(PLAIN, language=language), words)) for language in LANGUAGES]
    for language in (language for language in LANGUAGES if language != "completions"):
        header = replace(TOOLS, language=language)
        rows += [(f"{language}, tools on: text", fold_us(header, words)),
                 (f"{language}, tools on: a call's arguments", fold_us(header, words, CALL)),
                 (f"{language}, tools on: a thought", fold_us(header, words, "<think>"))]
    rows += [(f"chat, {dialect.name} on: text", fold_us(replace(TOOLS, tool_dialect=dialect.name), words, "So"))
             for dialect in CHOICES if dialect.name != "hermes"]
    table = Table(title="A delta of one token, µs, best of rounds")
    table.add_column("what")
    table.add_column("µs", justify="right")
    for what, cost_us in rows:
        table.add_row(what, f"{cost_us:.1f}")
    Console().print(table)


def entries_of(text: str) -> list[Entry]:
    data = encode_deltas([Delta(0, (42,), text)])
    return [Entry(1, position, position, "delta", data) for position in range(1, NUM_ENTRIES + 1)]


def fold_us(header: Header, entries: list[Entry], opening: str = "") -> float:
    """Time to fold an entry, after `opening`."""
    def work() -> None:
        fold = event_fold("chatcmpl-1", header, lambda _: b"")
        fold.feed(Entry(1, 1, 1, "delta", encode_deltas([Delta(0, (42,), opening)])))
        for entry in entries:
            fold.feed(entry)

    return best_us(work)


def best_us(work: Callable[[], object]) -> float:
    """Per entry, in the best round: other processes can only add time."""
    times = []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return min(times) / NUM_ENTRIES * 1e6


if __name__ == "__main__":
    main()
