"""How fast an answer is replayed, in logged tokens per second: `python -m tests.bench.replay`.

What a worker does that continues the answer of a dead one, in the engine alone: the prompt's prefill, then the logged
tokens through the decode path.
"""

from __future__ import annotations

import argparse
import time

from shared.job import Sampling
from shared.settings import Settings
from worker.build import build
from worker.engine.engine import Engine, Request
from worker.serve import model_folder

LENGTHS = (64, 256, 1024)                               # logged tokens
NUM_PROMPT_TOKENS = 60
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="folder or hub name; the built-in one otherwise")
    args = parser.parse_args()
    settings = Settings(model=args.model)
    engine = build(settings, model_folder(settings))
    for num_tokens in LENGTHS:
        bare_s = min(next_token_s(engine, 0, i) for i in range(ROUNDS))
        took_s = min(next_token_s(engine, num_tokens, i) for i in range(ROUNDS))
        print(f"{num_tokens} logged tokens: next token after {1000 * took_s:.0f} ms, "
              f"{num_tokens / (took_s - bare_s):,.0f} replayed tokens/s")


def next_token_s(engine: Engine, num_tokens: int, salt: int) -> float:
    sampling = Sampling(max_tokens=num_tokens + 1, temperature=0.0, ignore_eos=True)
    logged = tuple(2 + i % 50 for i in range(num_tokens))
    prompt = tuple(2 + (salt + i) % 50 for i in range(NUM_PROMPT_TOKENS))
    began_s = time.perf_counter()
    engine.add(Request("replay", prompt, sampling, continued=(logged,)))
    while not engine.step():
        pass
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
