"""The cost of drawing in a step, by sampling parameters: `python -m tests.bench.drawing`.

The sampler alone, 32 rows of logits in bfloat16, random and rather peaked; all rows have the same parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shared.job import Sampling
from shared.threads import most_threads
from worker.engine.params import Params
from worker.engine.sampler import Row, Sampler

VOCAB_SIZES = 32_000, 151_936                           # of Llama 2 and of Qwen 2.5
STEEPNESS = 2.5
NUM_WARM_UP, NUM_STEPS = 5, 40
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0}, "a temperature": {}, "top_k 20, top_p 0.8": {"top_k": 20, "top_p": 0.8},
    "min_p": {"min_p": 0.05}, "presence_penalty": {"presence_penalty": 1.5}, "repetition_penalty": {
        "repetition_penalty": 1.05}, "top_logprobs 5": {"num_logprobs": 5}, "top_p 0.9, flat rows": {"top_p": 0.9}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(most_threads())
    table = Table(title=f"ms for {args.rows} rows, median of {NUM_STEPS}, {torch.get_num_threads()} threads")
    for column in ("rows ask for", *(f"{vocab_size:,} tokens" for vocab_size in VOCAB_SIZES)):
        table.add_column(column, justify="right")
    for kind, options in KINDS.items():
        table.add_row(kind, *(f"{step_ms(args.rows, vocab_size, options):.2f}" for vocab_size in VOCAB_SIZES))
    Console(width=80).print(table)


def step_ms(num_rows: int, vocab_size: int, options: dict[str, Any]) -> float:
    torch.manual_seed(0)
    logits = (torch.randn(num_rows, vocab_size) * STEEPNESS).bfloat16()
    sampler = Sampler(num_rows, vocab_size)
    for slot in range(num_rows):
        sampler.join(slot, Params.of(Sampling(9, seed=slot, **options), 0, frozenset()), range(500), range(900, 990))
    took_s = []
    for step in range(NUM_WARM_UP + NUM_STEPS):
        began_s = time.perf_counter()
        sampler.sample(logits, [Row(slot, step) for slot in range(num_rows)]).read()
        took_s.append(time.perf_counter() - began_s)
    return 1000 * statistics.median(took_s[NUM_WARM_UP:])


if __name__ == "__main__":
    main()
