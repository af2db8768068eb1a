"""Names of a prompt's prefixes: for each whole piece of it a hash, chained over all before, salted by tenant.

Two prompts share a name exactly when they share every token up to it, the tenant and the grid. The API puts the names
on a job so that the worker that has cached them can claim it; the engine finds computed pieces by them. It knows
token ids alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

NAME_BYTES = 16
MAX_NAMES = 16                                          # per job
FAR_TOKENS = 256                                        # between them


def prefix_names(salt: str, token_ids: Sequence[int], piece_tokens: int, known: tuple[str, ...] = ()
                 ) -> tuple[str, ...]:
    """In order. The piece with the last token has no name: it is always computed, since its logits are needed.

    `known`: the first ones, which are not computed again.
    """
    name = bytes.fromhex(known[-1]) if known else f"{salt} {piece_tokens}".encode()
    names, numbers = list(known), array("I", token_ids[len(known) * piece_tokens:])
    pieces, piece_bytes = numbers.tobytes(), piece_tokens * numbers.itemsize
    for begin in range(0, len(pieces) - piece_bytes, piece_bytes):
        name = blake2b(name + pieces[begin:begin + piece_bytes], digest_size=NAME_BYTES).digest()
        names.append(name.hex())
    return tuple(names)


def some(names: tuple[str, ...], piece_tokens: int) -> tuple[str, ...]:
    """Those at multiples of `FAR_TOKENS`, at most `MAX_NAMES`: the first ones, which many prompts share, and the last
    ones, which a conversation reuses. A shorter prefix is computed sooner than a worker is free that has it."""
    step, half = max(1, FAR_TOKENS // piece_tokens), MAX_NAMES // 2
    far = names[step - 1::step]
    return far if len(far) <= MAX_NAMES else far[:half] + far[-half:]
