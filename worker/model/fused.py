"""Layers in fewer and larger calls: q, k and v are one product, gate and up another, norms and activations one call.

Small calls cost mostly their overhead, and every weight is read once either way. A block of the common shape is
recognised by the names of its parts, and replaced if its replacement does the same (fusing.py): whatever else a family
does in its blocks stays as transformers has it. The operations between products are kernels, of pointwise.py on
a GPU and of cpu/pointwise.py on a CPU that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.activations import GELUTanh, SiLUActivation

from worker.model import cpu, memory
from worker.model.attention import Context, Scores
from worker.model.linear import agree

Keep = Callable[[Tensor], Tensor]      # some rows of [1, rows, n]


class FusedMLP(nn.Module):
    """down(act(gate(x)) * up(x))"""

    PARTS = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
    MAY_HAVE = frozenset[str]()

    def __init__(self, mlp: Any, _: Mapping[int, Scores]):
        super().__init__()
        self.down_proj = mlp.down_proj
        self.act_fn = mlp.act_fn
        is_silu = type(mlp.act_fn) in (SiLUActivation, nn.SiLU)
        pointwise = _pointwise(mlp.down_proj.weight, mlp.down_proj.in_features)
        self.pointwise = pointwise if is_silu else None
        self.gelu = getattr(pointwise, "gelu_and_multiply", None) if type(mlp.act_fn) is GELUTanh else None
        gate_up: Any = _joined(mlp.gate_proj, mlp.up_proj)
        gate_up.is_gated = self.pointwise is not None   # for its packing
        self.gate_up_proj = gate_up

    def forward(self, x: Tensor) -> Tensor:
        by_product = getattr(self.gate_up_proj, "silu_and_multiply", None)
        if self.pointwise and by_product:
            return cast(Tensor, self.down_proj(by_product(x)))
        gate_up = self.gate_up_proj(x)
        if self.pointwise:
            return cast(Tensor, self.down_proj(self.pointwise.silu_and_multiply(gate_up)))
        if self.gelu:
            return cast(Tensor, self.down_proj(self.gelu(gate_up)))
        gate, up = gate_up.chunk(2, dim=-1)
        return cast(Tensor, self.down_proj(self.act_fn(gate) * up))


class FusedAttention(nn.Module):
    """Rotary attention; each head of q and of k may have a norm of its own."""

    PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
    MAY_HAVE = frozenset({"q_norm", "k_norm"})

    def __init__(self, attention: Any, scores: Mapping[int, Scores]):
        super().__init__()
        self.layer_idx = attention.layer_idx
        self.head_dim = attention.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.qkv_proj = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.scores = scores[self.layer_idx]
        self.pointwise = _pointwise(attention.q_proj.weight, self.head_dim // 2)
        self.norms_in_place = self.q_norm is not None and self.k_norm is not None and hasattr(
            self.pointwise, "norm_heads") and all(map(_is_plain_norm, (self.q_norm, self.k_norm)))

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], context: Context,
                keep: Keep | None = None, **_: Any) -> tuple[Tensor, None]:
        num_rows = hidden_states.shape[1]
        qkv = self.qkv_proj(hidden_states).view(num_rows, -1, self.head_dim)
        query_key, value = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query_key = self._normed(query_key, self.q_norm, self.k_norm)
        angles = {}
        if hasattr(context, "turns_heads"):
            angles["angles"] = tuple(x[0] for x in position_embeddings)
        else:
            query_key = self._rotated(query_key, *position_embeddings)
        query, key = query_key.split([self.num_heads, self.num_kv_heads], dim=1)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = context.attend(self.layer_idx, query, key, value, self.scores, **angles).reshape(1, num_rows, -1)
        return self.o_proj(keep(out) if keep else out), None

    def _normed(self, query_key: Tensor, *norms: Any) -> Tensor:
        heads = query_key.split([self.num_heads, self.num_kv_heads], dim=1)
        if not self.norms_in_place:
            return torch.cat([norm(x) for x, norm in zip(heads, norms, strict=True)], dim=1)
        for x, norm in zip(heads, norms, strict=True):
            self.pointwise.norm_heads(x, norm.weight, norm.variance_epsilon)
        return query_key

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates [rows, heads, head_dim] by the angles of [1, rows, head_dim]: each half with the other."""
        if rotate := getattr(self.pointwise, "rotate", None):       # on a GPU the context does it
            return cast(Tensor, rotate(x, cos[0], sin[0]))
        first, second = x.chunk(2, dim=-1)
        return x * cos[0, :, None] + torch.cat((-second, first), dim=-1) * sin[0, :, None]


class Handover:
    """Passes a layer's output sum and its norm, computed in one call, to the next layer."""

    def __init__(self, norm: Any):
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self._handed: tuple[Tensor, Tensor] | None = None

    def add(self, pointwise: Any, x: Tensor, added: Tensor) -> Tensor:
        self._handed = pointwise.add_and_norm(x, added, self.weight, self.eps)
        return self._handed[0]

    def norm_of(self, x: Tensor) -> Tensor | None:
        """The norm, if `x` is this sum."""
        handed, self._handed = self._handed, None
        return handed[1] if handed and handed[0] is x else None


