"""Mixtures of experts whose rows do not depend on which other rows are routed to an expert.

An expert gets as many rows as the batch routes to it. Our own kernels compute its products where they run: on a GPU
(grouped.py), and on a CPU (cpu/grouped.py), with weights packed once, those of the router too. Otherwise torch computes
them, in another order for fewer than `MIN_ROWS`, so rows are padded. It knows the weights' layout as transformers
declares it on the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import SiLUActivation
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from worker.model import cpu
from worker.model.linear import agree, stand_in

NAME = "baton"
MIN_ROWS = 4
NOT_AS_EXPECTED = RuntimeError, AttributeError, TypeError, ValueError       # what blocks of another layout raise


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    num_tokens, num_chosen = top_k_index.shape
    compute = _on_gpu if hidden_states.is_cuda else _by_panels if hasattr(module, "panels") else _by_turns
    weighted = compute(module, hidden_states, top_k_index) * top_k_weights.reshape(-1, 1)
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


def _by_panels(module: Any, hidden_states: Tensor, top_k_index: Tensor) -> Tensor:
    from worker.model.cpu.grouped import Pairs  # needs llvmlite

    pairs = Pairs.of(top_k_index)
    found = _between(module, lambda name, x: module.panels[name](x, pairs), hidden_states[pairs.rows])
    out = torch.empty_like(found)
    out[pairs.order] = found
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
    x = project(_first(module), x)
    if not getattr(module, "gates_in_product", False):
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = project("down_proj", x)
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _project(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return linear(x, weight.T if module.is_transposed else weight, bias)


# packing

class RouterWeight(Tensor):
    """Stands in for a packed weight that a module itself multiplies with: `linear` computes the packed product."""

    layer: nn.Module

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and isinstance(args[1], cls):
            return args[1].layer(args[0])
        plain: Any = super().__torch_function__
        return plain(func, types, args, kwargs or {})


    @classmethod
    def of(cls, weight: Tensor, layer: nn.Module) -> RouterWeight:
        own = stand_in(weight).as_subclass(cls)
        own.layer = layer
        return own


def pack_mixtures(module: nn.Module) -> int:
    """Packs weights of experts and routers below `module`, on a CPU, where our kernels run and agree with torch.
    Returns of how many modules."""
    if not all(cpu.computes(weight.dtype) for weight in module.parameters()):
        return 0
    blocks = list(module.modules())
    return (sum(_pack_experts(block) for block in blocks if hasattr(block, "is_transposed"))
            + sum(_pack_router(block) for block in blocks if _is_router(block)))


def _is_router(block: nn.Module) -> bool:
    weight = block._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(block, nn.Embedding | nn.Linear | Conv1D)


def _pack_experts(block: Any) -> bool:
    from worker.model.cpu.grouped import PanelExperts

    names = _first(block), "down_proj"
    biases = tuple(f"{name}_bias" for name in names) if block.has_bias else ()
    if not block._parameters.keys() >= {*names, *biases}:
        return False
    num_experts, *sizes = block.down_proj.shape
    chosen = torch.arange(num_experts + 1)[:, None] % num_experts
    x = _random(num_experts + 1, sizes[1 if block.is_transposed else 0]).to(block.down_proj)

    def pack() -> dict[str, Any]:
        panels = nn.ModuleDict({name: PanelExperts(
            getattr(block, name).transpose(1, 2) if block.is_transposed else getattr(block, name),
            getattr(block, f"{name}_bias") if block.has_bias else None,
            is_gated=name == "gate_up_proj" and _has_plain_gates(block)) for name in names})
        return {"panels": panels, "gates_in_product": panels[names[0]].is_gated,
                **{name: stand_in(getattr(block, name)) for name in (*names, *biases)}}

    return _replace(block, (*names, *biases), pack, (x, chosen, torch.ones_like(x[:, :1])))


def _has_plain_gates(block: Any) -> bool:
    return (block.is_concatenated and type(block.act_fn) in (SiLUActivation, nn.SiLU)
            and type(block)._apply_gate is moe._default_apply_gate)


def _pack_router(block: Any) -> bool:
    from worker.model.cpu.linear import PanelLinear, holds

    def pack() -> dict[str, Any]:
        layer = PanelLinear(block.weight, block._parameters.get("bias"))
        return {"packed_weight": layer, "weight": RouterWeight.of(block.weight, layer)}

    x = _random(2, block.weight.shape[1]).to(block.weight)
    return holds(block.weight) and _replace(block, ("weight",), pack, (x,))


def _replace(block: nn.Module, names: Iterable[str], pack: Callable[[], dict[str, Any]], trial: tuple[Tensor, ...]
             ) -> bool:
    """Replaces parameters by what `pack` returns, or leaves the block as it is if its outputs would differ."""
    before, parts = {name: block._parameters[name] for name in names}, dict[str, Any]()
    with suppress(*NOT_AS_EXPECTED):
        expected = _outputs(block(*trial))
        parts = pack()
        for name in before:
            delattr(block, name)
        for name, part in parts.items():
            setattr(block, name, part)
        if all(map(_agree, _outputs(block(*trial)), expected)):
            return True
    for name in parts:
        if hasattr(block, name):
            delattr(block, name)
    for name, weight in before.items():
        setattr(block, name, weight)
    return False


def _random(num_rows: int, width: int) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0))


def _outputs(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _agree(got: Tensor, expected: Tensor) -> bool:
    return agree(got, expected) if expected.is_floating_point() else got.shape == expected.shape
