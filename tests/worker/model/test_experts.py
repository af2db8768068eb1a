"""Mixtures on a CPU: experts and routers compute packed what they compute plain, and a row has its own bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

from tests.worker.families import FAMILIES, MORE_FAMILIES, computing_by, kinds_of_ours
from worker.model import cpu, experts
from worker.model.experts import RouterWeight, pack_mixtures

if not cpu.computes(torch.float32):
    pytest.skip("kernels of ours do not run here", allow_module_level=True)

from worker.model.cpu.grouped import Pairs, PanelExperts

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if cpu.computes(dtype)]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.01}
MIXTURES = ["mixtral", "olmoe", "qwen3_moe", "gpt_oss"]
NUM_EXPERTS = 5


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernels", kinds_of_ours())
@pytest.mark.parametrize("by_turns", [False, True], ids=["one call", "a call each"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_outputs", "num_columns", "is_gated"), [
    (40, 66, False), (128, 64, True), (96, 4096, False)])
def test_each_expert_multiplies_the_rows_that_chose_it(
        num_outputs: int, num_columns: int, is_gated: bool, by_turns: bool, dtype: torch.dtype,
        kernels: Literal["ours", "vectors"]) -> None:
    """Most rows chose the second, more than a core's cache holds at once; nobody chose the fourth."""
    torch.manual_seed(0)
    weights = torch.randn(NUM_EXPERTS, num_outputs, num_columns).to(dtype)
    biases = torch.randn(NUM_EXPERTS, num_outputs).to(dtype)
    with computing_by(kernels):
        layers = PanelExperts(weights, biases, is_gated=is_gated)
    layers.is_one_call &= not by_turns
    x, chosen = torch.randn(150, num_columns).to(dtype), torch.tensor([0, 2, 4, 1, 1, 1])[torch.randint(6, (150,))]

    def computed(rows: slice) -> Tensor:
        pairs = Pairs.of(chosen[rows, None])
        found = layers(x[rows][pairs.rows], pairs)
        return torch.empty_like(found).index_copy_(0, pairs.order, found)

    expected = torch.stack([linear(row.double(), weights[expert].double(), biases[expert].double())
                            for row, expert in zip(x, chosen, strict=True)])
    if layers.is_gated:
        gate, up = expected.chunk(2, dim=-1)
        expected = silu(gate) * up
    whole = computed(slice(None))
    assert (whole - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()
    for begin, end in ((0, 1), (1, 4), (4, 40), (40, 150)):
        assert torch.equal(computed(slice(begin, end)), whole[begin:end])


def mixture(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config((FAMILIES | MORE_FAMILIES)[family], dtype=dtype)
    model.eval().requires_grad_(False)
    model.set_experts_implementation(experts.NAME)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model.model.layers[0].mlp


@pytest.mark.parametrize("kernels", kinds_of_ours())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_says_packed_what_it_says_plain(family: str, dtype: torch.dtype, kernels: Literal["ours", "vectors"]
                                                  ) -> None:
    block, x = mixture(family, dtype), torch.randn(1, 40, 64).to(dtype)
    plain = _first(block(x))
    with computing_by(kernels):
        assert pack_mixtures(block) == 2
        packed = _first(block(x))
    assert all(weight.dim() == 1 for weight in block.parameters())
    assert block.experts.gates_in_product == (family != "gpt_oss")
    near = (packed - plain).float().norm(dim=-1) <= 10 * ROUNDING[dtype] * plain.float().norm(dim=-1)
    assert near.float().mean() > 0.9        # in bfloat16 a row may be routed to other experts
    for begin, end in ((0, 1), (1, 3), (3, 40)):
        assert torch.equal(_first(block(x[:, begin:end])), packed[:, begin:end])


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def test_what_multiplies_otherwise_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that does not call `linear`; experts whose layout is not the declared one, or that fail."""
    block = mixture("mixtral")
    x = torch.randn(1, 12, 64)
    monkeypatch.setattr(type(block.gate), "forward", lambda self, x: _routed(x.view(-1, 64) @ self.weight.T))
    plain = block(x)
    monkeypatch.setattr(PanelExperts, "forward", lambda self, x, pairs: x.new_ones(len(x), self.layers[0].num_outputs))
    assert pack_mixtures(block) == 0
    monkeypatch.setattr(PanelExperts, "forward", lambda self, x, pairs: self.layers[0].no_such_thing)
    assert pack_mixtures(block) == 0
    assert torch.equal(block(x), plain) and not isinstance(block.gate.weight, RouterWeight)
    assert len(list(block.parameters())) == 3


def _routed(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights, chosen = logits.softmax(dim=-1).topk(2)
    return logits, weights, chosen


def test_elsewhere_torch_computes() -> None:
    block = mixture("mixtral")
    with computing_by("torch"):
        assert pack_mixtures(block) == 0
