"""Names of a prompt's prefixes: for each whole prefill chunk a hash, chained over all before, salted by tenant.

Two prompts share a name exactly when they share every token up to it, the tenant and the grid. The API puts the names
on a job so that the worker that has cached them can claim it; the engine finds computed chunks by them. It knows
token ids alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

NAME_BYTES = 16
MAX_NAMES = 16                                          # per job


def prefix_names(salt: str, token_ids: Sequence[int], chunk_tokens: int) -> tuple[str, ...]:
    """In order. The chunk with the last token has no name: it is always computed, since its logits are needed."""
    name = f"{salt} {chunk_tokens}".encode()
    names = []
    for begin in range(0, len(token_ids) - chunk_tokens, chunk_tokens):
        chunk = array("I", token_ids[begin:begin + chunk_tokens]).tobytes()
        name = blake2b(name + chunk, digest_size=NAME_BYTES).digest()
        names.append(name.hex())
    return tuple(names)


def some(names: tuple[str, ...]) -> tuple[str, ...]:
    """At most `MAX_NAMES`: the first ones, which many prompts share, and the last ones, which a conversation reuses."""
    half = MAX_NAMES // 2
    return names if len(names) <= MAX_NAMES else names[:half] + names[-half:]
