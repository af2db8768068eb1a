"""Jobs that are cancelled in every state, and what they leave behind: `python -m tests.bench.cancels`.

Queued, in prefill, in decode, at its end; by a client that leaves, or by the operator's verb. Afterwards no slot, no
block and no key of a live job may be left, on the worker and in Redis.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from deploy.redis import RedisServer
from tests.system import MODEL, System, eventually

PROMPT_CHARS = 1000                                     # several chunks of prefill
TIMEOUT_S = 300.0
LIVING = ("jobs", "ready", "deadlines", "readers", "tenants", "held:*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cancels", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--clients", type=int, default=64, help="at a time: more than run at once (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        redis = RedisServer(Path(folder) / "redis").start()
        system = System(Path(folder), redis.url, disconnect_grace_s=0, retain_s=1)
        try:
            url = system.start_all(1)
            began_s = time.monotonic()
            states = asyncio.run(cancel_all(args, url))
            took_s = time.monotonic() - began_s
            eventually("the worker is idle", lambda: portrait(system).get(b"num_running") == b"0")
            eventually("nothing lives", lambda: not any(left(system).values()))
            print(f"{args.cancels} cancelled in {took_s:.0f} s ({states}); left: {left(system)}, "
                  f"{portrait(system)[b'engine'].decode()}")
            eventually("logs have expired", lambda: not keys(system, "job:*") + keys(system, "out:*"))
            print(f"keys of the shard at the end: {sorted(keys(system, '*'))}")
        finally:
            system.stop()
            redis.stop()


async def cancel_all(args: argparse.Namespace, url: str) -> dict[str, int]:
    draw, waiting, states = random.Random(1), list(range(args.cancels)), {"left": 0, "verb": 0, "ended before": 0}

    async def one_by_one(http: httpx.AsyncClient) -> None:
        while waiting:
            waiting.pop()
            states[await begin_and_cancel(http, draw.choice((0.0, 0.01, 0.1, 0.5, 2.0)), draw.random() < 0.5)] += 1

    limits = httpx.Limits(max_connections=2 * args.clients)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as http:
        await asyncio.gather(*(one_by_one(http) for _ in range(args.clients)))
    return states


async def begin_and_cancel(http: httpx.AsyncClient, after_s: float, by_verb: bool) -> str:
    """Reads for so long, then leaves, or cancels by the verb."""
    body = {"model": MODEL, "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 2,
            "messages": [{"role": "user", "content": "Count from 1 to 100. " + "x" * PROMPT_CHARS}]}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        try:
            async with asyncio.timeout(after_s):
                async for _ in response.aiter_bytes():
                    pass
            return "ended before"
        except TimeoutError:
            if by_verb:
                completion_id = response.headers["x-baton-completion-id"]
                await http.post(f"/v1/chat/completions/{completion_id}/cancel")
            return "verb" if by_verb else "left"


def portrait(system: System) -> dict[bytes, bytes]:
    (name,) = system.redis.zrange(system.shard.key("leases"), 0, -1)
    found: dict[bytes, bytes] = system.redis.hgetall(system.shard.key(f"worker:{name.decode()}"))
    return found


def left(system: System) -> dict[str, int]:
    redis: Any = system.redis
    sizes = {"stream": redis.xlen, "zset": redis.zcard, "hash": redis.hlen, "set": redis.scard}
    return {name: sum(sizes[redis.type(key).decode()](key) for key in redis.keys(pattern(system, name)))
            for name in LIVING}


def keys(system: System, name: str) -> list[str]:
    tag = system.shard.tag
    return [key.decode().removeprefix(f"{tag}:") for key in system.redis.keys(pattern(system, name))]


def pattern(system: System, name: str) -> str:
    return f"{system.shard.tag}:{name}"


if __name__ == "__main__":
    main()
