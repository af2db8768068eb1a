"""What ended and expired jobs leave behind: `python -m tests.bench.soak`.

Redis' keys and memory, and the memory of a pod and of a worker, after a tenth of the jobs and after all of them: they
must not have grown.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
import psutil

from deploy.redis import RedisServer
from tests.system import MODEL, Start, System, eventually, start

RETAIN_S = 1                                            # of finished logs
PASSING = ("*:out:*", "*:job:*")                        # keys that expire after that time
STANDING = ("*:leases", "*:worker:*", "*:card:*", "*:looked")     # of live processes: created and renewed at any time
CLIENTS = 32
TIMEOUT_S = 120.0
MAX_REDIS_GROWTH_BYTES = 1 << 20
MAX_PROCESS_GROWTH_BYTES = 16 << 20                     # allocators' caches come and go


@dataclass(frozen=True, slots=True)
class Footprint:
    """The state at rest, when every log has expired."""

    keys: frozenset[str]                                # except those of live processes
    redis_bytes: int
    pod_bytes: int
    worker_bytes: int

    def __str__(self) -> str:
        redis, pod, worker = (size / 2**20 for size in (self.redis_bytes, self.pod_bytes, self.worker_bytes))
        return f"{len(self.keys)} keys, Redis {redis:.2f} MiB, pod {pod:.1f} MiB, worker {worker:.1f} MiB"

    def grown_to(self, after: Footprint) -> Iterator[str]:
        """What has grown."""
        if left := after.keys - self.keys:
            yield f"keys were left: {' '.join(sorted(left))}"
        for name, limit in (("redis_bytes", MAX_REDIS_GROWTH_BYTES), ("pod_bytes", MAX_PROCESS_GROWTH_BYTES),
                            ("worker_bytes", MAX_PROCESS_GROWTH_BYTES)):
            growth = getattr(after, name) - getattr(self, name)
            if growth > limit:
                yield f"{name} grew by {growth}, and may by {limit}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="(%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        redis = RedisServer(Path(folder) / "redis").start()
        try:
            began_s = time.monotonic()
            before, after = soak(args.jobs // 10, args.jobs, Path(folder), redis.url)
            print(f"after {args.jobs // 10:,} jobs: {before}\nafter {args.jobs:,} jobs: {after} "
                  f"({time.monotonic() - began_s:.0f} s)", *before.grown_to(after), sep="\n")
            return int(any(before.grown_to(after)))
        finally:
            redis.stop()


def soak(num_first: int, num_jobs: int, folder: Path, redis_url: str, start: Start = start
         ) -> tuple[Footprint, Footprint]:
    """After the first jobs, and after all, on a system of its own, with exclusive use of this Redis."""
    system = System(folder, redis_url, start=start, retain_s=RETAIN_S)
    url = system.start_all(1)
    footprints = []
    for number in (num_first, num_jobs - num_first):
        asyncio.run(ask(url, number))
        footprints.append(at_rest(system))
    system.stop()
    first, last = footprints
    return first, last


async def ask(url: str, number: int) -> None:
    """Requests so many answers of two tokens, every other one as a stream."""
    waiting = iter(range(number))

    async def one_by_one(http: httpx.AsyncClient) -> None:
        for job in waiting:
            body = {"model": MODEL, "max_tokens": 2, "stream": job % 2 == 0,
                    "messages": [{"role": "user", "content": f"Count from {job} to 100."}]}
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as http:
        await asyncio.gather(*(one_by_one(http) for _ in range(CLIENTS)))


def at_rest(system: System) -> Footprint:
    def holds(pattern: str) -> bool:
        return next(system.redis.scan_iter(pattern, count=1000), None) is not None

    eventually("what is kept for a while has expired", lambda: not any(map(holds, PASSING)), 60.0)
    (pod,), (worker,) = system.pods.values(), system.workers
    pod_bytes, worker_bytes = (psutil.Process(process.popen.pid).memory_info().rss for process in (pod, worker))
    names = [key.decode() for key in system.redis.scan_iter(count=1000)]
    keys = frozenset(name for name in names if not any(fnmatchcase(name, pattern) for pattern in STANDING))
    return Footprint(keys, system.redis.info("memory")["used_memory"], pod_bytes, worker_bytes)


if __name__ == "__main__":
    sys.exit(main())
