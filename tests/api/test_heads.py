"""A request's head on the wire: what is too large, too slow or no HTTP is refused, and the refusal arrives."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from api import heads
from api.heads import MAX_HEADER_BYTES, BoundedProtocol
from tests.api.scripted import WAIT_S


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body, and says how long it is."""
    num_bytes, more = 0, True
    while more:
        message = await receive()
        num_bytes += len(message["body"])
        more = message["more_body"]
    text = str(num_bytes).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, *pieces: bytes) -> bytes:
        """What comes back, to the end of the connection; sending may fail once an answer is there."""
        try:
            for piece in pieces:
                self.writer.write(piece)
                await self.writer.drain()
        except ConnectionError:
            pass
        return await asyncio.wait_for(self.reader.read(), WAIT_S)


@pytest.fixture
async def client(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    monkeypatch.setattr(heads, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(heads, "LINGER_S", 0.1)
    config = uvicorn.Config(app, http=BoundedProtocol, lifespan="off", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(lambda: BoundedProtocol(config, state, {}), "127.0.0.1", 0)
    client = Client(server.sockets[0].getsockname()[1])
    await client.connect()
    yield client
    client.writer.close()
    server.close()


def refusal(raw: bytes) -> tuple[int, str]:
    """Status and code of an answer that is the last of its connection, in OpenAI's shape."""
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"\r\nx-request-id: req_" in head
    assert b"\r\nconnection: close" in head
    assert b"\r\ncontent-length: %d" % len(body) in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


GET = b"GET / HTTP/1.1\r\nHost: h\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n"
LARGE = {
    "one header": [GET + b"X: " + b"x" * 70_000 + b"\r\n\r\n"],
    "many headers": [GET, *[b"X: " + b"x" * 1000 + b"\r\n"] * 70, b"\r\n"],
    "many small headers": [GET, b"X:\r\n" * 20_000, b"\r\n"],
    "a header without an end": [GET + b"X: ", *[b"x" * 10_000] * 30],
    "a name without an end": [GET, *[b"x" * 10_000] * 30],
    "an address": [b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"],
    "an address without an end": [b"GET /", *[b"x" * 10_000] * 30],
}


@pytest.mark.parametrize("pieces", LARGE.values(), ids=LARGE)
async def test_a_head_that_is_too_large_is_refused(client: Client, pieces: list[bytes]) -> None:
    assert refusal(await client.exchange(*pieces)) == (431, "request_headers_too_large")


@pytest.mark.parametrize("trailers", [[b"X: " + b"x" * 1000 + b"\r\n"] * 70, [b"X: ", *[b"x" * 10_000] * 30]],
                         ids=["many", "endless"])
async def test_trailers_are_bounded_as_heads_are(client: Client, trailers: list[bytes]) -> None:
    """The connection ends; nothing is said where an answer may have begun."""
    await client.exchange(POST + b"\r\n1\r\na\r\n0\r\n", *trailers)


@pytest.mark.parametrize("pieces", [[], [b"GET / HTTP"], [GET], [b"\r\n"], [GET + b"X: x"]], ids=repr)
async def test_a_head_that_does_not_come_to_its_end_is_not_waited_for(client: Client, pieces: list[bytes]) -> None:
    assert refusal(await client.exchange(*pieces)) == (408, "request_timeout")


async def test_the_clock_runs_for_every_request_of_a_connection(client: Client) -> None:
    client.writer.write(GET + b"\r\n")
    assert (await client.reader.readuntil(b"\r\n\r\n0")).startswith(b"HTTP/1.1 200")
    assert refusal(await client.exchange(GET)) == (408, "request_timeout")


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                                  b"GET /\xff HTTP/1.1\r\n\r\n", GET + b"Content-Length: x\r\n\r\n"], ids=repr)
async def test_what_is_no_http_is_refused(client: Client, junk: bytes) -> None:
    assert refusal(await client.exchange(junk)) == (400, "invalid_request")


async def test_a_large_body_in_small_pieces_is_no_large_head(client: Client) -> None:
    num_chunks = 2 * MAX_HEADER_BYTES
    raw = await client.exchange(POST + b"Connection: close\r\n\r\n" + b"1\r\na\r\n" * num_chunks + b"0\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 200")
    assert raw.endswith(b"%d" % num_chunks)


async def test_many_requests_on_one_connection_are_no_large_head(client: Client) -> None:
    one = GET + b"X: " + b"x" * 30_000 + b"\r\n\r\n"
    raw = await client.exchange(*[one] * 9, GET + b"Connection: close\r\n\r\n")
    assert raw.count(b"HTTP/1.1 200") == 10


# ── offers of another protocol ──

OFFER = b"POST / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
SIX, LAST = b"Content-Length: 6\r\n\r\n", b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


def lengths(raw: bytes) -> list[bytes]:
    """How many bytes the application has read of each body."""
    return [answer.rpartition(b"\r\n\r\n")[2] for answer in raw.split(b"HTTP/1.1 200 OK")[1:]]


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n6\r\nsecret\r\n0\r\n\r\n"


@pytest.mark.parametrize("pieces", [
    [OFFER + SIX + b"secret" + LAST], [OFFER + SIX, b"secret", LAST], [OFFER, SIX + b"secret", LAST],
    [OFFER[:-45], OFFER[-45:] + SIX, b"secret", LAST], re.findall(b"(?s).{1,9}", OFFER + SIX + b"secret" + LAST),
    [OFFER + CHUNKED + LAST], [OFFER + CHUNKED[:32], CHUNKED[32:], LAST],
    [OFFER.replace(b"h2c", b"websocket") + SIX + b"secret", LAST],
    [OFFER.replace(b"Upgrade:", b"uPGRADE:") + SIX + b"secret", LAST]],
    ids=["at once", "later", "half a head", "half a name", "nine bytes each", "chunked", "chunked, later", "websocket",
         "other letters"])
async def test_it_is_ignored_and_the_body_is_read(client: Client, pieces: list[bytes]) -> None:
    """As Java's client and `curl --http2` send it."""
    assert lengths(await slowly(client, pieces)) == [b"6", b"0"]


async def test_several_are_ignored(client: Client) -> None:
    """One behind the other, each with a body."""
    assert lengths(await slowly(client, [(OFFER + SIX + b"secret") * 3000 + LAST])) == [b"6"] * 3000 + [b"0"]


@pytest.mark.parametrize("cut", range(0, 45, 5))
async def test_a_body_behind_an_offer_is_no_request(client: Client, cut: int) -> None:
    offer = OFFER + b"Content-Length: %d\r\n\r\n" % len(GET + b"\r\n")
    raw = await slowly(client, [offer[:len(OFFER) - cut], offer[len(OFFER) - cut:], GET + b"\r\n", LAST])
    assert lengths(raw) == [b"%d" % len(GET + b"\r\n"), b"0"]


@pytest.mark.parametrize("last", [OFFER.replace(b"Upgrade,", b"close, Upgrade,"), OFFER.replace(b"/1.1", b"/1.0")],
                         ids=["close", "HTTP/1.0"])
async def test_the_last_request_of_a_connection_may_make_one(client: Client, last: bytes) -> None:
    assert lengths(await slowly(client, [last + SIX, b"secret"])) == [b"6"]


async def test_a_head_that_makes_one_is_bounded(client: Client) -> None:
    assert refusal(await client.exchange(OFFER, *[b"X: " + b"x" * 1000 + b"\r\n"] * 70, b"\r\n"))[0] == 431


@pytest.mark.parametrize("to", [b"h:443", b"/health"])
async def test_there_is_no_tunnel(client: Client, to: bytes) -> None:
    raw = await client.exchange(b"CONNECT " + to + b" HTTP/1.1\r\nHost: h\r\n\r\n" + LAST)
    assert refusal(raw) == (400, "invalid_request")


async def slowly(client: Client, pieces: list[bytes]) -> bytes:
    """What comes back, if each piece is a packet."""
    client.writer.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces[:-1]:
        client.writer.write(piece)
        await client.writer.drain()
        await asyncio.sleep(min(0.02, 0.1 / len(pieces)))
    return await client.exchange(pieces[-1])
