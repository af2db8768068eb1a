"""`make bench`: the service's performance, and what the queue and the API add to the engine alone.

The same requests go through HTTP, Redis and a worker, and to an engine in a process of its own, in turn, at each
concurrency. Absolute times of this machine mean little; differences within one run do.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import pairwise
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
MAX_ROUNDS = 8                                          # in which the sides take turns
MIN_FILLS = 3                                           # times that the concurrency is filled in each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="folder or hub name; the built-in one otherwise")
    parser.add_argument("--requests", type=int, default=200, help="per concurrency (%(default)s)")
    parser.add_argument("--prompt-chars", type=int, default=100, help="of the system's message (%(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer (%(default)s)")
    parser.add_argument("--url", help="measure a service that runs, and not one of our own")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        answer(args)
    elif args.url:
        show(args, measure(args, {"service": partial(through_http, args, args.url)}))
    else:
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder, alone() as engine, \
                service(args, Path(folder)) as url:
            show(args, measure(args, {"service": partial(through_http, args, url), "engine alone": engine}))


Side = Callable[[range, int], tuple[list[Timing], float]]
"""Runs some of the requests at a concurrency: their timings, and the seconds for all together."""


def measure(args: argparse.Namespace, sides: dict[str, Side]) -> dict[int, dict[str, dict[str, float]]]:
    """By concurrency, for each side. Sides alternate, since the machine changes from one minute to the next."""
    results = {}
    for place, concurrency in enumerate(CONCURRENCIES):
        num_warm, num_rounds = max(WARM_UP, concurrency), max(1, min(
            MAX_ROUNDS, args.requests // (MIN_FILLS * concurrency)))
        first = place * (args.requests + max(WARM_UP, *CONCURRENCIES)) + num_warm       # requests that nobody has seen
        for side in sides.values():
            side(range(first - num_warm, first), concurrency)
        borders = [first + args.requests * i // num_rounds for i in range(num_rounds + 1)]
        parts = [{name: side(range(begin, end), concurrency) for name, side in sides.items()}
                 for begin, end in pairwise(borders)]
        results[concurrency] = {
            name: summary([timing for part in parts for timing in part[name][0]], sum(part[name][1] for part in parts))
            for name in sides}
    return results


def body(args: argparse.Namespace, model: str, number: int) -> dict[str, Any]:
    """Requests that differ, so that no cache helps, and take the same work: long counts, whose tokens all show."""
    draw = random.Random(number)
    words = ["count", "spell", "reverse", "add", "seven", "apple", "river", "window", "yellow", "basket"]
    filler = " ".join(draw.choices(words, k=args.prompt_chars))[:args.prompt_chars]
    return {"model": model, "max_tokens": args.tokens, "ignore_eos": True, "temperature": 0,
            "messages": [{"role": "system", "content": filler},
                         {"role": "user", "content": f"Count from {draw.randint(1, 60)} to 100."}]}


@contextmanager
def service(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    redis = RedisServer(folder / "redis").start()
    system = System(folder, redis.url, **({"model": args.model, "served_model_name": MODEL} if args.model else {}))
    try:
        yield system.start_all(1)
    finally:
        system.stop()
        redis.stop()


def through_http(args: argparse.Namespace, url: str, numbers: range, concurrency: int) -> tuple[list[Timing], float]:
    return asyncio.run(client.run(url, [body(args, MODEL, number) for number in numbers], concurrency))


@contextmanager
def alone() -> Iterator[Side]:
    """The engine in a process of its own, with the worker's own build: token ids in, token ids out."""
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.run", "--engine", *sys.argv[1:]],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout

    def run(numbers: range, concurrency: int) -> tuple[list[Timing], float]:
        assert process.stdin and process.stdout
        print(numbers.start, numbers.stop, concurrency, file=process.stdin, flush=True)
        timings, took_s = json.loads(process.stdout.readline())
        return [Timing(**timing) for timing in timings], took_s

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait()


def answer(args: argparse.Namespace) -> None:
    """The process behind `alone`, until its input ends."""
    from api.jobs import resolve_sampling
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

    def request(number: int) -> Request:
        asked = body(args, MODEL, number)
        prompt = tokenizer.encode_chat(asked["messages"])
        sampling = resolve_sampling(ChatRequest.model_validate(asked), card, len(prompt))
        return Request(str(number), tuple(prompt), sampling)

    def run(requests: list[Request], concurrency: int) -> tuple[list[Timing], float]:
        ended: list[Timing] = []
        timings: dict[str, Timing] = {}
        began_s = time.perf_counter()
        while requests or timings:
            while requests and len(timings) < concurrency:
                engine.add(requests[-1])
                timings[requests.pop().id] = Timing(time.perf_counter())
            for output in engine.step():
                timings[output.request_id].arrive()
                timings[output.request_id].num_tokens += len(output.token_ids)
                if output.finish_reason:
                    ended.append(timings.pop(output.request_id))
        return ended, time.perf_counter() - began_s

    for line in sys.stdin:
        begin, end, concurrency = map(int, line.split())
        timings, took_s = run([request(number) for number in range(begin, end)], concurrency)
        print(json.dumps([[asdict(timing) for timing in timings], took_s]), flush=True)


def summary(timings: list[Timing], took_s: float) -> dict[str, float]:
    ttft_ms = [1000 * timing.ttft_s for timing in timings]
    gaps_ms = [1000 * gap for timing in timings for gap in timing.gaps_s]
    return {"tokens_per_s": sum(timing.num_tokens for timing in timings) / took_s,
            "ttft_p50_ms": _percentile(ttft_ms, 50), "ttft_p99_ms": _percentile(ttft_ms, 99),
            "per_token_ms": statistics.median(1000 * timing.per_token_s for timing in timings),
            "gap_p50_ms": _percentile(gaps_ms, 50), "gap_p99_ms": _percentile(gaps_ms, 99)}


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def show(args: argparse.Namespace, results: dict[int, dict[str, dict[str, float]]]) -> None:
    table = Table(title=f"{args.model or MODEL}: {args.requests} requests of {args.tokens} tokens at each concurrency, "
                        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for column in ("streams", "", "tok/s", "TTFT p50", "p99", "per token", "gap p50", "p99"):
        table.add_column(column, justify="right")
    for concurrency, measured in results.items():
        for name, of_side in measured.items():
            table.add_row(str(concurrency) if name == "service" else "", name, *map(_cell, of_side.values()))
        if engine := measured.get("engine alone"):
            names = ("ttft_p50_ms", "ttft_p99_ms", "per_token_ms")
            added = [measured["service"][name] - engine[name] for name in names]
            table.add_row("", "queue + API add", "", *map(_cell, added), style="bold", end_section=True)
    Console(width=110).print(table, "times in ms; tokens faster than flush_s arrive several at a time", sep="\n")


def _cell(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


if __name__ == "__main__":
    main()
