"""An event stream as an ASGI response: the entries of a log, folded to bytes, with heartbeats, until it ends.

It knows nothing of Redis and nothing of what events mean. A body ends normally only when the answer is complete, or
after an error event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.wire.fold import EventFold
from shared.errors import APIError, Draining

HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache, no-transform",
           "x-accel-buffering": "no"}
COMPLETION_ID = "x-baton-completion-id"


class Source(Protocol):
    """Where entries come from: a stream of the relay, or several."""

    unsent_s: float

    def batches(self) -> AsyncIterator[list[Any]]: ...
    def leave(self) -> None: ...


class EventStream(Response):
    """Relays one stream to one client, after what its fold has already `said`.

    `on_first` runs at the first entry, `on_close` at the end, whatever its reason.
    """

    def __init__(self, stream: Source, fold: EventFold[Any], headers: Mapping[str, str], *, said: bytes = b"",
                 on_first: Callable[[], None] = lambda: None, on_close: Callable[[], None]) -> None:
        super().__init__(None, 200, HEADERS | dict(headers))
        del self.headers["content-length"]
        self._stream = stream
        self._fold = fold
        self._said = said
        self._on_close = on_close
        self._on_first = on_first

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._relay(send)
        finally:
            watch.cancel()
            self._on_close()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._stream.leave()

    async def _relay(self, send: Send) -> None:
        try:
            if await self._say(self._said, send):
                return
            began = False
            async for entries in self._stream.batches():
                body = b"".join(map(self._fold.feed, entries)) if entries else self._fold.heartbeat
                if entries and not began:
                    began = True
                    self._on_first()
                if await self._say(body, send):
                    return
            error: APIError = Draining()
        except APIError as failure:
            error = failure
        # A client that has left does not receive it.
        await send({"type": "http.response.body", "body": self._fold.error(error), "more_body": False})

    async def _say(self, body: bytes, send: Send) -> bool:
        """Sends the fold's bytes. True: that was the end."""
        ended = self._fold.ended
        if body or ended:
            await send({"type": "http.response.body", "body": body, "more_body": not ended})
            self._stream.unsent_s = 0.0
        return ended
