"""The kernel's penalties, against torch's operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.job import Sampling
from tests.worker.families import computing_by
from worker.engine.params import Params
from worker.engine.sampler import Row, Sampler
from worker.model import cpu

VOCAB_SIZE = 4096
KINDS: list[dict[str, Any]] = [
    {"presence_penalty": 1.5}, {"frequency_penalty": -0.3, "presence_penalty": 0.2}, {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "frequency_penalty": 2.0, "logit_bias": ((7, 3.0),)}, {}]


@pytest.mark.skipif(not cpu.computes(torch.float32), reason="kernels of ours do not run here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_are_those_of_torch(dtype: torch.dtype) -> None:
    """To the bit, of what was asked, of what was drawn and of both; who asks for none has none."""
    adjusted = []
    for kernels in ("ours", "torch"):
        torch.manual_seed(0)
        with computing_by(kernels):
            sampler = Sampler(len(KINDS), VOCAB_SIZE)
            for slot, kind in enumerate(KINDS):
                prompt, drawn = (torch.randint(VOCAB_SIZE, (500,)).tolist() for _ in range(2))
                sampler.join(slot, Params.of(Sampling(9, seed=slot, **kind), 0, frozenset()), prompt, drawn)
            logits = (torch.randn(len(KINDS), VOCAB_SIZE) * 3).to(dtype)
            before = logits.clone()
            rows = [Row(slot, 500) for slot in reversed(range(len(KINDS)))]
            adjusted.append(sampler._adjusted(logits, rows, [sampler._params(row.slot) for row in rows]).clone())
            assert torch.equal(logits, before)
    assert torch.equal(*adjusted)
    assert torch.equal(adjusted[0][0], logits[0].float())
    assert all((adjusted[0][row] != logits[row].float()).sum() > 400 for row in range(1, len(KINDS)))
