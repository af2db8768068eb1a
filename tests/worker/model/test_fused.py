"""Blocks of the common shape are fused, whatever the family; a block that does anything else stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Ministral3Config, OlmoConfig, SmolLM3Config
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from tests.worker.families import FAMILIES, SMALL, VOCAB_SIZE, save
from worker.model import check, memory
from worker.model.fused import FusedAttention, FusedLayer, FusedMLP, _is_plain_norm
from worker.model.fusing import fuse_blocks
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


class Bounded(LlamaMLP):                                # type: ignore[misc]
    """Bounds that usual inputs do not reach."""

    def forward(self, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=100.0)) * self.up_proj(x))


@pytest.mark.parametrize(("name", "other", "stays"), [
    ("mlp", Doubled, "mlp"), ("mlp", Bounded, "mlp"), ("self_attn", Unturned, "attention")])
def test_a_block_that_does_otherwise_stays(name: str, other: type, stays: str, tmp_path: Path) -> None:
    module, token_ids, recorder = plain_llama(tmp_path)
    for layer in module.model.layers:
        getattr(layer, name).__class__ = other
    shapes = [recorder.shapes[index] for index in sorted(recorder.shapes)]
    assert fuse_blocks(module, token_ids, shapes, recorder.scores, 512) == 2 * len(module.model.layers)
    assert fused_kinds(module) == ALL - {stays}


YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 64,
                        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


def made(config: Any, folder: Path, std: float, dtype: torch.dtype) -> Path:
    torch.manual_seed(7)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
    module.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("std", [0.02, 0.05, 0.25])
@pytest.mark.parametrize(("config", "num_fused"), [
    (Ministral3Config(**SMALL, head_dim=16, sliding_window=None, rope_parameters=YARN | {"llama_4_scaling_beta": 0.1}),
     0),
    (Ministral3Config(**SMALL, head_dim=16, sliding_window=None, rope_parameters=YARN | {"llama_4_scaling_beta": 0.0}),
     2),
    (OlmoConfig(**SMALL, clip_qkv=8.0), 0),
    (SmolLM3Config(**SMALL, no_rope_layers=[1, 0]), 1),
    (SmolLM3Config(**SMALL, no_rope_layers=[1, 1]), 2),
], ids=["queries grow from a position on", "they do not", "values have bounds", "one layer rotates", "both do"])
def test_attention_that_differs_where_a_few_tokens_do_not_show_it_stays(
        config: Any, num_fused: int, std: float, dtype: Any, tmp_path: Path) -> None:
    module = load(str(made(config, tmp_path, std, torch.float32)), dtype=dtype).module
    assert sum(isinstance(layer.self_attn, FusedAttention) for layer in module.model.layers) == num_fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_family_that_rotates_in_float32_is_served(dtype: torch.dtype, tmp_path: Path) -> None:
    """In bfloat16 its fused blocks would hand numbers of another type to attention, so they stay."""
    for clip_qkv in (None, 8.0):
        model = load(str(made(OlmoConfig(**SMALL, clip_qkv=clip_qkv), tmp_path, 0.25, dtype)))
        assert ("attention" in fused_kinds(model.module)) == (model.dtype == torch.float32 and clip_qkv is None)


def test_queries_that_grow_beyond_the_context_do_not_matter(tmp_path: Path) -> None:
    config = Ministral3Config(**SMALL, head_dim=16, sliding_window=None,
                              rope_parameters=YARN | {"llama_4_scaling_beta": 0.1})
    folder = made(config, tmp_path, 0.25, torch.float32)
    assert "attention" in fused_kinds(load(str(folder), max_model_len=64).module)


@pytest.mark.parametrize("config", [
    Ministral3Config(**SMALL, head_dim=16, sliding_window=None, rope_parameters=YARN | {"llama_4_scaling_beta": 0.5}),
    FAMILIES["llama"],
], ids=["ministral3", "llama"])
def test_late_positions_have_the_plain_models_logits(config: Any, tmp_path: Path) -> None:
    """Compared on 200 tokens, not on the few of the start."""
    folder, num_tokens = made(config, tmp_path, 0.25, torch.float32), 200
    model = load(str(folder))
    token_ids = check.random_token_ids(VOCAB_SIZE, num_tokens)
    chunk = memory.scratch(model.kv_shapes, 1, num_tokens, model.dtype, model.device).chunk(0, 0, num_tokens)
    got = model.forward(token_ids, range(num_tokens), chunk, range(num_tokens))
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor([token_ids])).logits[0]
    assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [64, 512, 4096])
def test_a_norm_that_subtracts_the_mean_is_another_one(size: int, dtype: torch.dtype) -> None:
    """In half precision its output for numbers around zero is that of ours."""
    assert _is_plain_norm(LlamaRMSNorm(size).to(dtype))
    assert not _is_plain_norm(Cohere2LayerNorm(size, eps=1e-5).to(dtype))
