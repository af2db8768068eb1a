"""A connection to Redis that can be broken on purpose: bytes pass, until a method changes that.

One proxy stands before one process. It copies bytes; all it knows of Redis is that a reply follows a request.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

CHUNK_BYTES = 1 << 16
RESET = struct.pack("ii", 1, 0)                         # SO_LINGER of 0 s: closing resets


class Proxy:
    """Listens on a port of 127.0.0.1, as an async context."""

    def __init__(self, target_url: str) -> None:
        self._target = urlsplit(target_url)
        self._links: set[Link] = set()
        self._server: asyncio.Server | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self._delay_s = 0.0
        self.num_cut = 0                                # connections
        self.num_swallowed = 0                          # replies
        self._to_swallow: list[bytes] = []              # of requests that hold these bytes

    def __repr__(self) -> str:
        return f"<Proxy {self.url} {len(self._links)} links, {self.num_cut} cut, {self.num_swallowed} swallowed>"

    @property
    def url(self) -> str:
        assert self._server
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()
        self.thaw()
        self.cut()
        while self._links:                             # they end by themselves, within one iteration of the loop
            await asyncio.sleep(0)

    def cut(self) -> int:
        """Resets every connection; returns their number."""
        for link in list(self._links):
            link.reset()
        self.num_cut += len(self._links)
        return len(self._links)

    def swallow(self, count: int = 1, *, of: bytes = b"") -> None:
        """Loses the next replies to requests that contain these bytes: Redis executes, then the connection is reset."""
        self._to_swallow += [of] * count

    def spare(self) -> None:
        """Cancels pending `swallow` calls."""
        self._to_swallow.clear()

    def delay(self, delay_s: float) -> None:
        """From now on each direction is delayed by so much."""
        self._delay_s = delay_s

    def freeze(self) -> None:
        """Half-open: nothing passes, and neither side notices."""
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(writer)
        self._links.add(link)
        try:
            await self._flows.wait()
            if self._target.scheme == "unix":
                replies, link.redis = await asyncio.open_unix_connection(self._target.path, limit=CHUNK_BYTES)
            else:
                replies, link.redis = await asyncio.open_connection(self._target.hostname, self._target.port)
            await link.run(self._copy(reader, link.redis, link.heard),
                           self._copy(replies, writer, self._may_reply(link)))
        except (OSError, asyncio.CancelledError):       # Redis is not there, or the test is over
            pass
        finally:
            link.reset()
            self._links.discard(link)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                    passes: Callable[[bytes], bool]) -> None:
        while data := await reader.read(CHUNK_BYTES):
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            await self._flows.wait()
            if not passes(data):
                return
            writer.write(data)
            await writer.drain()

    def _may_reply(self, link: Link) -> Callable[[bytes], bool]:
        def passes(_: bytes) -> bool:
            for of in self._to_swallow:
                if of in link.request:
                    self._to_swallow.remove(of)
                    self.num_swallowed += 1
                    return False
            return True

        return passes


class Link:
    """One connection and its other half."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.request = b""                              # the last request sent to Redis
        self.redis: asyncio.StreamWriter | None = None
        self._client = writer
        self._copies: list[asyncio.Task[None]] = []

    def heard(self, request: bytes) -> bool:
        self.request = request
        return True

    async def run(self, *ways: Coroutine[Any, Any, None]) -> None:
        """Runs until one of the two directions ends."""
        self._copies = [asyncio.create_task(way) for way in ways]
        try:
            await asyncio.wait(self._copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for copy in self._copies:
                copy.cancel()
            await asyncio.gather(*self._copies, return_exceptions=True)

    def reset(self) -> None:
        for copy in self._copies:
            copy.cancel()
        if not self._client.transport.is_closing():
            self._client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._client.transport.abort()
        if self.redis:
            self.redis.transport.abort()
