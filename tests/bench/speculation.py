"""The gain of draft tokens, and their cost where nothing repeats: `python -m tests.bench.speculation`.

The engine alone on the built-in model, with and without drafts in turn, on the same held-out questions, greedily. CPU
time of the decoding steps, since other tenants of the hardware affect wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from shared.grammar import Grammars, of_schema
from shared.job import Sampling
from shared.settings import Settings
from shared.tokenizer import Tokenizer
from worker.announce import make_card
from worker.build import build
from worker.constraint import GrammarConstraint
from worker.engine.engine import Engine, Request
from worker.serve import BUILT_IN, model_folder
from worker.tiny.skills import held_out

ANY_OBJECT = of_schema({"type": "object"})
SKILLS = [("tool_call", "copies from the prompt", ""), ("json_schema", "copies some of it", ""),
          ("json_schema", "copies some of it, and must be JSON", ANY_OBJECT), ("unknown", "does not repeat", ""),
          ("listing", "does not repeat", "")]
CONCURRENCIES = (1, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=24, help="of each skill (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each, in turn (%(default)s)")
    args = parser.parse_args()
    settings = Settings(enable_prefix_caching=False, threads=1)     # CPU time is then that of one thread
    engine = build(settings, model_folder(settings))
    tokenizer = Tokenizer(make_card(BUILT_IN, engine))
    table = Table(title=f"CPU time of decoding, {args.requests} requests, the best of {args.rounds} rounds")
    for column in ("skill", "", "streams", "ms/token without", "with", "ratio", "drafted", "accepted"):
        table.add_column(column, justify="right")
    grammars = Grammars((model_folder(settings) / "tokenizer.json").read_text(), engine.model.vocab_size,
                        sorted(engine.model.eos_token_ids))
    for skill, kind, grammar in SKILLS:
        prompts = [tuple(tokenizer.encode_chat(q.messages, q.tools)) for q in held_out(skill, args.requests)]
        for streams in CONCURRENCIES:
            drafted, accepted = engine.num_draft_tokens, engine.num_accepted_tokens
            without, drafting = (min(times) for times in zip(*(
                [decode_s(engine, requests(prompts, speculative, grammars, grammar), streams)
                 for speculative in (False, True)]
                for _ in range(args.rounds)), strict=True))
            table.add_row(skill, kind, str(streams), f"{1000 * without:.2f}", f"{1000 * drafting:.2f}",
                          f"{without / drafting:.2f}", str((engine.num_draft_tokens - drafted) // args.rounds),
                          str((engine.num_accepted_tokens - accepted) // args.rounds))
    Console(width=110).print(table)


def requests(prompts: Sequence[tuple[int, ...]], speculative: bool, grammars: Grammars, grammar: str) -> list[Request]:
    sampling = Sampling(max_tokens=160, temperature=0.0, speculative=speculative)
    return [Request(str(i), prompt, sampling,
                    constraints=(GrammarConstraint.of(grammars, grammar, []),) if grammar else ())
            for i, prompt in enumerate(prompts)]


def decode_s(engine: Engine, waiting: list[Request], streams: int) -> float:
    """CPU seconds per token after the first, in a closed loop of so many streams."""
    took_s, num_tokens = 0.0, 0
    in_prefill: set[str] = set()
    while waiting or engine.has_work:
        while waiting and engine.num_running + engine.num_waiting < streams:
            in_prefill.add(waiting[-1].id)
            engine.add(waiting.pop())
        began_s = time.process_time()
        outputs = engine.step()
        if not in_prefill:
            took_s += time.process_time() - began_s
            num_tokens += sum(len(output.token_ids) for output in outputs)
        in_prefill -= {output.request_id for output in outputs}
    return took_s / num_tokens


if __name__ == "__main__":
    main()
