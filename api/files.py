"""Files: their pieces in Redis, and the facts known of each. A file becomes visible once it is complete.

It knows where files are, not their contents, and nothing of HTTP.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from redis.asyncio import Redis

from api import deleted
from api.scripts import register
from shared.connection import refusals
from shared.errors import FileTooLarge, NoSuchFile, StorageFull
from shared.keys import tenant_key
from shared.settings import Settings

PIECE_BYTES = (256 << 10) - 1024                        # with its header one allocation of 256 KiB, not of 320
MAX_READ_PIECES = 256                                   # per round trip, of small ones
MAX_FILES = 1000                                        # per tenant: each write scans all of them
UPLOAD_TTL_S = 3600.0                                   # of an incomplete file, since its last piece


@dataclass(frozen=True, slots=True)
class File:
    """One file; its pieces are numbered from 0 on, and some may be missing."""

    id: str
    filename: str = ""
    purpose: str = ""
    created_ms: int = 0
    num_pieces: int = 0
    is_whole: bool = False
    num_bytes: int = 0
    expires_ms: int = 0

    def named(self, filename: str, purpose: str) -> File:
        return replace(self, filename=filename, purpose=purpose)

    def rest(self) -> str:
        """The fields that lua/keep.lua does not read."""
        return json.dumps({name: value for name, value in asdict(self).items()
                           if name not in ("id", "num_bytes", "expires_ms")})

    @classmethod
    def decode(cls, file_id: str, raw: bytes) -> File:
        num_bytes, expires_ms, rest = raw.decode().split(" ", 2)
        return cls(file_id, **json.loads(rest), num_bytes=int(num_bytes), expires_ms=int(expires_ms))

    def body(self) -> dict[str, Any]:
        """The object that clients see."""
        return {"id": self.id, "object": "file", "bytes": self.num_bytes, "created_at": self.created_ms // 1000,
                "expires_at": self.expires_ms // 1000, "filename": self.filename, "purpose": self.purpose,
                "status": "processed", "status_details": None}


def new_file() -> File:
    return File(f"file-{secrets.token_hex(16)}", created_ms=round(time.time() * 1000))


class Files:
    """The files of all tenants."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self._redis = redis
        self._settings = settings
        self._keep = register(redis, "keep")
        self._prolong = register(redis, "prolong")

    async def append(self, tenant: str, file: File, piece: bytes) -> File:
        """Adds a piece to the file. Raises FileTooLarge or StorageFull."""
        num_bytes = file.num_bytes + len(piece)
        if num_bytes > self._settings.max_file_bytes:
            raise FileTooLarge(f"A file has at most {self._settings.max_file_bytes} bytes.")
        longer = replace(file, num_bytes=num_bytes, num_pieces=file.num_pieces + 1)
        return await self._write(tenant, longer, UPLOAD_TTL_S, piece=(file.num_pieces, piece))

    async def finish(self, tenant: str, file: File, lifetime_s: float) -> File:
        """Makes the file visible, for at least so long. Raises StorageFull."""
        return await self._write(tenant, replace(file, is_whole=True), lifetime_s)

    async def publish(self, tenant: str, file: File, lifetime_s: float) -> File:
        """As finish, without limits: for a file whose pieces exist already."""
        return await self._write(tenant, replace(file, is_whole=True), lifetime_s, is_bounded=False)

    async def prolong(self, tenant: str, file_id: str, lifetime_s: float) -> None:
        """Keeps a file for at least so long from now on. Raises NoSuchFile, also when it is deleted meanwhile."""
        with refusals():
            is_known = await self._prolong(keys=[tenant_key(tenant, "files"), pieces_key(tenant, file_id)],
                                           args=[file_id, round(lifetime_s * 1000)])
        if not is_known:
            raise NoSuchFile

    async def get(self, tenant: str, file_id: str) -> File:
        """Raises NoSuchFile."""
        raw: Any = await self._redis.hget(tenant_key(tenant, "files"), file_id)
        for file in _seen({file_id.encode(): raw} if raw else {}):
            return file
        raise NoSuchFile

    async def list(self, tenant: str, after: str | None = None) -> list[File]:
        """All of them, the oldest first; and a bare `after` if that was deleted lately, to show where it stood."""
        rows: Any = await self._redis.hgetall(tenant_key(tenant, "files"))
        files = [*_seen(rows)]
        if after is not None and all(file.id != after for file in files):
            created_ms = await deleted.created_ms(self._redis, tenant, "files", after)
            files += [] if created_ms is None else [File(after, created_ms=created_ms)]
        return sorted(files, key=lambda file: (file.created_ms, file.id))

    async def remove(self, tenant: str, file_id: str) -> None:
        with suppress(NoSuchFile):                      # an upload that never came to its end
            file = await self.get(tenant, file_id)
            await deleted.remember(self._redis, tenant, "files", file_id, file.created_ms)
        await self._redis.hdel(tenant_key(tenant, "files"), file_id)
        await self._redis.unlink(pieces_key(tenant, file_id))

    async def read(self, tenant: str, file: File) -> AsyncIterator[bytes]:
        """Its content, in pieces of some 256 KiB. Raises NoSuchFile when it is deleted meanwhile."""
        num_read, step = 0, pieces_at_once(file)
        for begin in range(0, file.num_pieces, step):
            numbers = [str(number) for number in range(begin, min(begin + step, file.num_pieces))]
            found: Any = await self._redis.hmget(pieces_key(tenant, file.id), numbers)
            content = b"".join(piece for piece in found if piece is not None)
            num_read += len(content)
            if content:
                yield content
        if num_read != file.num_bytes:
            raise NoSuchFile

    async def _write(self, tenant: str, file: File, lifetime_s: float, *, piece: tuple[int, bytes] | None = None,
                     is_bounded: bool = True) -> File:
        bounds = (self._settings.max_tenant_file_bytes, MAX_FILES) if is_bounded else (0, 0)
        with refusals():
            outcome, *expires = await self._keep(
                keys=[tenant_key(tenant, "files"), pieces_key(tenant, file.id)],
                args=[file.id, file.num_bytes, round(lifetime_s * 1000), file.rest(), *bounds, *(piece or ("", ""))])
        if outcome == b"files":
            raise StorageFull(f"You may have {MAX_FILES} files at once. Delete some, or wait until they expire.")
        if outcome == b"bytes":
            raise StorageFull
        return replace(file, expires_ms=int(expires[0]))


def pieces_key(tenant: str, file_id: str) -> str:
    return tenant_key(tenant, f"pieces:{file_id}")


def pieces_at_once(file: File) -> int:
    """The number of pieces to read at once: about the bytes of one full piece."""
    mean_bytes = file.num_bytes // max(file.num_pieces, 1)
    return min(max(PIECE_BYTES // max(mean_bytes, 1), 1), MAX_READ_PIECES)


def _seen(rows: dict[bytes, bytes]) -> Iterator[File]:
    """The complete files that have not expired."""
    now_ms = time.time() * 1000
    for file_id, raw in rows.items():
        file = File.decode(file_id.decode(), raw)
        if file.is_whole and file.expires_ms > now_ms:
            yield file
