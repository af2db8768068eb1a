"""The whole engine on a GPU: it says what it says on a CPU, and its bits do not depend on what runs beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.worker.engine.driver import MIXED, greedy, run, seeded, token_ids
from tests.worker.families import FAMILIES, MORE_FAMILIES, save
from worker.engine.engine import Engine, Output, Request
from worker.engine.sampler import Logprobs
from worker.model.loading import load

PAGE_LEN = 16

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

ARRIVALS = {0: MIXED[:2], 7: MIXED[2:]}


def make_engine(folder: Path, device: Literal["cpu", "cuda"], dtype: Literal["float32", "bfloat16"] = "float32",
                num_bytes: int = 1 << 22, **options: Any) -> Engine:
    return Engine(load(str(folder), dtype=dtype, device=device), max_num_seqs=6, prefill_chunk=16,
                  kv_cache_bytes=num_bytes, **options)


@pytest.mark.parametrize("family", FAMILIES | MORE_FAMILIES)
def test_the_engine_says_on_a_gpu_what_it_says_on_a_cpu(family: str, tmp_path: Path) -> None:
    """With prompts in chunks, found beginnings, choices, drafts; decoding by graphs."""
    folder = save(family, tmp_path)
    engines = [make_engine(folder, device) for device in ("cpu", "cuda")]
    assert engines[1].runner.fixed and engines[1].runner.fixed.has_graphs
    on_cpu, on_gpu = ({key: token_ids(outputs) for key, outputs in run(engine, ARRIVALS).items()}
                      for engine in engines)
    assert on_gpu == on_cpu


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_bits_on_a_gpu_do_not_depend_on_what_runs_beside(family: str, tmp_path: Path) -> None:
    """In bfloat16: alone, together, without graphs, and short of memory, where the younger one gives way."""
    folder = save(family, tmp_path)
    roomy, plain = (make_engine(folder, "cuda", "bfloat16") for _ in range(2))
    assert plain.runner.fixed
    for forward in (*plain.runner.fixed.rows, plain.runner.fixed.tiles):
        forward.forget()
    num_bytes = 4 * PAGE_LEN * roomy.model.kv_bytes_per_token       # two pages each, and both want a third
    tight = make_engine(folder, "cuda", "bfloat16", num_bytes, max_model_len=3 * PAGE_LEN, num_speculative_tokens=0)
    growing = [Request("greedy", tuple(range(10, 39)), greedy(5, num_logprobs=2)),
               Request("seeded", tuple(range(40, 69)), seeded(5, num_logprobs=1))]
    for engine, requests in ((roomy, MIXED), (plain, MIXED), (tight, growing)):
        alone = {key: said(outputs) for request in requests for key, outputs in run(roomy, {0: [request]}).items()}
        assert {key: said(outputs) for key, outputs in run(engine, {0: requests[:2], 7: requests[2:]}).items()} == alone
    assert tight.num_preempted


def said(outputs: Sequence[Output]) -> tuple[list[int], list[Logprobs]]:
    return token_ids(outputs), [each for output in outputs for each in output.logprobs]
