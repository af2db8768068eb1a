"""The cost of a long prompt: when it is cached, and for streams beside it. `python -m tests.bench.prompts`.

The engine alone, on seeded random weights (5 million, llama's shape) unless a model is given. A prompt is computed,
then requested again, so that nearly all of it is cached; another starts while streams decode.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shared.job import Sampling
from shared.settings import Settings
from tests.bench.models import save_random
from worker.build import build
from worker.engine.engine import Engine, Request
from worker.serve import model_folder

NUM_BEHIND = 16             # tokens after the cached part: the last one's logits are always computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="folder or hub name; random weights otherwise")
    parser.add_argument("--found-tokens", type=int, default=1000, help="of the prompt asked twice (%(default)s)")
    parser.add_argument("--entering-tokens", type=int, default=3000, help="of the prompt that enters (%(default)s)")
    parser.add_argument("--streams", type=int, default=8, help="that decode beside it (%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="of each, in turn (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model=args.model or str(save_random("5m", Path(folder))), num_speculative_tokens=0)
        engine = build(settings, model_folder(settings))
    draw = random.Random(0)
    asked = [ask_twice(engine, prompt(engine, draw, args.found_tokens + NUM_BEHIND)) for _ in range(1 + args.rounds)]
    quiet, entering = zip(*(enter(engine, draw, args) for _ in range(1 + args.rounds)), strict=True)
    table = Table(title=f"{args.rounds} rounds on {engine.model!r}, {engine.prefill_budget} tokens at a time")
    for column in ("", "p50", "p99"):
        table.add_column(column, justify="right")
    for name, seconds in (
            (f"first token of {args.found_tokens} tokens, computed", [miss_s for miss_s, _ in asked[1:]]),
            ("the same, found", [hit_s for _, hit_s in asked[1:]]),
            (f"between tokens of {args.streams} streams", [s for gaps_s in quiet[1:] for s in gaps_s]),
            (f"while {args.entering_tokens} tokens enter", [s for gaps_s in entering[1:] for s in gaps_s])):
        p50_s, p99_s = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
        table.add_row(name, f"{1000 * p50_s:.2f} ms", f"{1000 * p99_s:.2f} ms")
    Console(width=110).print(table)


def prompt(engine: Engine, draw: random.Random, num_tokens: int) -> tuple[int, ...]:
    return tuple(draw.randrange(engine.model.vocab_size) for _ in range(num_tokens))


def ask_twice(engine: Engine, token_ids: tuple[int, ...]) -> tuple[float, float]:
    """Seconds to the first token: computed, then cached."""
    def first_token_s() -> float:
        engine.add(Request("it", token_ids, sampling(1)))
        began_s = time.perf_counter()
        while engine.has_work:
            engine.step()
        return time.perf_counter() - began_s

    return first_token_s(), first_token_s()


def enter(engine: Engine, draw: random.Random, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of each step in which every stream gains a token: before, and during, the prefill of the long prompt."""
    long = Request("long", prompt(engine, draw, args.entering_tokens), sampling(1))
    num_steps = -(-args.entering_tokens // engine.prefill_budget)
    for number in range(args.streams):
        engine.add(Request(str(number), prompt(engine, draw, 8), sampling(4 + 2 * num_steps)))
    while len(engine.step()) < args.streams:
        pass
    quiet = [step_s(engine) for _ in range(num_steps)]
    engine.add(long)
    entering = [step_s(engine) for _ in range(num_steps)]
    while engine.has_work:
        engine.step()
    return quiet, entering


def step_s(engine: Engine) -> float:
    began_s = time.perf_counter()
    engine.step()
    return time.perf_counter() - began_s


def sampling(num_tokens: int) -> Sampling:
    return Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


if __name__ == "__main__":
    main()
