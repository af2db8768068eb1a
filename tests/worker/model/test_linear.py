"""Packed layers say what plain ones say, and where they cannot be packed the plain ones stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.worker.families import computing_by
from worker.model import linear
from worker.model.linear import PackedLinear, pack_linears
from worker.model.loading import computes_bfloat16


@pytest.fixture(autouse=True)
def any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(linear, "MIN_FLOAT32_WEIGHTS", 0)
    with computing_by(getattr(request, "param", "torch")):
        yield


@pytest.mark.parametrize("any_size", ["ours", "torch"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_layers_say_what_plain_ones_say(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Sequential(Conv1D(32, 96), nn.Linear(32, 7, bias=False)))
    module.to(dtype).requires_grad_(False)
    x = torch.randn(1, 5, 48).to(dtype)
    expected = module(x)
    may_be_packed = dtype == torch.float32 or computes_bfloat16()
    assert pack_linears(module) == (3 if may_be_packed else 0)
    assert any(isinstance(layer, nn.Linear) for layer in module.modules()) != may_be_packed
    assert torch.allclose(module(x).float(), expected.float(), rtol=0.02, atol=0.02)


def test_a_layer_that_cannot_be_packed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are private to torch: gone, or wrong, they are not used."""
    def gone(*_: object) -> PackedLinear:
        raise AttributeError("no such operator")

    class Wrong(PackedLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    for replacement in (gone, Wrong):
        monkeypatch.setattr(linear, "PackedLinear", replacement)
        module = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
        assert pack_linears(module) == 0
        assert type(module[0]) is nn.Linear


def test_other_types_of_number_stay() -> None:
    assert pack_linears(nn.Sequential(nn.Linear(8, 8).double())) == 0


def test_a_small_layer_in_float32_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_FLOAT32_WEIGHTS", 8 * 16)
    module = nn.Sequential(nn.Linear(8, 15), nn.Linear(15, 16)).requires_grad_(False)
    assert pack_linears(module) == 1
    assert type(module[0]) is nn.Linear
