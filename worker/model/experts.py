"""Mixtures of experts whose rows do not depend on which other rows are routed to an expert.

An expert gets as many rows as the batch routes to it; for fewer than `MIN_ROWS` the kernels of a CPU would compute in
another order, so rows are padded; on a GPU our own kernel computes (grouped.py). It knows the weights'
layout as transformers declares it on the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "baton"
MIN_ROWS = 4


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    num_tokens, num_chosen = top_k_index.shape
    out = _on_gpu(module, hidden_states, top_k_index) if hidden_states.is_cuda else _by_turns(
        module, hidden_states, top_k_index)
    weighted = out * top_k_weights.reshape(-1, 1)
    return weighted.view(num_tokens, num_chosen, -1).sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


def _by_turns(module: Any, hidden_states: Tensor, top_k_index: Tensor) -> Tensor:
    """[pairs of a row and one of its experts, hidden size]"""
    num_chosen, chosen = top_k_index.shape[1], top_k_index.flatten()
    out = hidden_states.new_empty(len(chosen), hidden_states.shape[-1])
    for expert in torch.unique(chosen).tolist():
        pairs = (chosen == expert).nonzero().flatten()
        rows = torch.cat([pairs, pairs[-1:].expand(max(0, MIN_ROWS - len(pairs)))])
        out[pairs] = _expert(module, expert, hidden_states[rows // num_chosen])[:len(pairs)]
    return out


def _on_gpu(module: Any, hidden_states: Tensor, top_k_index: Tensor) -> Tensor:
    from worker.model.grouped import Pairs  # needs Triton

    pairs = Pairs.of(top_k_index, len(module.down_proj))

    def project(name: str, x: Tensor) -> Tensor:
        weight = getattr(module, name)
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return pairs.project(x, weight.transpose(1, 2) if module.is_transposed else weight, bias,
                             is_by_row=name != "down_proj")

    return _between(module, project, hidden_states)


def _expert(module: Any, expert: int, x: Tensor) -> Tensor:
    return _between(module, lambda name, x: _project(module, name, expert, x), x)


def _between(module: Any, project: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
    """The computations of an expert between and after its products."""
    x = module._apply_gate(project("gate_up_proj", x)) if module.has_gate else module.act_fn(project("up_proj", x))
    x = project("down_proj", x)
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


def _project(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return linear(x, weight.T if module.is_transposed else weight, bias)
