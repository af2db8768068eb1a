"""What it costs that answers must be something: `python -m tests.bench.constraint FOLDER`.

The engine alone on a model of tests.bench.models; streams that may say anything, and streams that must keep a form, in
turn. And how long schemas that are in use take to compile, with the first mask.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shared.grammar import Grammars, of_regex, of_schema
from shared.job import Sampling
from shared.threads import default_threads, num_cores, weight_bytes
from worker.constraint import GrammarConstraint
from worker.engine.engine import Engine, Request
from worker.model.loading import load

ITEM = {"type": "object", "additionalProperties": False, "required": ["name", "price", "tags"], "properties": {
    "name": {"type": "string"}, "price": {"type": "number"}, "tags": {"type": "array", "items": {"type": "string"}}}}
FORMS = {"anything": "", "a regular expression": of_regex(r"([a-z]{1,12} ){400}"),
         "a JSON array of objects": of_schema({"type": "array", "items": ITEM, "minItems": 400})}
STRING = {"type": "string"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"}, "item": ITEM,
    "call of a tool": {"type": "object", "required": ["name", "arguments"], "properties": {
        "name": {"enum": ["get_weather", "search"]}, "arguments": {"type": "object"}}},
    "person": {"type": "object", "required": ["name", "email"], "properties": {
        "name": STRING, "email": {"type": "string", "format": "email"}, "born": {"type": "string", "format": "date"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150}}},
    "tree": {"type": "object", "properties": {"value": STRING, "children": {
        "type": "array", "items": {"$ref": "#"}}}, "required": ["value", "children"]},
    "steps": {"type": "object", "required": ["steps", "answer"], "properties": {"answer": STRING, "steps": {
        "type": "array", "maxItems": 20, "items": {"type": "object", "properties": {
            "explanation": STRING, "output": STRING}, "required": ["explanation", "output"]}}}},
    "codes": {"type": "array", "items": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{6}-[a-f0-9]{8}$"}},
    "countries": {"enum": [f"country {number}" for number in range(250)]},
    "one of ten": {"anyOf": [{"type": "object", "properties": {"kind": {"const": f"k{i}"}, f"field{i}": STRING},
                              "required": ["kind"], "additionalProperties": False} for i in range(10)]},
    "100 optional fields": {"type": "object", "properties": {f"field{i}": STRING for i in range(100)},
                            "additionalProperties": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model of tests.bench.models")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0: a core is left to masks, beside a small model")
    parser.add_argument("--rounds", type=int, default=5, help="of each, in turn (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or default_threads(num_cores(), weight_bytes(args.folder)))
    model = load(str(args.folder))
    grammars = Grammars((args.folder / "tokenizer.json").read_text(), model.vocab_size, ())
    engine = Engine(model, max_num_seqs=args.streams, enable_prefix_caching=False, num_speculative_tokens=0)
    rates: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(args.rounds):
        for form, grammar in FORMS.items():
            rates[form].append(tokens_per_s(engine, grammars, grammar, args.streams, args.tokens))
    table = Table(title=f"{args.streams} streams of {args.tokens} tokens, {args.rounds} rounds in turn, {model!r}")
    for column in ("they must be", "tok/s, median", "of anything's in the same round, median"):
        table.add_column(column, justify="right")
    for form in FORMS:
        ratios = [mine / free for mine, free in zip(rates[form], rates["anything"], strict=True)]
        table.add_row(form, f"{statistics.median(rates[form]):.0f}", f"{statistics.median(ratios):.3f}")
    Console(width=110).print(table)
    table = Table(title="Compiling, and the first mask")
    for column in ("schema", "ms"):
        table.add_column(column, justify="right")
    for name, schema in SCHEMAS.items():
        began_s = time.perf_counter()
        grammars.check(of_schema(schema))
        table.add_row(name, f"{1000 * (time.perf_counter() - began_s):.1f}")
    Console(width=110).print(table)


def tokens_per_s(engine: Engine, grammars: Grammars, grammar: str, streams: int, num_tokens: int) -> float:
    """Of decoding: from the first token of the last stream on."""
    sampling = Sampling(max_tokens=num_tokens, seed=1, ignore_eos=True)
    for number in range(streams):
        constraints = (GrammarConstraint.of(grammars, grammar, []),) if grammar else ()
        engine.add(Request(str(number), tuple(range(100, 132)), sampling, constraints=constraints))
    begun: set[str] = set()
    while len(begun) < streams:
        begun |= {output.request_id for output in engine.step()}
    began_s, num_drawn = time.perf_counter(), 0
    while engine.has_work:
        num_drawn += sum(len(output.token_ids) for output in engine.step())
    return num_drawn / (time.perf_counter() - began_s)


if __name__ == "__main__":
    main()
