"""Whether an answer depends on what runs beside it: `python -m tests.bench.exactness`.

The engine alone. Each request runs by itself, without cached prefixes and without drafts, and with a mask before each
token if it is constrained; then all run together, with shared prefixes, drafts, too little memory, every third begun on
another worker, and masks made as usual. Counts the answers that differ."""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from typing import Any

from rich.progress import track

from shared.grammar import Grammars, of_choice, of_regex, of_schema
from shared.job import Sampling
from shared.settings import Settings
from tests.worker.engine.driver import alone, token_ids
from worker.build import build
from worker.constraint import GrammarConstraint
from worker.engine.engine import Engine, Output, Request
from worker.model.attention import PAGE_LEN
from worker.serve import model_folder

MAX_MODEL_LEN = 1024
NUM_PAGES = 24              # of memory: half of what these requests would use
NUM_BEGINNINGS = 6
MAX_WAITING = 8
STYLES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0}, {}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20, "num_logprobs": 2}, {"min_p": 0.1},
    {"temperature": 0.0, "repetition_penalty": 1.2}, {"frequency_penalty": 0.5, "min_tokens": 8})
FORMS = (of_regex(r"[^\n]{100}"), of_regex(r"([a-z]{1,8} ){40}"), of_choice(["certainly", "certainly not", "perhaps"]),
         of_schema({"type": "object", "additionalProperties": False, "required": ["found", "names"], "properties": {
             "found": {"type": "boolean"}, "names": {"type": "array", "items": {"type": "string"}, "minItems": 9}}}))


class Asking(GrammarConstraint):
    """Makes a mask before every token."""

    is_trusted = False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--dtype", default="auto", help="of the built-in model's weights (%(default)s)")
    args = parser.parse_args()
    settings = Settings(dtype=args.dtype, max_model_len=MAX_MODEL_LEN, enable_prefix_caching=False, max_num_seqs=1,
                        num_speculative_tokens=0)
    lonely = build(settings, model_folder(settings))
    crowded = build(settings.model_copy(update={
        "enable_prefix_caching": True, "max_num_seqs": 32, "num_speculative_tokens": 8,
        "kv_cache_bytes": NUM_PAGES * PAGE_LEN * lonely.model.kv_bytes_per_token}), model_folder(settings))
    tokenizer_json = (model_folder(settings) / "tokenizer.json").read_text()
    grammars = Grammars(tokenizer_json, lonely.model.vocab_size, sorted(lonely.model.eos_token_ids))
    requests = make_requests(args.requests, lonely.model.vocab_size)
    expected = {request.id: alone(lonely, formed(request, grammars, Asking))[0]
                for request in track(requests, "each alone")}
    found = run_crowd(crowded, [formed(begun(request, expected[request.id]), grammars, GrammarConstraint)
                                for request in requests])
    differ = [request.id for request in requests if found[request.id] != expected[request.id]]
    print(f"{len(requests)} requests, {sum(map(len, expected.values())):,} tokens, {crowded.model!r}: "
          f"{crowded.num_preempted} times preempted, {crowded.num_accepted_tokens:,} of "
          f"{crowded.num_draft_tokens:,} draft tokens accepted; {len(differ)} differ {differ[:5] or ''}")
    return bool(differ)


def make_requests(count: int, vocab_size: int) -> list[Request]:
    draw = random.Random(0)
    beginnings = [[draw.randrange(vocab_size) for _ in range(600)] for _ in range(NUM_BEGINNINGS)]
    requests = []
    for number in range(count):
        prompt = [*draw.choice(beginnings)[:draw.randrange(3, 600)], draw.randrange(vocab_size)]
        sampling = Sampling(max_tokens=draw.randrange(8, 80), seed=number, ignore_eos=True, **draw.choice(STYLES))
        requests.append(Request(str(number), tuple(prompt), sampling))
    return requests


def formed(request: Request, grammars: Grammars, kind: type[GrammarConstraint]) -> Request:
    """Gives every fourth request one of the constraints."""
    number = int(request.id)
    if number % 4:
        return request
    grammar = FORMS[number // 4 % len(FORMS)]
    return replace(request, constraints=(kind.of(grammars, grammar, request.continued_token_ids(0)),))


def begun(request: Request, answer: list[int]) -> Request:
    """Every third as it comes from a worker that died in mid-stream."""
    number = int(request.id)
    return replace(request, continued=(tuple(answer[:number % len(answer)]),)) if number % 3 == 0 else request


def run_crowd(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
    with_answer = {request.id: list(request.continued_token_ids(0)) for request in requests}
    coming = iter(track(requests, "as a crowd"))
    is_over = False
    while not is_over or engine.has_work:
        while not is_over and engine.num_waiting < MAX_WAITING:
            if request := next(coming, None):
                engine.add(request)
            is_over = request is None
        for output in engine.step():
            outputs[output.request_id].append(output)
    engine.check()
    return {name: with_answer[name] + token_ids(outputs[name]) for name in outputs}


if __name__ == "__main__":
    sys.exit(main())
