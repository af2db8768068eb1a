"""HTTP/1.1 on one connection: uvicorn's, with limits for the head of a request, in bytes and in seconds.

Without them a header of any size is accepted, and half a header is waited for without end. It knows nothing of routes;
a request that it refuses never reaches the application.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.error_response import last_answer
from shared.errors import APIError, BadRequest, HeadTooLarge, TooSlow

MAX_HEADER_BYTES = 64 << 10                             # of a request line and its headers, or of framing and trailers
HEAD_TIMEOUT_S = 20.0                                   # from a request's first byte, or a connection's start
LINGER_S = 1.0                                          # after a refusal: closing at once can discard the response


class BoundedProtocol(HttpToolsProtocol):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_header_bytes = 0                      # of this request, in headers that are complete
        self._num_framing_bytes = 0                     # since the last byte of a body, or the end of a request
        self._refused = False
        self._clock: asyncio.TimerHandle | None = None  # runs while the head is incomplete

    # ── what arrives ──

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._clock = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, TooSlow())

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._clock is None and (self.cycle is None or self.cycle.response_complete):
            self._clock = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, TooSlow())
        self._num_framing_bytes += len(data)
        self._feed(memoryview(data))
        if self._num_framing_bytes > MAX_HEADER_BYTES:
            self._refuse(HeadTooLarge())                # one header, or a trailer, that does not end

    def _feed(self, data: memoryview) -> None:
        """As uvicorn does it, but an offer of another protocol is ignored (RFC 9110, 7.8).

        Java's client and `curl --http2` offer HTTP/2 with every request. The parser would skip the body of theirs.
        """
        self._unset_keepalive_if_required()
        try:
            while (end := self._feed_to_offer(data)) is not None:
                data = data[end:]
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("")

    def _feed_to_offer(self, data: memoryview) -> int | None:
        """Where the head ends that makes an offer: a new parser has read it without. None: all is parsed."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)     # the old one may know that this request is the last
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)         # as uvicorn's
            self.parser.feed_data(b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(lines)))
            return int(offer.args[0])
        return None

    # ── what the parser finds in it; an exception here ends the parsing, and comes back as send_400_response ──

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_header_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)         # ': ' and the end of the line
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_clock()
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this is no proxy")        # what follows would be no HTTP
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_framing_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own words
        self._refuse(HeadTooLarge() if self._num_header_bytes > MAX_HEADER_BYTES else
                     BadRequest("This is not a valid HTTP request."))

    def _should_upgrade(self) -> bool:
        return True                                     # nothing begins with this head: it is read again

    def _count(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > MAX_HEADER_BYTES:
            raise ValueError("the head is too large")

    def _refuse(self, error: APIError) -> None:
        """The last response of this connection; none where it would land in the middle of another one."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop_clock()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(last_answer(error))
            self._clock = self.loop.call_later(LINGER_S, self.transport.close)
        else:
            self.transport.close()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
