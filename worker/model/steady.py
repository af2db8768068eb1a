"""Elementwise functions of torch that round a number by its place: vectors of numbers in one way, what is left over, or
does not lie side by side, in another.

Activations are computed so that every number is part of a vector; a model that calls such functions otherwise is found
out. It knows functions and shapes. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from worker.model.calls import CallListener

UNIT = 64                   # numbers: twice the longest vector
GRAIN = 1 << 15             # numbers: more are divided among threads, anywhere (TensorIterator)
BY_PLACE = {torch.float32: {"sigmoid", "softplus", "silu", "gelu", "mish", "elu", "exp2", "log_sigmoid_forward"},
            torch.bfloat16: {"gelu", "rsqrt"}}          # others differ by less than is kept
ACTIVATIONS = tuple({each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()})


class Seen(NamedTuple):
    name: str
    num_numbers: int
    is_dense: bool
    num_threads: int


class Watch(CallListener):
    """Records the calls of such functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []

    def hear(self, name: str, args: Sequence[Any]) -> None:
        name = name.removesuffix("_")
        if args and isinstance(args[0], Tensor) and name in BY_PLACE.get(args[0].dtype, ()):
            self.seen.append(Seen(name, args[0].numel(), args[0].is_contiguous(), torch.get_num_threads()))


def rounds_by_place(few: list[Seen], more: list[Seen], num_more: int, most_rows: int) -> bool:
    """Whether bits depend on where a row is. What was seen in a forward of `num_more` rows, and in one of one row less,
    tells how many numbers each call takes of a row."""
    return len(few) != len(more) or any(
        one.num_numbers != other.num_numbers and not (
            all(each.is_dense and each.num_numbers % UNIT == 0 for each in (one, other))
            and (other.num_threads == 1 or other.num_numbers * most_rows <= GRAIN * num_more))
        for one, other in zip(few, more, strict=True))


class Steady(nn.Module):
    """An activation of which every number is part of a vector, on one thread."""

    def __init__(self, activation: nn.Module):
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        numbers = nn.functional.pad(x.reshape(-1), (0, -x.numel() % UNIT))
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            out: Tensor = self.activation(numbers)[:x.numel()]
        finally:
            torch.set_num_threads(num_threads)
        return out.view(x.shape)


def steady_activations(module: nn.Module, dtype: torch.dtype) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ACTIVATIONS):
                with Watch() as watch:
                    child(torch.zeros(UNIT, dtype=dtype))
                if watch.seen:
                    setattr(parent, name, Steady(child))
