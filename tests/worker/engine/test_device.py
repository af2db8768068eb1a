"""The whole engine on a GPU: it says what it says on a CPU, and its bits do not depend on what runs beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.worker.engine.driver import MIXED, run, token_ids
from tests.worker.families import FAMILIES, save
from worker.engine.engine import Engine
from worker.model.loading import load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

ARRIVALS = {0: MIXED[:2], 7: MIXED[2:]}


def make_engine(folder: Path, device: Literal["cpu", "cuda"], dtype: Literal["float32", "bfloat16"] = "float32",
                num_bytes: int = 1 << 22, **options: Any) -> Engine:
    return Engine(load(str(folder), dtype=dtype, device=device), max_num_seqs=6, prefill_chunk=16,
                  kv_cache_bytes=num_bytes, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_says_on_a_gpu_what_it_says_on_a_cpu(family: str, tmp_path: Path) -> None:
    """With prompts in chunks, found beginnings, choices, drafts; decoding by graphs."""
    folder = save(family, tmp_path)
    engines = [make_engine(folder, device) for device in ("cpu", "cuda")]
    assert engines[1].runner.graphs
    on_cpu, on_gpu = ({key: token_ids(outputs) for key, outputs in run(engine, ARRIVALS).items()}
                      for engine in engines)
    assert on_gpu == on_cpu


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_bits_on_a_gpu_do_not_depend_on_what_runs_beside(family: str, tmp_path: Path) -> None:
    """In bfloat16: alone, together, without graphs, without drafts, and short of memory."""
    folder = save(family, tmp_path)
    roomy, plain = (make_engine(folder, "cuda", "bfloat16") for _ in range(2))
    num_bytes = 4 * 16 * roomy.model.kv_bytes_per_token
    tight = make_engine(folder, "cuda", "bfloat16", num_bytes, num_speculative_tokens=0, max_model_len=48,
                        enable_prefix_caching=False)
    assert roomy.runner.graphs
    plain.runner.graphs = None
    alone = {key: outputs for request in MIXED for key, outputs in run(roomy, {0: [request]}).items()}
    for engine in (roomy, plain, tight):
        for key, outputs in run(engine, ARRIVALS).items():
            assert token_ids(outputs) == token_ids(alone[key]), (engine, key)
            found, expected = ([o.logprobs for output in each for o in [output]] for each in (outputs, alone[key]))
            assert [x for each in found for x in each] == [x for each in expected for x in each]
    assert tight.num_preempted
