"""Random models of many families, small enough to be made in a test, and what transformers itself makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from worker.model import cpu

VOCAB_SIZE = 199
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1}
WINDOW = 24

FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16,
                               layer_types=["sliding_attention", "full_attention"]),
    "phi3": Phi3Config(**SMALL),
    "olmo2": Olmo2Config(**SMALL),
    "granite": GraniteConfig(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_positions=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
                       eos_token_id=1),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
}
TWO_KINDS = ["sliding_attention", "full_attention"]
MORE_FAMILIES: dict[str, Any] = {
    "cohere": CohereConfig(**SMALL),
    "cohere2": Cohere2Config(**SMALL, sliding_window=WINDOW, layer_types=TWO_KINDS),
    "exaone4": Exaone4Config(**SMALL, sliding_window=WINDOW, layer_types=TWO_KINDS),
    "gemma": GemmaConfig(**SMALL, head_dim=16),
    "glm4": Glm4Config(**SMALL, head_dim=16),
    "gpt_oss": GptOssConfig(**SMALL, head_dim=16, sliding_window=WINDOW, layer_types=TWO_KINDS, num_local_experts=4,
                            num_experts_per_tok=2),
    "olmo3": Olmo3Config(**SMALL, sliding_window=WINDOW, layer_types=TWO_KINDS),
    "olmoe": OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "opt": OPTConfig(vocab_size=VOCAB_SIZE, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
                     word_embed_proj_dim=64, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
                     pad_token_id=1),
    "phi": PhiConfig(**SMALL),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
    "seed_oss": SeedOssConfig(**SMALL, head_dim=16),
    "smollm3": SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
    "stablelm": StableLmConfig(**SMALL),
    "starcoder2": Starcoder2Config(**SMALL),
}


@contextmanager
def computing_by(kernels: Literal["ours", "vectors", "torch"]) -> Iterator[None]:
    """What is loaded and run in it computes by kernels of ours, where the processor has them, or by torch's.

    "vectors" are ours as where there are no matrix registers.
    """
    with pytest.MonkeyPatch.context() as patch:
        if kernels == "torch":
            patch.setattr(cpu, "computes", lambda dtype: False)
        elif kernels == "vectors":
            patch.setattr("worker.model.cpu.amx.is_there", lambda: False)
        yield


def kinds_of_ours() -> list[Literal["ours", "vectors"]]:
    """That differ on this machine."""
    return ["ours", "vectors"] if cpu.has_matrices(torch.bfloat16) else ["ours"]


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder as save_pretrained writes it, its weights drawn anew but always the same."""
    torch.manual_seed(7)
    module = AutoModelForCausalLM.from_config((FAMILIES | MORE_FAMILIES)[family], dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():           # the usual start is so flat that it says one token for ever
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    module.to(dtype).save_pretrained(folder)
    return folder


def generate(folder: Path, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers' own `generate` in float32, and at each the gap between the two largest logits."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    out: Any = module.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=num_tokens, min_new_tokens=num_tokens, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True)
    top = [logits[0].topk(2).values for logits in out.logits]
    return out.sequences[0, len(prompt):].tolist(), [float(first - second) for first, second in top]


def change_config(folder: Path, **changes: Any) -> None:
    """In a folder that `save` has made."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
