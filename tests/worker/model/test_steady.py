"""Activations have the same bits wherever a number is; a model that computes others by itself is found out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig
from transformers.activations import ACT2CLS, ACT2FN

from tests.worker.families import SMALL, computing_by
from worker.model import cpu
from worker.model.loading import load
from worker.model.steady import Seen, Steady, Watch, rounds_by_place, steady_activations

DTYPES = torch.float32, torch.bfloat16
NUM_ROWS, WIDTH = 19, 11_008                            # many enough for three threads, and not for equal parts
NEED_MORE = {"xielu", "prelu"}                          # weights of their own


@pytest.fixture
def threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(ACT2CLS.keys() - NEED_MORE))
def test_a_number_has_the_same_bits_in_a_row_alone_and_among_others(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = nn.ModuleDict({"activation": ACT2FN[name]})
    steady_activations(block, dtype)
    activation = block["activation"]
    both = (4 * torch.randn(NUM_ROWS, 2 * WIDTH)).to(dtype)
    for x in (both.chunk(2, dim=-1)[0], both[:, :WIDTH - 5].contiguous()):
        together = activation(x)
        assert torch.equal(together, torch.cat([activation(x[row:row + 1]) for row in range(NUM_ROWS)]))
        assert torch.equal(together[3:11], activation(x[3:11]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_needs_it_is_wrapped(dtype: torch.dtype) -> None:
    wrapped = set()
    for name in ACT2CLS.keys() - NEED_MORE:
        block = nn.ModuleDict({name: ACT2FN[name]})
        steady_activations(block, dtype)
        wrapped |= {name for each in block.values() if isinstance(each, Steady)}
    assert {"gelu", "gelu_pytorch_tanh"} <= wrapped and wrapped.isdisjoint({"relu", "relu2", "gelu_new", "tanh"})
    assert ("silu" in wrapped) == (dtype == torch.float32)


def seen(width: int, num_rows: int, *, is_dense: bool = True, num_threads: int = 1) -> list[Seen]:
    return [Seen("sigmoid", width * num_rows, is_dense, num_threads)]


@pytest.mark.parametrize(("few", "more", "expected"), [
    ([], [], False),
    (seen(128, 23), seen(128, 24), False),
    (seen(1, 23), seen(1, 24), True),                   # a gate: some rows are left over behind the last vector
    (seen(128, 23, is_dense=False), seen(128, 24, is_dense=False), True),
    (seen(1, 40), seen(1, 40), False),                  # of no row
    (seen(64, 23, num_threads=3), seen(64, 24, num_threads=3), False),
    (seen(4096, 23, num_threads=3), seen(4096, 24, num_threads=3), True),
    (seen(64, 23), [], True)])
def test_which_calls_round_by_place(few: list[Seen], more: list[Seen], expected: bool) -> None:
    assert rounds_by_place(few, more, num_more=24, most_rows=320) is expected


def test_a_watch_sees_what_is_called_by_any_name() -> None:
    x: Tensor = torch.ones(3, 5)
    with Watch() as watch, torch.inference_mode():
        torch.sigmoid(x)
        x.t().sigmoid_()
        nn.functional.silu(x.bfloat16())
        torch.exp(x)
    assert watch.seen == [Seen("sigmoid", 15, is_dense, torch.get_num_threads()) for is_dense in (True, False)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_with_gates_of_one_number_a_row_is_not_taken_for_uniform(dtype: Any, tmp_path: Path) -> None:
    """In bfloat16 they are rounded to the same bits."""
    if not cpu.computes(getattr(torch, dtype)):
        pytest.skip("not by kernels of ours")
    torch.manual_seed(7)
    config = Qwen2MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
                            shared_expert_intermediate_size=48)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    with computing_by("vectors"):
        model = load(str(tmp_path), dtype=dtype)
    assert (model.is_uniform, model.max_shared_rows > 0) == (dtype == "bfloat16", dtype == "bfloat16")
