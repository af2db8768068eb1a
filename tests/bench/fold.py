"""What a delta costs a pod in Python: to read a push, and to fold it into an event. `python -m tests.bench.fold`."""

from __future__ import annotations

import time
from collections.abc import Callable

from api.wire.chat import ChunkFold
from shared.job import Delta, Entry, Header, encode_deltas
from shared.queue import parse_push

NUM_ENTRIES = 20_000
PER_PUSH = 16                                           # entries of one step's push: the batch of one worker
ROUNDS = 5


def main() -> None:
    header = Header(model="baton-tiny", created_s=1_700_000_000, fingerprint="fp_0123456789", seed=1, n=1,
                    num_prompt_tokens=9, stream=True, include_usage=True)
    data = encode_deltas([Delta(0, (42,), " word")])
    lines = [f"chatcmpl-93105beae0-0-b91018ab17a997f8826801358e7a3949 1 {position} {position} delta {data}"
             for position in range(1, NUM_ENTRIES + 1)]
    messages = ["\n".join(lines[i:i + PER_PUSH]).encode() for i in range(0, NUM_ENTRIES, PER_PUSH)]
    entries = [entry for message in messages for _, entry in parse_push(message)]
    parse_us = best_us(lambda: [parse_push(message) for message in messages])
    fold_us = best_us(lambda: fold_all(header, entries))
    print(f"{fold_us:.1f} µs to fold a delta of one token, {parse_us:.1f} µs to read it from a push of {PER_PUSH}")


def fold_all(header: Header, entries: list[Entry]) -> None:
    fold = ChunkFold("chatcmpl-1", header, lambda _: b"")
    for entry in entries:
        fold.feed(entry)


def best_us(work: Callable[[], object]) -> float:
    """Per entry, of the best round: what others do on this machine only adds."""
    times = []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return min(times) / NUM_ENTRIES * 1e6


if __name__ == "__main__":
    main()
