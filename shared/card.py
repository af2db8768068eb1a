"""What a worker announces: the card of its model, and where to find it.

With the card alone a pod renders and counts prompts, so it needs no model files and learns a new model when its first
worker announces it. A card travels compressed, under the hash of its bytes, and is bounded.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from functools import cached_property

from pydantic import TypeAdapter

MAX_CARD_BYTES = 64 << 20                               # uncompressed; the largest tokenizers of today take 35 MB


@dataclass(frozen=True)
class Card:
    """A model as the API needs to know it."""

    model: str                                          # the canonical name
    tokenizer_json: str                                 # of the `tokenizers` library
    chat_templates: dict[str, str]                      # by name; 'default' is the one for chats
    special_tokens: dict[str, str]                      # bos_token, eos_token, …: what templates may refer to
    sampling_defaults: dict[str, float]                 # from its generation_config: for what a request leaves open
    eos_token_ids: tuple[int, ...]
    vocab_size: int                                     # rows of the logits; no id at or above reaches a worker
    max_model_len: int                                  # prompt and answer together, in tokens
    max_num_seqs: int                                   # choices that one worker can run at once
    prefill_chunk_tokens: int                           # prefixes are named at multiples of it
    weights_id: str                                     # other weights never continue a started answer
    numerics_id: str                                    # workers with equal ids produce bit-identical results
    created_s: int                                      # of the weights, for GET /v1/models

    @cached_property                                    # needed for every request; hashes up to 35 MB
    def tokenizer_id(self) -> str:
        return hashlib.sha256(self.tokenizer_json.encode()).hexdigest()[:16]

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of answers that begin on this card."""
        return f"fp_{self.weights_id[:10]}"

    def pack(self) -> tuple[str, bytes]:
        """The card's hash and its compressed bytes."""
        raw = _card_adapter.dump_json(self)
        if len(raw) > MAX_CARD_BYTES:
            raise ValueError(f"the card has {len(raw)} bytes, and {MAX_CARD_BYTES} are allowed")
        return hashlib.sha256(raw).hexdigest(), zlib.compress(raw, 6)

    @classmethod
    def unpack(cls, card_hash: str | None, packed: bytes) -> Card:
        """Raises ValueError when the bytes are too many or do not match the hash; None: any card."""
        inflater = zlib.decompressobj()
        raw = inflater.decompress(packed, MAX_CARD_BYTES)
        if inflater.unconsumed_tail or card_hash not in (None, hashlib.sha256(raw).hexdigest()):
            raise ValueError("the card is too large, or its bytes do not match its hash")
        return _card_adapter.validate_json(raw)


@dataclass(frozen=True, slots=True)
class Announcement:
    """A field of the directory: a shard, the names under which it is served, and its card."""

    shard: str                                          # shard id
    names: tuple[str, ...]                              # the first is canonical
    card_hash: str
    expires_ms: int                                     # in Redis time
    room: tuple[int, int] = (0, 0)                      # the card's max_model_len and max_num_seqs

    def yields_to(self, other: Announcement, now_ms: int) -> bool:
        """Whether a worker of the same shard has more room: its card counts while it is announced."""
        return other.expires_ms > now_ms and other.room > self.room

    def encode(self) -> bytes:
        return _announcement_adapter.dump_json(self)

    @classmethod
    def decode(cls, raw: bytes) -> Announcement:
        return _announcement_adapter.validate_json(raw)


_card_adapter = TypeAdapter(Card)
_announcement_adapter = TypeAdapter(Announcement)
