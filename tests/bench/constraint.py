"""The cost of constraints on answers: `python -m tests.bench.constraint FOLDER`.

A model of tests.bench.models; unconstrained streams and constrained streams, in turn, in the engine alone and in a
service. Random weights mostly follow the last form unaided, like a model that was prompted to; of the flags most text
is forced. Also the time to compile schemas that are in use, with the first mask.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.grammar import Grammars, of_regex, of_schema
from shared.job import Sampling
from shared.settings import Settings
from shared.trial import Trials
from tests.bench import client
from tests.bench.run import service
from tests.system import MODEL
from worker.build import build
from worker.constraint import GrammarConstraint
from worker.engine.engine import Engine, Request
from worker.serve import spare_steps

WAVES = 6                   # requests per stream over HTTP: the last run beside fewer, since forms end at other steps
ITEM = {"type": "object", "additionalProperties": False, "required": ["name", "price", "tags"], "properties": {
    "name": {"type": "string"}, "price": {"type": "number"}, "tags": {"type": "array", "items": {"type": "string"}}}}
FLAGS = [f"is_{what}" for what in ("available", "refundable", "verified")]
FLAGGED = {"type": "object", "additionalProperties": False, "required": FLAGS,
           "properties": {flag: {"type": "boolean"} for flag in FLAGS}}
FORMS: dict[str, dict[str, Any]] = {                     # fields of a request
    "anything again": {}, "a regular expression": {"regex": r"([a-z]{1,12} ){400}"},
    "a JSON array of objects": {"guided_json": {"type": "array", "items": ITEM, "minItems": 400}},
    "a JSON array of flags": {"guided_json": {"type": "array", "items": FLAGGED, "minItems": 400}},
    "anything but line breaks": {"regex": r"[^\n]*Z{9}"}}
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
    parser.add_argument("--rounds", type=int, default=5, help="of each, in turn (%(default)s)")
    args = parser.parse_args()
    settings = Settings(model=str(args.folder), max_num_seqs=args.streams, enable_prefix_caching=False,
                        num_speculative_tokens=0)
    engine = build(settings, args.folder)
    spare_steps()
    grammars = Grammars((args.folder / "tokenizer.json").read_text(), engine.model.vocab_size, ())
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder, \
            service(argparse.Namespace(model=str(args.folder)), Path(folder)) as url:
        sides = {"engine alone": partial(of_engine, args, engine, grammars),
                 "over HTTP": partial(of_service, args, url)}
        for side in sides.values():
            side({})
        rates = {name: {form: list[tuple[float, float]]() for form in FORMS} for name in sides}
        for (name, side), _ in product(sides.items(), range(args.rounds)):
            before = side({})
            for form, fields in FORMS.items():          # each between two runs of free text: the machine drifts
                rate, after = side(fields), side({})
                rates[name][form].append((rate, 2 * rate / (before + after)))
                before = after
    table = Table(title=f"{args.streams} streams of {args.tokens} tokens, {args.rounds} rounds in turn, "
                        f"{engine.model!r}")
    table.add_column("they must be")
    for name in sides:
        for column in (f"tok/s, {name}", "of anything's"):
            table.add_column(column, justify="right")
    for form in FORMS:
        medians = [map(statistics.median, zip(*rates[name][form], strict=True)) for name in sides]
        table.add_row(form, *(text for rate, ratio in medians for text in (f"{rate:.0f}", f"{ratio:.3f}")))
    Console(width=110).print(table)
    trials = Trials((args.folder / "tokenizer.json").read_text(), engine.model.vocab_size, ())
    trials.make("schema", {})
    table = Table(title="Compiling with the first mask, as a worker does; and a trial, in a process of its own")
    for column in ("schema", "compiled, ms", "tried, ms"):
        table.add_column(column, justify="right")
    for name, schema in SCHEMAS.items():
        times_s = []
        for run in (lambda schema: grammars.compile(of_schema(schema)), partial(trials.make, "schema")):
            began_s = time.perf_counter()
            run(schema)
            times_s.append(time.perf_counter() - began_s)
        table.add_row(name, *(f"{1000 * took_s:.1f}" for took_s in times_s))
    Console(width=110).print(table)


def of_engine(args: argparse.Namespace, engine: Engine, grammars: Grammars, fields: dict[str, Any]) -> float:
    """Tokens per second of decoding: from the first token of the last stream on."""
    grammar = of_regex(fields["regex"]) if "regex" in fields else of_schema(fields.get("guided_json", {}))
    for number in range(args.streams):
        constraints = (GrammarConstraint.of(grammars, grammar, []),) if fields else ()
        sampling = Sampling(max_tokens=args.tokens, seed=number, ignore_eos=True)
        engine.add(Request(str(number), tuple(range(100, 132)), sampling, constraints=constraints))
    begun: set[str] = set()
    while len(begun) < args.streams:
        begun |= {output.request_id for output in engine.step()}
    began_s, num_drawn = time.perf_counter(), 0
    while engine.has_work:
        num_drawn += sum(len(output.token_ids) for output in engine.step())
    return num_drawn / (time.perf_counter() - began_s)


def of_service(args: argparse.Namespace, url: str, fields: dict[str, Any]) -> float:
    """Tokens per second, prompts included."""
    common = {"model": MODEL, "messages": [{"role": "user", "content": "Go."}], "max_tokens": args.tokens,
              "temperature": 1, "ignore_eos": True} | fields
    bodies = [common | {"seed": number} for number in range(WAVES * args.streams)]
    timings, took_s = asyncio.run(client.run(url, bodies, args.streams))
    return sum(timing.num_tokens for timing in timings) / took_s


if __name__ == "__main__":
    main()