class FusedLayer(nn.Module):
    """Attention and MLP, each after a root mean square norm and added to its input. Its parts may be fused."""

    PARTS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    MAY_HAVE = frozenset[str]()

    def __init__(self, layer: Any, _: Mapping[int, Scores]):
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.eps = layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon
        self.pointwise = _pointwise(layer.input_layernorm.weight, len(layer.input_layernorm.weight))
        self.from_before: Handover | None = None
        self.to_next: Handover | None = None
        if hasattr(layer, "attention_type"):            # some models choose a mask by it
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states, added = self.apart(hidden_states, None, **kwargs)
        if self.to_next and self.pointwise:
            return self.to_next.add(self.pointwise, hidden_states, added)
        return self._add(hidden_states, added)

    def apart(self, hidden_states: Tensor, added: Tensor | None, keep: Keep | None = None, **kwargs: Any
              ) -> tuple[Tensor, Tensor]:
        """Takes the input as a sum of two tensors and returns the output as such: the next reader adds them. Returns
        only the rows of `keep`, if given: of other rows a last layer needs only keys and values."""
        before, after = self.eps
        normed = self.from_before.norm_of(hidden_states) if self.from_before else None
        if normed is None:
            hidden_states, normed = self._add_and_norm(hidden_states, added, self.input_layernorm.weight, before)
        attended, _ = self.self_attn(hidden_states=normed, **({"keep": keep} if keep else {}), **kwargs)
        if keep:
            hidden_states = keep(hidden_states)
        hidden_states, normed = self._add_and_norm(hidden_states, attended, self.post_attention_layernorm.weight, after)
        return hidden_states, self.mlp(normed)

    def _add(self, x: Tensor, added: Tensor) -> Tensor:
        return cast(Tensor, self.pointwise.add(x, added)) if self.pointwise else x + added

    def _add_and_norm(self, x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if self.pointwise:
            return cast(tuple[Tensor, Tensor], self.pointwise.add_and_norm(x, added, weight, eps))
        total = x if added is None else x + added
        return total, rms_norm(total, weight.shape, weight, eps)


class FusedNorm(nn.Module):
    """The root mean square norm of [..., n], or of a sum of two, in one call."""

    def __init__(self, norm: Any, pointwise: Any):
        super().__init__()
        self.weight, self.variance_epsilon, self.pointwise = norm.weight, norm.variance_epsilon, pointwise
        self.from_before: Handover | None = None

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        normed = self.from_before.norm_of(x) if self.from_before else None
        if normed is not None:
            return normed
        _, normed = self.pointwise.add_and_norm(x.contiguous(), added, self.weight, self.variance_epsilon)
        return cast(Tensor, normed)


def fuse_norms(module: nn.Module) -> None:
    """Replaces norms of the common kind between other blocks."""
    dtype = next(module.parameters()).dtype
    for parent in list(module.modules()):
        norms = {name: child for name, child in parent.named_children() if _is_plain_norm(child)}
        for name, norm in {} if isinstance(parent, Fused) else norms.items():
            weight = cast(Tensor, norm.weight)
            pointwise = _pointwise(weight, len(weight))
            if pointwise and weight.dtype == dtype:
                setattr(parent, name, FusedNorm(norm, pointwise))


def hand_over(module: nn.Module) -> None:
    """Links our layers to the layer or norm after them. With any other input, that one computes the norm itself."""
    for parent in module.modules():
        blocks = [block for child in parent.children()
                  for block in (child if isinstance(child, nn.ModuleList) else [child])]
        for before, block in pairwise(blocks):
            if isinstance(before, FusedLayer) and isinstance(block, FusedLayer | FusedNorm):
                norm = block if isinstance(block, FusedNorm) else block.input_layernorm
                before.to_next = block.from_before = Handover(norm)


def _is_plain_norm(norm: Any) -> bool:
    """Whether a module computes what ours does: some add one to their weights, for example."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None or list(norm.children()):
        return False
    with torch.inference_mode():
        # Around one: a norm that subtracts the mean is not told apart around zero.
        x = (1 + torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0))).to(weight)
        return agree(rms_norm(x, weight.shape, weight, eps), norm(x))


Fused = FusedMLP | FusedAttention | FusedLayer
FUSED: tuple[type[Fused], ...] = (FusedMLP, FusedAttention, FusedLayer)


def kind_of(module: nn.Module) -> type[Fused] | None:
    parts = {name for name, _ in module.named_children()}
    for kind in FUSED:
        linears = [getattr(module, name, None) for name in kind.PARTS if name.endswith("_proj")]
        if parts - kind.MAY_HAVE == kind.PARTS and all(type(linear) is nn.Linear for linear in linears):
            return kind
    return None


def _joined(*linears: nn.Linear) -> nn.Linear:
    """One layer whose output is the outputs of all, side by side."""
    weight = torch.cat([linear.weight for linear in linears])
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined


def _pointwise(weight: Tensor, width: int) -> Any:
    """Kernels for rows of this width on the weight's device; None: torch computes."""
    if memory.is_paged(weight.device):
        from worker.model import pointwise  # needs Triton, which a machine without a GPU may lack

        return pointwise
    if cpu.computes(weight.dtype) and width % cpu.LANES == 0:
        from worker.model.cpu import pointwise as ours

        return ours
    return None
