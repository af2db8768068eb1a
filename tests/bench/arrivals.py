"""Time to first token when many arrive at once, exact and fast: `python -m tests.bench.arrivals`.

The engine alone: all requests arrive before the first step. Exact computes each prompt separately and decodes in
forwards of few rows; fast computes prompts and answers together."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import get_args

from rich.console import Console
from rich.table import Table

from shared.job import Sampling
from shared.settings import Settings
from worker.build import build
from worker.engine.engine import Engine, Request
from worker.serve import model_folder

NUMERICS = get_args(Settings.model_fields["numerics"].annotation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="folder or hub name; the built-in one otherwise")
    parser.add_argument("--requests", type=int, default=32, help="at once (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="of each, in turn (%(default)s)")
    args = parser.parse_args()
    settings = Settings(model=args.model, enable_prefix_caching=False)
    engines = {numerics: build(settings.model_copy(update={"numerics": numerics}), model_folder(settings))
               for numerics in NUMERICS}
    for engine in engines.values():
        arrive(engine, args)
    rounds = [{numerics: arrive(engine, args) for numerics, engine in engines.items()} for _ in range(args.rounds)]
    table = Table(title=f"{args.requests} prompts of {args.prompt_tokens} tokens at once, median of {args.rounds}")
    for column in ("numerics", "first token p50", "the last one's", "tok/s"):
        table.add_column(column, justify="right")
    for numerics in NUMERICS:
        median, last, rate = (statistics.median(values) for values in zip(*(r[numerics] for r in rounds), strict=True))
        table.add_row(numerics, f"{1000 * median:,.0f} ms", f"{1000 * last:,.0f} ms", f"{rate:,.0f}")
    Console(width=110).print(table)


def arrive(engine: Engine, args: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds to the first token of the median request and of the last; tokens per second."""
    draw = random.Random(0)
    sampling = Sampling(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
    began_s = time.perf_counter()
    for number in range(args.requests):
        prompt = tuple(draw.randrange(engine.model.vocab_size) for _ in range(args.prompt_tokens))
        engine.add(Request(str(number), prompt, sampling))
    first_s: dict[str, float] = {}
    while engine.has_work:
        for output in engine.step():
            first_s.setdefault(output.request_id, time.perf_counter() - began_s)
    took_s = time.perf_counter() - began_s
    return statistics.median(first_s.values()), max(first_s.values()), args.requests * args.tokens / took_s


if __name__ == "__main__":
    main()
