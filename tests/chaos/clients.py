"""Clients that never give up: raw HTTP, k at a time; a stream that breaks is resumed on any pod, after its last event.

Responses are streamed as an application does it, over the transport that resumes by itself. Clients record what they
received and when, and judge nothing: the checker does.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from api.client import ResumingTransport
from tests.chaos.asks import Ask
from tests.chaos.languages import Language

PATIENCE_S = 120.0                                      # for one answer, everything included
READ_TIMEOUT_S = 5.0                                    # several heartbeats
CONNECT_TIMEOUT_S = 2.0
RETRY_S = 0.05                                          # after a connection that broke, or was refused
MAX_RETRY_S = 2.0                                       # of what a pod asks for: other pods may be ready sooner
TRY_AGAIN = frozenset({409, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Event:
    at_s: float                                         # time.monotonic
    ordinal: int | None                                 # its `id:` line
    data: bytes


@dataclass(slots=True)
class Connection:
    """One HTTP exchange of an answer."""

    url: str
    opened_s: float
    first_s: float | None = None                        # its first event
    closed_s: float | None = None
    why: str = ""                                       # why it ended, if not with the answer


@dataclass(slots=True)
class Transcript:
    """What one client received."""

    ask: Ask
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    id: str = ""                                        # of the completion, once known
    events: list[Event] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    failure: str = ""                                   # why the client gave up

    def __str__(self) -> str:
        return f"{self.ask.name} ({self.id or 'never accepted'})"

    @property
    def language(self) -> Language:
        return self.ask.language

    @property
    def done(self) -> bool:
        return self._last.startswith(self.language.ends)

    @property
    def failed(self) -> bool:
        return self._last.startswith(self.language.fails)

    @property
    def open(self) -> bool:
        return not self.done and not self.failure

    @property
    def resumed(self) -> bool:
        """Whether it took several connections."""
        return sum(connection.first_s is not None for connection in self.connections) > 1

    @property
    def last_ordinal(self) -> int:
        return next((event.ordinal for event in reversed(self.events) if event.ordinal is not None),
                    self.language.first - 1)

    @property
    def _last(self) -> bytes:
        return self.events[-1].data if self.events else b""


class Clients:
    """Clients that take their requests in turn, each repeated as often as time allows."""

    def __init__(self, urls: Sequence[str], model: str, patience_s: float = PATIENCE_S) -> None:
        self.transcripts: list[Transcript] = []
        self._pods = itertools.cycle(urls)
        self._model = model
        self._patience_s = patience_s
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=timeout, limits=limits)
        self._returning = httpx.AsyncClient(timeout=timeout, transport=ResumingTransport(
            httpx.AsyncHTTPTransport(limits=limits), origins=urls))

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._returning.aclose()

    def on(self, url: str) -> frozenset[str]:
        """The completions that a pod relays to them now, except over a transport, which does not report its pod."""
        return frozenset(transcript.id for transcript in self.transcripts
                         if transcript.open and transcript.id and not transcript.language.by_transport
                         and transcript.connections[-1].closed_s is None and transcript.connections[-1].url == url)

    async def run(self, asks: Iterable[Ask], concurrency: int, may_begin: Callable[[], bool] = lambda: True) -> None:
        """Runs all requests, `concurrency` at a time, while new ones may begin."""
        waiting = iter(asks)

        async def client() -> None:
            for ask in waiting:
                if not may_begin():
                    return
                await self.read(ask)

        await asyncio.gather(*(client() for _ in range(concurrency)))

    async def read(self, ask: Ask) -> Transcript:
        """Reads one answer to its end, over as many connections as needed."""
        transcript = Transcript(ask)
        self.transcripts.append(transcript)
        try:
            async with asyncio.timeout(self._patience_s):
                while transcript.open:
                    await asyncio.sleep(await self._connect(transcript))
        except TimeoutError:
            transcript.failure = f"no end within {self._patience_s:.0f} s, last: {transcript.connections[-1].why}"
        return transcript

    async def _connect(self, transcript: Transcript) -> float:
        """Reads one connection to its end. Returns the seconds to wait before the next one."""
        connection = Connection(next(self._pods), time.monotonic())
        transcript.connections.append(connection)
        pause_s = 0.0
        try:
            async with self._request(transcript, connection.url) as response:
                pause_s = await self._take(transcript, connection, response)
        except httpx.HTTPError as error:
            connection.why, pause_s = type(error).__name__, RETRY_S
        connection.closed_s = time.monotonic()
        if transcript.language.by_transport and transcript.id and transcript.open:
            transcript.failure = f"the transport gave up: {connection.why}"
        return pause_s

    def _request(self, transcript: Transcript, url: str) -> Any:
        language = transcript.language
        where, last = url + language.address, transcript.last_ordinal
        if transcript.id and language.has_get:
            return self._http.stream("GET", f"{where}/{transcript.id}",
                                     params={"stream": "true", "starting_after": last})
        http = self._returning if language.by_transport else self._http
        headers = {"idempotency-key": transcript.key} | ({"last-event-id": str(last)} if transcript.id else {})
        return http.stream("POST", where, json=transcript.ask.body(self._model), headers=headers)

    async def _take(self, transcript: Transcript, connection: Connection, response: httpx.Response) -> float:
        if response.status_code != 200:
            body = (await response.aread())[:200]
            connection.why = f"{response.status_code} {body.decode(errors='replace')}"
            if response.status_code not in TRY_AGAIN:
                transcript.failure = connection.why
            return min(float(response.headers.get("retry-after-ms", 1000 * RETRY_S)) / 1000, MAX_RETRY_S)
        transcript.id = transcript.id or response.headers.get("x-baton-completion-id", "")
        connection.why = "ended before the answer"
        parse = EventParser()
        async for piece in response.aiter_bytes():
            for ordinal, data in parse.feed(piece):
                now_s = time.monotonic()
                if ordinal is None and not data.startswith(transcript.language.ends):
                    # An error that is not an event of the answer: resume.
                    connection.why = data[:200].decode(errors="replace")
                    return RETRY_S
                connection.first_s = connection.first_s or now_s
                transcript.events.append(Event(now_s, ordinal, data))
        if transcript.failed:
            transcript.failure = transcript.events[-1].data[:200].decode(errors="replace")
        return RETRY_S if transcript.open else 0.0


class EventParser:
    """Server-sent events from bytes; incomplete ones are kept until they are complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._ordinal: int | None = None
        self._data: bytes | None = None

    def feed(self, piece: bytes) -> Iterator[tuple[int | None, bytes]]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"id: "):
                self._ordinal = int(line[4:])
            elif line.startswith(b"data: "):
                self._data = line[6:]
            elif not line and self._data is not None:
                yield self._ordinal, self._data
                self._ordinal = self._data = None
