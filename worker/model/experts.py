"""Mixtures of experts whose rows do not depend on who else is routed to an expert.

An expert sees as many rows as the batch happens to send; below `MIN_ROWS` the kernels would compute them in another
order, so fewer rows are filled up. It knows the weights' layout as transformers declares it on the module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "baton"
MIN_ROWS = 4


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    num_tokens, num_chosen = top_k_index.shape
    chosen = top_k_index.flatten()
    out = hidden_states.new_empty(len(chosen), hidden_states.shape[-1])
    for expert in torch.unique(chosen).tolist():
        pairs = (chosen == expert).nonzero().flatten()
        rows = torch.cat([pairs, pairs[-1:].expand(max(0, MIN_ROWS - len(pairs)))])
        out[pairs] = _expert(module, expert, hidden_states[rows // num_chosen])[:len(pairs)]
    weighted = out * top_k_weights.reshape(-1, 1)
    return weighted.view(num_tokens, num_chosen, -1).sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


def _expert(module: Any, expert: int, x: Tensor) -> Tensor:
    if module.has_gate:
        x = module._apply_gate(_project(module, "gate_up_proj", expert, x))
    else:
        x = module.act_fn(_project(module, "up_proj", expert, x))
    x = _project(module, "down_proj", expert, x)
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


def _project(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return linear(x, weight.T if module.is_transposed else weight, bias)
