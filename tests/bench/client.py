"""A load of streams over raw HTTP/1.1: a tenth of the cost of an SDK, so that the server is what is measured.

Closed loop: `concurrency` connections, each sends its next request when the last answer has ended. It reads what any
OpenAI-compatible server streams: the order of keys, spaces, `[DONE]` and which event brings the usage are the server's.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

REQUEST_TIMEOUT_S = 300.0
# Found in the bytes: parsing each event would cost more than everything else here.
TEXT = re.compile(rb'"content": ?"(?!")')
USAGE = re.compile(rb'"usage": ?\{')
ERROR = re.compile(rb'data: ?\{"error"')


@dataclass
class Timing:
    """One request, in seconds since it was sent; also used to time the engine alone."""

    sent_s: float
    num_tokens: int = 0
    arrivals_s: list[float] = field(default_factory=list)        # of each piece of text

    def arrive(self) -> None:
        self.arrivals_s.append(time.perf_counter() - self.sent_s)

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]

    @property
    def per_token_s(self) -> float:
        """Mean time between tokens, of which several may arrive at once."""
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / max(self.num_tokens - 1, 1)


async def run(url: str, bodies: list[dict[str, Any]], concurrency: int,
              timeout_s: float = REQUEST_TIMEOUT_S) -> tuple[list[Timing], float]:
    """The timings of all requests, and the seconds for all together."""
    waiting = list(reversed(bodies))
    timings: list[Timing] = []

    async def connection() -> None:
        split = urlsplit(url)
        reader, writer = await asyncio.open_connection(split.hostname, split.port)
        while waiting:
            timings.append(await asyncio.wait_for(_ask(reader, writer, waiting.pop()), timeout_s))
        writer.close()

    began_s = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(concurrency)))
    return timings, time.perf_counter() - began_s


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> Timing:
    raw = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    timing = Timing(time.perf_counter())
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: baton\r\ncontent-type: application/json\r\n"
                 b"content-length: %d\r\n\r\n%b" % (len(raw), raw))
    status = await reader.readline()
    if b" 200 " not in status:
        raise ConnectionError(f"refused: {(status + await reader.read(2000)).decode(errors='replace')}")
    while line := await reader.readline():
        if TEXT.search(line):
            timing.arrive()
        if USAGE.search(line):
            timing.num_tokens = json.loads(line.removeprefix(b"data:"))["usage"]["completion_tokens"]
        elif ERROR.match(line):
            raise ConnectionError(f"the answer ended with {line.decode()}")
        elif line == b"0\r\n":
            await reader.readline()
            timing.num_tokens = timing.num_tokens or len(timing.arrivals_s)     # without usage: one token per event
            assert timing.num_tokens, "the answer has no text"
            return timing
    raise ConnectionError("the answer was cut")
