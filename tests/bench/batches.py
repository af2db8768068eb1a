"""A batch of many short lines: `python -m tests.bench.batches`.

Memory and time of the pod that runs it and of Redis, after a tenth of the lines and after all: the pod's memory must
not depend on their number. One pod, one worker with the built-in model, a Redis of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil

from deploy.redis import RedisServer
from tests.system import MODEL, System, eventually

LOOK_S = 0.25
MAX_TOKENS = 2
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    num_lines: int
    input_bytes: int
    output_bytes: int
    seconds: float
    pod_bytes: tuple[int, int]                          # before, and the maximum
    redis_bytes: tuple[int, int, int]                   # before, the maximum, after

    def __str__(self) -> str:
        mib = 1 << 20
        pod = " → ".join(f"{size / mib:.1f}" for size in self.pod_bytes)
        redis = " → ".join(f"{size / mib:.1f}" for size in self.redis_bytes)
        return (f"{self.num_lines:,} lines ({self.input_bytes / mib:.1f} MiB in, {self.output_bytes / mib:.1f} out): "
                f"{self.seconds:.0f} s, {self.num_lines / self.seconds:.0f} lines/s; pod {pod} MiB (before → peak); "
                f"Redis {redis} MiB (before → peak → after)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--pad-bytes", type=int, default=0, help="of each line, that no job reads (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-") as name:
        folder = Path(name)
        server = RedisServer(folder / "redis").start()
        system = System(folder, server.url)
        try:
            system.start_all(1)
            for num_lines in (args.lines // 10, args.lines):
                print(measure(system, write(folder / "lines.jsonl", num_lines, args.pad_bytes), num_lines), flush=True)
        finally:
            system.stop()
            server.stop()


def write(path: Path, num_lines: int, pad_bytes: int) -> Path:
    def lines() -> Iterator[str]:
        for number in range(num_lines):
            body = {"model": MODEL, "max_tokens": MAX_TOKENS, "user": "x" * pad_bytes,
                    "messages": [{"role": "user", "content": f"Count from {number} to 100."}]}
            yield json.dumps({"custom_id": f"line {number}", "method": "POST", "url": "/v1/chat/completions",
                              "body": body}) + "\n"

    with path.open("w") as file:
        file.writelines(lines())
    return path


def measure(system: System, path: Path, num_lines: int) -> Run:
    """From the upload to the last byte of the output."""
    client = openai.Client(base_url=f"{system.url}/v1", api_key="EMPTY", timeout=TIMEOUT_S)
    process = psutil.Process(system.pods[system.url].popen.pid)

    def pod() -> int:
        return int(process.memory_info().rss)

    def redis() -> int:
        return int(system.redis.info("memory")["used_memory"])

    began_s, before, pods, redises = time.monotonic(), (pod(), redis()), [], []
    file = client.files.create(file=path, purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while (batch := client.batches.retrieve(batch.id)).status in ("validating", "in_progress", "finalizing"):
        pods.append(pod())
        redises.append(redis())
        time.sleep(LOOK_S)
    seconds = time.monotonic() - began_s
    assert batch.status == "completed" and batch.output_file_id, batch
    assert batch.request_counts and batch.request_counts.completed == num_lines, batch
    num_bytes = sum(map(len, client.files.content(batch.output_file_id).iter_bytes()))
    assert num_bytes == client.files.retrieve(batch.output_file_id).bytes
    eventually("the logs of its answers are gone", lambda: not any(system.redis.scan_iter("*:out:*")), TIMEOUT_S + 30)
    counters = system.redis.hgetall(system.shard.key("counters"))
    assert counters[b"submitted"] == counters[b"finished"], counters
    return Run(num_lines, path.stat().st_size, num_bytes, seconds, (before[0], max(*pods, pod())),
               (before[1], max(redises), redis()))


if __name__ == "__main__":
    main()
