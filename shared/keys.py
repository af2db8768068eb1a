"""The map of Redis: every key, its type, who owns it and how long it lives. Nothing else in the project names a key.

All keys of a shard begin with its tag, so that every script touches one hash slot, on one Redis or on a cluster. A
shard serves one model; its tag is a short hash of the model's canonical name, which may hold braces and slashes.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

DIRECTORY = "{baton}:models"
"""HASH, written by workers: shard id → Announcement (shared/card.py). Pods learn from it which models are served. A
field is valid until its own `expires_ms`; any worker removes it some time later."""

BATCHES = "{baton}:batches"
"""ZSET, written by the API: `<tenant> <batch>` of every unfinished batch → the ms at which it was created. Pods look
here for batches that no other pod runs."""

SHARD_KEYS: dict[str, tuple[str, str, str]] = {
    # name: (type, owner, what and until when)
    "jobs": ("stream", "scripts", "one entry per live job; group `workers`; length = queued + running"),
    "ready": ("zset", "scripts", "jobs in line: priority band, then fair-queueing start tag"),
    "job:<id>": ("hash", "scripts", "state of one job; `retain_ms` after its end"),
    "out:<id>": ("stream", "scripts", "the answer's log, the truth: header, fences, deltas, terminal; as its job"),
    "leases": ("zset", "scripts", "worker → expiry in ms of Redis time"),
    "held:<worker>": ("set", "scripts", "jobs that a worker holds; until it has none"),
    "sequence:<worker>": ("hash", "scripts", "its last claim and publish, which may be repeated; until its lease ends"),
    "looked": ("string", "scripts", "the ms of Redis time at which somebody last looked for expired leases"),
    "deadlines": ("zset", "scripts", "job → the ms of Redis time at which it must have ended"),
    "readers": ("zset", "scripts", "job → the ms of Redis time until which it goes on with nobody reading"),
    "tenants": ("hash", "scripts", "tenant → live choices"),
    "fair": ("hash", "scripts", "virtual time (field '') and each tenant's finish tag; until the line is empty"),
    "counters": ("hash", "scripts", "totals since the shard began, for operators"),
    "dead": ("stream", "scripts", "jobs given up, newest 10,000"),
    "worker:<worker>": ("hash", "worker", "what a worker says of itself; `announce_ttl_s`"),
    "prefix:<name>": ("string", "scripts", "worker that computed this beginning of a prompt last; 10 minutes"),
    "card:<hash>": ("string", "worker", "a card, zlib; `announce_ttl_s`"),
    "tokenizer:<id>": ("string", "api", "a card that stored log probabilities need; `request_deadline_s + store_s`"),
    "push:<pod>": ("channel", "scripts", "what was appended to the logs of a pod's streams, packed"),
    "wake": ("channel", "scripts", "there may be something to claim"),
}

TENANT_KEYS: dict[str, tuple[str, str, str]] = {
    # Keys that span models lie under the tenant's own tag, `{t.<tenant>}`.
    "stored:<id>": ("string", "scripts", "the request of a stored answer, JSON; `request_deadline_s + store_s`"),
    "stored": ("zset", "scripts", "answers to be stored → the ms of Redis time at which what was asked expires"),
    "stored_bytes": ("hash", "scripts", "answer to be stored → the bytes of what was asked; field '': of all of them"),
    "completions": ("zset", "api", "chat completions that are stored → the ms at which they were asked for"),
    "deleted:<list>:<id>": ("string", "api", "the ms at which what is deleted, chat or file, was made; 10 minutes"),
    "idempotency:<hash>": ("string", "api", "what an Idempotency-Key stands for; as long as its answer at most"),
    "files": ("hash", "scripts", "file → its bytes, the ms of Redis time at which it expires, and JSON of the rest"),
    "pieces:<file>": ("hash", "scripts", "number → bytes of a file, or the result of a line of a batch; `file_s`"),
    "batch:<id>": ("hash", "scripts", "what was asked, status, counts and times of a batch; `batch_s + file_s`"),
    "batches": ("zset", "scripts", "batches, also those that are over → the ms at which they were created"),
    "allotted:<batch>": ("hash", "scripts", "line → its job, until it has a result"),
    "pump:<batch>": ("string", "scripts", "pod that runs a batch; 5 s, renewed"),
}


KINDS = ("chatcmpl-", "cmpl-", "resp_", "msg_")          # prefixes of ids, by the API that was asked
COMPLETION_ID = re.compile(rf"(?:{'|'.join(KINDS)})([0-9A-Za-z]+-[0-9A-Za-z]+)-[0-9A-Za-z]+")


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: a model, a hash slot, the unit of scale."""

    id: str                                             # 10 hex digits, '-', the shard's number

    @classmethod
    def of(cls, canonical_model: str, number: int = 0) -> Shard:
        return cls(f"{hashlib.sha256(canonical_model.encode()).hexdigest()[:10]}-{number}")

    @property
    def tag(self) -> str:
        return f"{{baton.{self.id}}}"

    def key(self, name: str) -> str:
        return f"{self.tag}:{name}"


def tenant_key(tenant: str, name: str) -> str:
    """A key in the tenant's own slot."""
    return f"{{t.{tenant}}}:{name}"


def new_completion_id(shard: Shard, kind: str = "chatcmpl-") -> str:
    """An id that names the shard of its log and cannot be guessed: the shard and 128 random bits."""
    return completion_id(shard, secrets.token_hex(16), kind)


def completion_id(shard: Shard, digits: str, kind: str = "chatcmpl-") -> str:
    """The completion id made of these 32 hex digits."""
    assert kind in KINDS
    return f"{kind}{shard.id}-{digits}"


def shard_of(completion_id: str) -> Shard | None:
    """The shard of a completion id, None when the text is not one."""
    match = COMPLETION_ID.fullmatch(completion_id)
    return Shard(match[1]) if match else None
