"""Which blocks of a model are fused: those whose replacement does what they do, as far as a few trials tell.

Random tokens at the first positions show little of some blocks: scales that begin at later positions, values that are
cut off, heads that are not rotated where weights are so flat that it hardly matters. So what a block hands to attention
is compared by itself, of loud inputs, at the last positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from worker.model.attention import Context, KVShape, Scores, passing
from worker.model.fused import FusedAttention, FusedLayer, FusedMLP, fuse_norms, kind_of
from worker.model.linear import agree
from worker.model.memory import scratch

NUM_LATE_TOKENS = 2         # of the trial at the last positions: so few cost little more than reading the weights
LOUDNESS = 1024             # as a factor of usual inputs; a power of two, which rounds nothing


class Call(NamedTuple):
    """One recorded call of a block that may be fused."""

    parent: nn.Module
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def module(self) -> nn.Module:
        return cast(nn.Module, getattr(self.parent, self.name))

    def louder(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments, the hidden states many times as large; they come first, or by name."""
        if self.args:
            return (self.args[0] * LOUDNESS, *self.args[1:]), self.kwargs
        return (), self.kwargs | {"hidden_states": self.kwargs["hidden_states"] * LOUDNESS}


class Listener:
    """A context that attends to nothing, and keeps what it was handed."""

    handed: tuple[Tensor, Tensor, Tensor]
    scores: Scores

    def attend(self, _layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        self.handed, self.scores = (query, key, value), scores
        return torch.zeros_like(query).transpose(1, 2)


def fuse_blocks(module: nn.Module, token_ids: Sequence[int], shapes: Sequence[KVShape], scores: Mapping[int, Scores],
                max_model_len: int) -> int:
    """Replaces blocks below `module`, where the result is the same for `token_ids`, up to the last position; returns
    how many."""
    weight, num_tokens = next(module.parameters()), len(token_ids)
    num_late = min(NUM_LATE_TOKENS, max_model_len)
    context = scratch(shapes, 1, num_tokens, weight.dtype, weight.device).chunk(0, 0, num_tokens)
    num_fused = 0
    with torch.inference_mode():
        calls = _record(module, token_ids, 0, context)
        late_calls = _record(module, token_ids[:num_late], max_model_len - num_late, Listener())
        for call, late_call in zip(calls, late_calls, strict=True):
            fused = _fuse(call, late_call, scores)
            if fused is not None:
                setattr(call.parent, call.name, fused)
                num_fused += 1
        fuse_norms(module)
    return num_fused


def _record(module: nn.Module, token_ids: Sequence[int], begin: int, context: Context) -> list[Call]:
    """Calls of all blocks that may be fused, in one forward from this position on; a block's parts come before it."""
    calls: list[Call] = []
    hooks = []
    for parent in module.modules():
        for name, child in parent.named_children():
            if kind_of(child) is not None:
                def record(_: Any, args: Any, kwargs: Any, out: Any, parent: nn.Module = parent, name: str = name
                           ) -> None:
                    calls.append(Call(parent, name, args, kwargs, out))

                hooks.append(child.register_forward_hook(record, with_kwargs=True))
    device = next(module.parameters()).device
    try:
        with passing(context):
            module(input_ids=torch.tensor([token_ids], device=device),
                   position_ids=torch.arange(begin, begin + len(token_ids), device=device)[None], use_cache=False,
                   context=context)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _fuse(call: Call, late_call: Call, scores: Mapping[int, Scores]) -> nn.Module | None:
    plain = call.module
    kind = kind_of(plain)
    assert kind is not None
    try:
        fused = kind(plain, scores)
        is_same = _agree(fused(*call.args, **call.kwargs), call.out) and _is_same_late(plain, fused, late_call)
    except Exception:                                   # equal names, but built differently in some way
        return None
    return fused if is_same else None


def _is_same_late(plain: nn.Module, fused: FusedMLP | FusedAttention | FusedLayer, call: Call) -> bool:
    if isinstance(fused, FusedLayer):                   # its parts have been compared by themselves
        return True
    args, kwargs = call.louder()
    if isinstance(fused, FusedMLP):
        return _agree(fused(*args, **kwargs), plain(*args, **kwargs))
    expected, got = Listener(), Listener()
    for block, listener in (plain, expected), (fused, got):
        block(*args, **kwargs | {"context": listener})
    return got.scores[:-1] == expected.scores[:-1] and all(map(agree, got.handed, expected.handed))


def _agree(got: Any, expected: Any) -> bool:
    return agree(*(out[0] if isinstance(out, tuple) else out for out in (got, expected)))
