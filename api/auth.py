"""Who is asking: a key becomes a tenant. Keys are kept as hashes and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac

from fastapi import Request

from shared.errors import Unauthorized

ANONYMOUS = "anonymous"


class Door:
    """Turns a key into its tenant. Without configured keys every request is allowed, and all share one tenant."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [_digest(key.encode("utf-8", "surrogateescape")) for key in keys]

    async def __call__(self, request: Request) -> str:   # async: FastAPI sends the other kind to a thread
        """The tenant, a hash of the key. A dependency of every route under /v1. Raises Unauthorized."""
        if not self._digests:
            return ANONYMOUS
        key = _key(request)
        digest = _digest(key) if key else b""
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):      # a sum: compares with all
            raise Unauthorized(None if key else Unauthorized.missing)
        return digest.hex()[:16]


def _key(request: Request) -> bytes:
    """From the header of OpenAI's clients, else from that of Anthropic's."""
    scheme, _, key = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
    if scheme.lower() != b"bearer":
        key = request.headers.get("x-api-key", "").encode("latin-1")
    return key.strip()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
