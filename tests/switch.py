"""One address in front of a pod, which passes bytes both ways and cuts the connection where a test wants it.

It knows no HTTP: an empty line ends an event, and nothing else that a pod sends contains one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

PIECE_BYTES = 65_536


async def _nothing() -> None:
    return None


class Switch:
    """Passes bytes on; `cut_after` requests one cut, so far into what the pod sends, after calling `at_cut`."""

    def __init__(self, target: str) -> None:
        self.target = target                            # a pod's URL, for new connections
        self.url = ""
        self.num_connections = 0
        self.num_cuts = 0
        self._num_events: int | None = None
        self._num_more_bytes = 0
        self._at_cut: Callable[[], Awaitable[None]] = _nothing
        self._open: set[asyncio.StreamWriter] = set()

    def cut_now(self) -> None:
        """Cuts every open connection."""
        for writer in self._open:
            writer.transport.abort()
            self.num_cuts += 1

    def cut_after(self, num_events: int, num_more_bytes: int = 0,
                  at_cut: Callable[[], Awaitable[None]] = _nothing) -> None:
        self._num_events, self._num_more_bytes, self._at_cut = num_events, num_more_bytes, at_cut

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        host, _, port = self.target.removeprefix("http://").partition(":")
        with contextlib.suppress(OSError):
            from_pod, to_pod = await asyncio.open_connection(host, int(port))
            asking = asyncio.create_task(pass_on(reader, to_pod))
            self._open.add(writer)
            try:
                await self._answer(from_pod, writer)
            finally:
                self._open.discard(writer)
                asking.cancel()
                to_pod.close()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = b""                                      # since the cut was requested: connections are reused
        while piece := await reader.read(PIECE_BYTES):
            sent = b"" if self._num_events is None else sent + piece
            end = self._end(sent)
            num_too_many = 0 if end is None else len(sent) - end
            writer.write(piece[:max(len(piece) - num_too_many, 0)])
            await writer.drain()
            if end is not None:
                self._num_events = None
                self.num_cuts += 1
                await self._at_cut()
                return

    def _end(self, sent: bytes) -> int | None:
        """Where to cut what was sent; None: it is too short so far."""
        if self._num_events is None or sent.count(b"\n\n") < max(self._num_events, 1):
            return None
        end = sent.index(b"\r\n\r\n") + 4 if self._num_events == 0 else 0
        for _ in range(self._num_events):
            end = sent.index(b"\n\n", end) + 2
        return end + self._num_more_bytes if len(sent) >= end + self._num_more_bytes else None


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def switch(target: str) -> AsyncIterator[Switch]:
    it = Switch(target)
    server = await asyncio.start_server(it, "127.0.0.1", 0)
    it.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield it
    finally:
        server.close()
