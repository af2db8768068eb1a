"""Blocks of the common shape are fused, whatever the family; a block that does anything else stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from tests.worker.families import FAMILIES, VOCAB_SIZE, save
from worker.model import check
from worker.model.fused import FusedAttention, FusedLayer, FusedMLP, fuse_blocks
from worker.model.loading import load, read_config
from worker.model.weights import load_module

ALL, BOTH, NEITHER = {"attention", "mlp", "layer"}, {"attention", "mlp"}, set[str]()
FUSED = {"llama": ALL, "qwen2": ALL, "qwen3": ALL, "mistral": ALL, "gemma2": BOTH, "gemma3": BOTH, "granite": ALL,
         "olmo2": {"mlp"}, "mixtral": {"attention", "layer"}, "phi3": NEITHER, "gpt2": NEITHER, "gpt_neox": NEITHER}


def fused_kinds(module: nn.Module) -> set[str]:
    kinds = {"attention": FusedAttention, "mlp": FusedMLP, "layer": FusedLayer}
    return {name for name, kind in kinds.items() if any(isinstance(block, kind) for block in module.modules())}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_fused(family: str, tmp_path: Path) -> None:
    """That the model still says the same is what loading checks, and test_equality.py against `generate`."""
    assert fused_kinds(load(str(save(family, tmp_path)), dtype="float32").module) == FUSED[family]


def plain_llama(folder: Path) -> tuple[Any, list[int], Any]:
    save("llama", folder)
    module = load_module(folder, read_config(folder), torch.float32, torch.device("cpu"))
    token_ids = check.random_token_ids(VOCAB_SIZE, check.NUM_TOKENS)
    check.plain_logits(module, token_ids)               # which leaves our attention in place
    return module, token_ids, check.record(module)


class Doubled(LlamaMLP):                                # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class Unturned(LlamaAttention):                         # type: ignore[misc]
    def forward(self, hidden_states: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        return super().forward(hidden_states, (cos, 0 * sin), **kwargs)


@pytest.mark.parametrize(("name", "other", "stays"), [("mlp", Doubled, "mlp"), ("self_attn", Unturned, "attention")])
def test_a_block_that_does_otherwise_stays(name: str, other: type, stays: str, tmp_path: Path) -> None:
    module, token_ids, recorder = plain_llama(tmp_path)
    for layer in module.model.layers:
        getattr(layer, name).__class__ = other
    shapes = [recorder.shapes[index] for index in sorted(recorder.shapes)]
    assert fuse_blocks(module, token_ids, shapes, recorder.scores) == 2 * len(module.model.layers)
    assert fused_kinds(module) == ALL - {stays}
