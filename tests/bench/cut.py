"""Streams that are cut once, and how many of them differ from uninterrupted ones: `python -m tests.bench.cut`.

Each request is made twice. The second time its job is taken from its worker in mid-stream, as in a hand-over, and
another continues by replay. Half are greedy, half sampled with seeds of their own; text, finish reasons and usage are
compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from deploy.redis import RedisServer
from shared import connection
from shared.keys import Shard
from shared.queue import Queue
from shared.settings import Settings
from tests.system import MODEL, System

CUT_AFTER_EVENTS = 6                                    # of some 12 to 40: the flush gathers tokens
TIMEOUT_S = 300.0
Answer = tuple[str, str | None, int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=120, help="of each (%(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="at a time (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        redis = RedisServer(Path(folder) / "redis").start()
        system = System(Path(folder), redis.url, idle_poll_s=0.2)
        try:
            url = system.start_all(2)
            asyncio.run(measure(args, url, redis.url, system.shard))
        finally:
            system.stop()
            redis.stop()


async def measure(args: argparse.Namespace, url: str, redis_url: str, shard: Shard) -> None:
    client = connection.connect(redis_url)
    queue = Queue(client, shard, Settings())
    waiting = list(range(args.streams))
    num_cut, differing, began_s = 0, [], time.monotonic()

    async def ask_in_turn(http: httpx.AsyncClient) -> None:
        nonlocal num_cut
        while waiting:
            body = request(waiting.pop(), args.tokens)
            whole, _ = await answer(http, body, None)
            again, was_cut = await answer(http, body, queue)
            num_cut += was_cut
            if again != whole:
                differing.append((body, whole, again))

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as http:
        await asyncio.gather(*(ask_in_turn(http) for _ in range(args.clients)))
    await client.aclose()
    for body, whole, again in differing[:3]:
        print(body, whole, again, sep="\n")
    print(f"{num_cut} of {args.streams} streams of {args.tokens} tokens were cut once, half greedy, half sampled: "
          f"{len(differing)} differ; {time.monotonic() - began_s:.0f} s")


def request(number: int, num_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0} if number % 2 else {"temperature": 1.2, "seed": number}
    question = f"Count from {1 + number % 50} to 100."
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": num_tokens,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}} | sampling


async def answer(http: httpx.AsyncClient, body: dict[str, Any], queue: Queue | None) -> tuple[Answer, bool]:
    """Text, finish reason and usage; whether the job was taken from its worker on the way."""
    text, reason, was_cut, num_events = "", None, False, 0
    usage: dict[str, int] = {}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        completion_id = response.headers["x-baton-completion-id"]
        async for event in events(response):
            num_events += 1
            if queue and num_events == CUT_AFTER_EVENTS:
                worker = (await queue.describe(completion_id)).get("worker", "")
                was_cut = bool(worker and await queue.release(worker, [completion_id]))
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
            usage = event["usage"] or usage
    return (text, reason, usage["prompt_tokens"], usage["completion_tokens"]), was_cut


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


if __name__ == "__main__":
    main()
