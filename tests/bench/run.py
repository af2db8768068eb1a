"""`make bench`: what the service does, and what the queue and the API add to the engine alone.

The same requests go first to an engine in a process of its own, then through HTTP, Redis and a worker, at each
concurrency in turn. Times of this machine mean little by themselves; the difference of one run does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.redis import RedisServer
from tests.bench import client
from tests.bench.client import Timing
from tests.system import MODEL, System

CONCURRENCIES = (1, 8, 32)
WARM_UP = 8                                             # requests before each measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="folder or hub name; the built-in one otherwise")
    parser.add_argument("--requests", type=int, default=200, help="per concurrency (%(default)s)")
    parser.add_argument("--prompt-chars", type=int, default=100, help="of the system's message (%(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer (%(default)s)")
    parser.add_argument("--url", help="measure a service that runs, and not one of our own")
    parser.add_argument("--engine-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine_only:
        print(json.dumps(measure_engine(args)))
        return
    engine: dict[str, Any] = {} if args.url else json.loads(subprocess.run(
        [sys.executable, "-m", "tests.bench.run", "--engine-only", *sys.argv[1:]], check=True, capture_output=True,
        text=True).stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        show(args, measure_service(args, Path(folder)), engine)


def bodies(args: argparse.Namespace, model: str, number: int) -> list[dict[str, Any]]:
    """Requests that differ, so that no cache helps, and that all take the same work: long counts, which always show."""
    draw = random.Random(number)
    words = ["count", "spell", "reverse", "add", "seven", "apple", "river", "window", "yellow", "basket"]

    def messages() -> list[dict[str, str]]:
        filler = " ".join(draw.choices(words, k=args.prompt_chars))[:args.prompt_chars]
        return [{"role": "system", "content": filler},
                {"role": "user", "content": f"Count from {draw.randint(1, 60)} to 100."}]

    return [{"model": model, "max_tokens": args.tokens, "ignore_eos": True, "temperature": 0, "messages": messages()}
            for _ in range(number)]


def measure_service(args: argparse.Namespace, folder: Path) -> dict[int, dict[str, float]]:
    if args.url:
        return {c: _through_http(args, args.url, c) for c in CONCURRENCIES}
    redis = RedisServer(folder / "redis").start()
    system = System(folder, redis.url, **({"model": args.model, "served_model_name": MODEL} if args.model else {}))
    try:
        url = system.start_all(1)
        return {c: _through_http(args, url, c) for c in CONCURRENCIES}
    finally:
        system.stop()
        redis.stop()


def _through_http(args: argparse.Namespace, url: str, concurrency: int) -> dict[str, float]:
    asyncio.run(client.run(url, bodies(args, MODEL, max(WARM_UP, concurrency)), concurrency))
    timings, took_s = asyncio.run(client.run(url, bodies(args, MODEL, args.requests), concurrency))
    return summary(timings, took_s)


def measure_engine(args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """The engine alone, in the worker's own build: token ids in, token ids out."""
    from api.submit import resolve_sampling
    from api.wire.request import ChatRequest
    from shared.settings import Settings
    from shared.tokenizer import Tokenizer
    from worker.announce import make_card
    from worker.build import build
    from worker.engine.engine import Engine, Request
    from worker.serve import model_folder

    settings = Settings(model=args.model)
    engine: Engine = build(settings, model_folder(settings))
    card = make_card(MODEL, engine)
    tokenizer = Tokenizer(card)

    def requests(number: int) -> list[Request]:
        made = []
        for i, body in enumerate(bodies(args, MODEL, number)):
            prompt = tokenizer.encode_chat(body["messages"])
            sampling = resolve_sampling(ChatRequest.model_validate(body), card, len(prompt))
            made.append(Request(str(i), tuple(prompt), sampling))
        return made

    def run(number: int, concurrency: int) -> tuple[list[Timing], float]:
        waiting, ended = list(reversed(requests(number))), []
        timings: dict[str, Timing] = {}
        began_s = time.perf_counter()
        while waiting or timings:
            while waiting and len(timings) < concurrency:
                request = waiting.pop()
                engine.add(request)
                timings[request.id] = Timing(time.perf_counter())
            for output in engine.step():
                timings[output.request_id].arrive()
                timings[output.request_id].num_tokens += len(output.token_ids)
                if output.finish_reason:
                    ended.append(timings.pop(output.request_id))
        return ended, time.perf_counter() - began_s

    results = {}
    for concurrency in CONCURRENCIES:
        run(max(WARM_UP, concurrency), concurrency)
        results[concurrency] = summary(*run(args.requests, concurrency))
    return results


def summary(timings: list[Timing], took_s: float) -> dict[str, float]:
    ttft_ms = [1000 * timing.ttft_s for timing in timings]
    gaps_ms = [1000 * gap for timing in timings for gap in timing.gaps_s]
    return {"tokens_per_s": sum(timing.num_tokens for timing in timings) / took_s,
            "ttft_p50_ms": _percentile(ttft_ms, 50), "ttft_p99_ms": _percentile(ttft_ms, 99),
            "per_token_ms": statistics.median(1000 * timing.per_token_s for timing in timings),
            "gap_p50_ms": _percentile(gaps_ms, 50), "gap_p99_ms": _percentile(gaps_ms, 99)}


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def show(args: argparse.Namespace, service: dict[int, dict[str, float]], engine: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"{args.model or MODEL}: {args.requests} requests of {args.tokens} tokens at each concurrency, "
                        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for column in ("streams", "", "tok/s", "TTFT p50", "p99", "per token", "gap p50", "p99"):
        table.add_column(column, justify="right")
    for concurrency, measured in service.items():
        table.add_row(str(concurrency), "service", *map(_cell, measured.values()))
        if alone := engine.get(str(concurrency)):
            table.add_row("", "engine alone", *map(_cell, alone.values()), style="dim")
            added = [measured[name] - alone[name] for name in ("ttft_p50_ms", "ttft_p99_ms", "per_token_ms")]
            table.add_row("", "queue + API add", "", *map(_cell, added), style="bold", end_section=True)
    Console(width=110).print(table, "times in ms; tokens faster than flush_s arrive several at a time", sep="\n")


def _cell(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


if __name__ == "__main__":
    main()
