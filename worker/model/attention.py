"""Attention for unmodified model classes of transformers, computed where keys and values lie.

It is registered once under `NAME`; what a forward needs to know is passed as the keyword argument `context`, or by
`passing` to families whose layers do not pass keyword arguments on. Contexts are in slots.py and paged.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "baton"
PAGE_LEN = 256              # tokens of a slot: smaller pages cost more calls, larger ones more padding
NOBODY = -1                 # position of a padding row in a forward of fixed shape
TILE_LEN = 64               # rows of a prompt that attend together if keys are in pages


class KVShape(NamedTuple):
    num_kv_heads: int
    head_dim: int
    num_query_heads: int


class KVLayer(NamedTuple):
    """Pages of slots, or of a pool.

    Our kernels expect the keys of 16 tokens of a slot side by side, one in each lane of a vector, as [num_pages,
    num_slots, num_kv_heads, PAGE_LEN / 16, head_dim / n, 16, n]: n numbers fill a lane.
    """

    keys: Tensor
    values: Tensor

    @property
    def is_in_lanes(self) -> bool:
        return self.keys.dim() > self.values.dim()


class Scores(NamedTuple):
    """How one layer turns query-key products into weights."""

    scaling: float
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None        # one logit per query head, beside those of the keys


class Context(Protocol):
    """What one forward passes to every attention layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Takes [1, heads, rows, head_dim] each; returns [1, rows, query heads, head_dim]."""


_passed: ContextVar[Context | None] = ContextVar("context", default=None)


@contextmanager
def passing(context: Context) -> Iterator[None]:
    token = _passed.set(context)
    try:
        yield
    finally:
        _passed.reset(token)


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None = None, *,
              context: Context | None = None, scaling: float | None = None, sliding_window: int | None = None,
              softcap: float | None = None, s_aux: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
    context = context or _passed.get()
    if context is None:
        raise ValueError("it attends outside a forward")
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    return context.attend(module.layer_idx, query, key, value, scores), None


AttentionInterface.register(NAME, attention)


@dataclass(slots=True)
class Recorder:
    """Computes nothing; records the shape of every layer and its scores."""

    shapes: dict[int, KVShape] = field(default_factory=dict)
    scores: dict[int, Scores] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        if layer in self.shapes or key.shape != value.shape:
            raise ValueError("layers share their keys, or keys and values differ in shape")
        self.shapes[layer] = KVShape(key.shape[1], key.shape[3], query.shape[1])
        self.scores[layer] = scores
        return torch.zeros_like(query).transpose(1, 2)
