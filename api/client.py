"""A transport for the OpenAI SDK, or any httpx client: a stream survives the loss of the server that sends it.

    client = openai.OpenAI(base_url=…, http_client=httpx.Client(transport=ResumingTransport()))

A file to copy: it imports the standard library alone, serves httpx and httpx2 alike, and knows nothing of the rest of
Baton. The application sees whole events, each once; all but chat completions and responses passes untouched.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

PATIENCE_S = 60.0                                       # from the first failure since anything came to the last try
MAX_TRIES = 60                                          # from the last event: a stream that ends without one is a try
MAX_FORGOTTEN_ROUNDS = 7                                # some 2 s: then a Redis that lost its data has been restored
MAX_CONNECTIONS, MAX_KEPT = 1000, 100                   # of the transport of its own, as the SDK has them
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 2.0                   # once every server was tried; doubled from round to round
RETURNABLE = ("draining", "service_unavailable")        # error codes that end a stream, but not its answer
FORGOTTEN = ("completion_not_found", "response_not_found")
LAST_EVENTS = (b"response.completed", b"response.incomplete", b"response.failed")
PASSING = (408, 429, 500, 502, 503, 504)                # from who stands before a server, without an error code of ours
COMPLETION_ID = "x-baton-completion-id"

_Transport: Any = object                                # for type checkers: what httpx.Client and httpx2.Client take


class ResumingTransport(_Transport):  # type: ignore[misc]
    """For a synchronous client or an asynchronous one, over another transport of its kind, or one of its own: limits,
    TLS and proxies are those of that transport, since clients ignore theirs where they are given one.

    `origins` are further servers, https://HOST:PORT, tried in turn where there is no load balancer.
    """

    def __init__(self, transport: Any = None, *, origins: Sequence[str] = (), patience_s: float = PATIENCE_S) -> None:
        self._transport = transport
        self._origins = origins
        self._patience_s = patience_s
        self._lock = threading.Lock()

    def handle_request(self, request: Any) -> Any:
        inner = self._over("HTTPTransport", request)
        if not _is_ours(request):
            return inner.handle_request(request)
        request.read()
        course = _Course(request, self._origins, self._patience_s)
        return course.answer(_send(inner, course), inner)

    async def handle_async_request(self, request: Any) -> Any:
        inner = self._over("AsyncHTTPTransport", request)
        if not _is_ours(request):
            return await inner.handle_async_request(request)
        await request.aread()
        course = _Course(request, self._origins, self._patience_s)
        return course.answer(await _send_async(inner, course), inner)

    def _over(self, kind: str, request: Any) -> Any:
        with self._lock:
            if self._transport is None:
                library = _library(request)
                limits = library.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_KEPT)
                self._transport = getattr(library, kind)(limits=limits)
            return self._transport

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    async def aclose(self) -> None:
        if self._transport:
            await self._transport.aclose()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Body:
    """The bytes of one stream, from whichever servers send them."""

    def __init__(self, course: _Course, response: Any, inner: Any) -> None:
        self._course, self._response, self._inner = course, response, inner

    def __iter__(self) -> Iterator[bytes]:
        course = self._course
        while course.is_stream(self._response):
            try:
                for piece in self._response.stream:
                    if whole := course.feed(piece):
                        yield whole
            except course.lost:
                pass
            if course.ended:
                return
            self._response.close()
            if (pause_s := course.cut()) is None:
                yield _last_event(b"")
                return
            time.sleep(pause_s)
            self._response = _send(self._inner, course)
        yield _last_event(self._response.content)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        course = self._course
        while course.is_stream(self._response):
            try:
                async for piece in self._response.stream:
                    if whole := course.feed(piece):
                        yield whole
            except course.lost:
                pass
            if course.ended:
                return
            await self._response.aclose()
            if (pause_s := course.cut()) is None:
                yield _last_event(b"")
                return
            await asyncio.sleep(pause_s)
            self._response = await _send_async(self._inner, course)
        yield _last_event(self._response.content)

    def close(self) -> None:
        self._response.close()

    async def aclose(self) -> None:
        await self._response.aclose()


def _send(inner: Any, course: _Course) -> Any:
    """A stream, or an answer that is final. Raises the last error when no server answers."""
    while True:
        response = error = None
        try:
            response = inner.handle_request(course.request())
            if course.is_stream(response):
                return response
            response.read()
        except course.lost as lost:
            error = lost
        if (pause_s := course.pause_s(response, error)) is None:
            return response
        time.sleep(pause_s)


async def _send_async(inner: Any, course: _Course) -> Any:
    while True:
        response = error = None
        try:
            response = await inner.handle_async_request(course.request())
            if course.is_stream(response):
                return response
            await response.aread()
        except course.lost as lost:
            error = lost
        if (pause_s := course.pause_s(response, error)) is None:
            return response
        await asyncio.sleep(pause_s)


class _Course:
    """The progress of one answer: the next request and its server, whether to retry, and what has arrived."""

    def __init__(self, request: Any, origins: Sequence[str], patience_s: float) -> None:
        self.library = _library(request)
        self.ended = False                              # with [DONE], or with a final error
        self._request = request
        self._urls = [request.url, *(_moved(request.url, self.library.URL(origin)) for origin in origins)]
        self._key = request.headers.get("idempotency-key") or secrets.token_hex(16)
        self._patience_s = patience_s
        self._completion_id = ""                        # once a stream has begun
        self._position: int | None = None               # of the last event that the application received
        self._half_event = b""
        self._turn = self._num_tries = 0                # tries that failed, since the last event
        self._until_s: float | None = None              # the end of patience, while nothing comes

    # ── what is asked ──

    @property
    def lost(self) -> tuple[type[Exception], ...]:
        """Errors after which a retry may succeed; in a stream timeouts too, since a living server is never silent."""
        lost = (self.library.NetworkError, self.library.RemoteProtocolError, self.library.ConnectTimeout)
        return (*lost, self.library.ReadTimeout) if self._completion_id else lost

    def request(self) -> Any:
        """The request, under the same key each time; once a stream has begun, for what follows its last event."""
        url, headers = self._urls[self._turn % len(self._urls)], self._request.headers.copy()
        if url is not self._request.url:
            headers.pop("host", None)
        headers["accept-encoding"] = "identity"         # events are parsed here
        if not self._completion_id:
            headers["idempotency-key"] = self._key
            return self.library.Request("POST", url, headers=headers, content=self._request.content,
                                        extensions=self._request.extensions)
        for name in ("content-length", "content-type", "idempotency-key"):
            headers.pop(name, None)
        behind = {} if self._position is None else {"starting_after": str(self._position)}
        url = url.copy_with(path=f"{url.path}/{self._completion_id}").copy_merge_params({"stream": "true"} | behind)
        return self.library.Request("GET", url, headers=headers, extensions=self._request.extensions)

    def pause_s(self, response: Any, error: Exception | None) -> float | None:
        """The pause before the next try; None when this answer is final. Raises the error when it was the last try."""
        if error is None and not self._may_change(response):
            return None
        pause_s = self._failed(_retry_after_s(response))
        if error and pause_s is None:
            raise error
        return pause_s

    def _failed(self, wished_s: float = 0.0) -> float | None:
        """Counts a try that brought nothing. The pause before the next one; None when it was the last."""
        now_s = time.monotonic()
        if self._until_s is None:
            self._until_s = now_s + self._patience_s
        self._num_tries += 1
        self._turn += 1
        left_s = self._until_s - now_s
        if left_s <= 0 or self._num_tries >= MAX_TRIES:
            return None
        rounds = (self._num_tries - 1) // len(self._urls)
        pause_s = min(FIRST_PAUSE_S * 2 ** (rounds - 1), MAX_PAUSE_S) * random.uniform(0.5, 1.0) if rounds else 0.0
        return min(max(pause_s, wished_s), left_s)

    def _may_change(self, response: Any) -> bool:
        """Whether another server, or a later try, may answer differently."""
        code = _error_code(response.content)
        if response.status_code == 409:
            return code == "position_not_reached"
        if response.status_code == 404:
            num_rounds = self._num_tries // len(self._urls) + 1
            return bool(self._completion_id) and code in FORGOTTEN and num_rounds < MAX_FORGOTTEN_ROUNDS
        if code is None:
            return response.status_code in PASSING and (bool(self._completion_id) or response.status_code >= 502)
        returning = bool(self._completion_id) or self._num_tries > 0
        return response.status_code in (502, 503) and (returning or code == "draining")

    # ── what has come ──

    def is_stream(self, response: Any) -> bool:
        return bool(response.status_code == 200
                    and response.headers.get("content-type", "").startswith("text/event-stream"))

    def answer(self, response: Any, inner: Any) -> Any:
        """What the application gets: for a stream of Baton's one that resumes, else the response unchanged."""
        if not self.is_stream(response) or COMPLETION_ID not in response.headers:
            return response
        self._completion_id = response.headers[COMPLETION_ID]
        self._num_tries, self._until_s = 0, None
        streams = (_Body, self.library.SyncByteStream, self.library.AsyncByteStream)   # clients require their own types
        return self.library.Response(200, headers=response.headers, extensions=response.extensions,
                                     stream=type("Body", streams, {})(self, response, inner))

    def feed(self, piece: bytes) -> bytes:
        """The complete events, without an error that only says that the server is stopping. A heartbeat too shows that
        the server lives: patience begins with the next failure."""
        self._until_s = None
        *events, self._half_event = (self._half_event + piece).split(b"\n\n")
        whole = b"".join(event + b"\n\n" for event in events if self._take(event))
        if whole:
            self._num_tries = 0
        return whole

    def _take(self, event: bytes) -> bool:
        fields = dict(line.partition(b": ")[::2] for line in event.split(b"\n"))
        data = fields.get(b"data", b"")
        event_name = fields.get(b"event", b"")
        code = _error_code(data) if data.startswith(b'{"error"') or event_name == b"error" else None
        if b"id" in fields:
            self._position = int(fields[b"id"])
        elif code in RETURNABLE:
            return False
        self.ended = self.ended or code is not None or data == b"[DONE]" or event_name in LAST_EVENTS
        return True

    def cut(self) -> float | None:
        """The stream ended before its answer. An event that arrived in part is sent again as a whole. Returns the pause
        before the next try, or None."""
        self._half_event = b""
        return self._failed()


def _library(request: Any) -> Any:
    """httpx or httpx2, whichever the client is made of."""
    return sys.modules[type(request).__module__.partition(".")[0]]


def _is_ours(request: Any) -> bool:
    return bool(request.method == "POST" and request.url.path.endswith(("/chat/completions", "/responses")))


def _moved(url: Any, origin: Any) -> Any:
    return url.copy_with(scheme=origin.scheme, host=origin.host, port=origin.port)


def _retry_after_s(response: Any) -> float:
    try:
        return float(response.headers.get("retry-after-ms", "")) / 1000
    except (AttributeError, ValueError):
        pass
    try:
        return float(response.headers.get("retry-after", ""))
    except (AttributeError, ValueError):
        return 0.0


def _error_code(body: bytes) -> str | None:
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, LookupError, TypeError):
        return None
    return None if code is None else str(code)


def _last_event(content: bytes) -> bytes:
    """Of an answer that cannot be resumed: the server's own error, as an event."""
    words = content if _error_code(content) else b'{"error":{"message":"The stream was cut.",' \
        b'"type":"server_error","param":null,"code":"stream_lost"}}'
    return b"data: %b\n\n" % b" ".join(words.splitlines())
