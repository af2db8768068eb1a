"""Token by token what transformers' own `generate` says, for many families, whatever joins and leaves on the way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.worker.engine.driver import greedy, run, token_ids
from tests.worker.families import FAMILIES, MORE_FAMILIES, VOCAB_SIZE, generate, save
from worker.engine.engine import Engine, Request
from worker.model.loading import load

NUM_TOKENS = {family: 64 if family in FAMILIES else 24 for family in (*FAMILIES, *MORE_FAMILIES)}
PROMPT_LENGTHS = (3, 41, 17, 70)                        # shorter and longer than a chunk, and than a sliding window
CHUNK = 32
TIE_GAP = 1e-4                                          # of two logits: closer ones may change places in float32


@pytest.mark.parametrize("family", NUM_TOKENS)
def test_the_engine_says_what_generate_says(family: str, tmp_path: Path, report: list[str]) -> None:
    """Greedy in float32, mixed lengths, joining and leaving midway. Ties are counted and shown."""
    folder = save(family, tmp_path)
    draw = random.Random(family)
    prompts = [[draw.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
    engine = Engine(load(str(folder), dtype="float32"), max_num_seqs=3, prefill_chunk=CHUNK)
    lengths = [NUM_TOKENS[family] + 8 * i for i in range(len(prompts))]
    requests = [Request(str(i), tuple(prompt), greedy(length))
                for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))]
    outputs = run(engine, {0: requests[:1], 5: requests[1:3], 20: requests[3:]})

    num_ties = 0
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        expected, gaps = generate(folder, prompt, length)
        got = token_ids(outputs[str(i), 0])
        assert len(got) == length
        assert len(set(got)) > length // 8, "a model that repeats itself proves nothing"
        differing = next((k for k in range(length) if got[k] != expected[k]), None)
        if differing is not None:
            assert gaps[differing] < TIE_GAP, f"{family}: token {differing} of request {i} differs, and is no tie"
            num_ties += 1                               # what follows a tie is another text
    report.append(f"equality with generate: {family:<9} {sum(lengths)} tokens, {num_ties} ties")
