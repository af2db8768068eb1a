"""Attention of rows over pages of slots, computed by torch, where our own kernels do not run.

Of a decode forward each page is a product of its own, of one shape, [num_kv_heads, group, head_dim] against a whole
page. It knows slots and tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from worker.model.attention import PAGE_LEN, Scores

MAX_SPREAD = 2              # slots read in place, per slot needed: a copy reads and writes, and is read again


class Reach(NamedTuple):
    """The rows with tokens in one page, and how their slots are read there: each page is one product."""

    rows: Tensor | None         # None: all
    slots: slice | Tensor       # in place, or copied together
    places: Tensor | None       # of the rows, in a slice that contains other slots too

    def multiply(self, left: Tensor, page: Tensor) -> Tensor:
        """The product of the rows here: left of [rows, …, n] by a page of [slots, …, n, m], to [rows, …, m]."""
        right = page[self.slots]
        if self.places is None:
            return torch.matmul(left, right)
        spread = left.new_zeros(len(right), *left.shape[1:]).index_copy_(0, self.places, left)
        return torch.matmul(spread, right)[self.places]


def reaches(slots: Sequence[int], num_tokens: Sequence[int]) -> list[Reach]:
    """One for each page up to the longest row's end."""
    found = []
    for start in range(0, max(num_tokens), PAGE_LEN):
        rows = [row for row, length in enumerate(num_tokens) if length > start]
        found.append(Reach(None if len(rows) == len(slots) else torch.tensor(rows),
                           *_reading([slots[row] for row in rows])))
    return found


def _reading(slots: Sequence[int]) -> tuple[slice | Tensor, Tensor | None]:
    """Neighbouring slots are read in place, with those between them; scattered or repeated slots are copied."""
    first, span = slots[0], slots[-1] - slots[0] + 1
    if span > MAX_SPREAD * len(slots) or any(after <= before for before, after in pairwise(slots)):
        return torch.tensor(slots), None
    places = None if span == len(slots) else torch.tensor(slots) - first
    return slice(first, first + span), places


def causal_mask(positions: Tensor, kv_len: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """A float mask of [rows, kv_len], in a type that the kernels take without conversion."""
    ages = positions[:, None] - torch.arange(kv_len, device=positions.device)
    hidden = ages < 0 if window is None else (ages < 0) | (ages >= window)
    return torch.zeros(ages.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))


def weigh_pages(query: Tensor, keys: Tensor, values: Tensor, reaches: Sequence[Reach], mask: Tensor, scores: Scores
                ) -> Tensor:
    """Attention of queries [rows, num_kv_heads, group, head_dim] over pages [slots, num_kv_heads, PAGE_LEN, head_dim].

    The fused kernel takes one small product at a time; batched ones are 2 to 6 times faster.
    """
    weights = _weights(_page_logits(query, keys, reaches), mask, scores)
    if len(reaches) == 1:
        return reaches[0].multiply(weights, values[0])
    out: Tensor | None = None
    for reach, part, page in zip(reaches, weights.split(PAGE_LEN, dim=-1), values, strict=False):
        product = reach.multiply((part if reach.rows is None else part[reach.rows]).contiguous(), page).float()
        if out is None:                                 # the first page has every row
            out = product
        elif reach.rows is None:
            out += product
        else:
            out.index_add_(0, reach.rows, product)
    assert out is not None
    return out.to(query.dtype)


def _page_logits(query: Tensor, keys: Tensor, reaches: Sequence[Reach]) -> Tensor:
    """[rows, num_kv_heads, group, PAGE_LEN for each page]; the mask hides what a row does not reach."""
    if len(reaches) == 1:
        return reaches[0].multiply(query, keys[0].transpose(2, 3))
    logits = query.new_zeros(*query.shape[:-1], len(reaches) * PAGE_LEN)
    for reach, part, page in zip(reaches, logits.split(PAGE_LEN, dim=-1), keys, strict=False):
        if reach.rows is None:
            part.copy_(reach.multiply(query, page.transpose(2, 3)))
        else:
            part.index_copy_(0, reach.rows, reach.multiply(query[reach.rows], page.transpose(2, 3)))
    return logits


def weigh_chunk(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Many queries per key: [1, num_kv_heads, queries, head_dim] over [1, num_kv_heads, kv_len, head_dim]."""
    if scores.softcap is None and scores.sinks is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scores.scaling)
    return torch.matmul(_weights(torch.matmul(query, keys.transpose(2, 3)), mask, scores), values)


def _weights(logits: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    dtype, num_keys = logits.dtype, logits.shape[-1]
    logits = logits.float().mul_(scores.scaling)
    if scores.softcap is not None:
        logits = logits.div_(scores.softcap).tanh_().mul_(scores.softcap)
    logits += mask
    if scores.sinks is not None:
        num_kv_heads, num_queries = logits.shape[1:3]
        sinks = scores.sinks.float().view(1, num_kv_heads, -1, 1)
        sinks = sinks.repeat_interleave(num_queries // sinks.shape[2], dim=2)
        logits = torch.cat([logits, sinks.expand(len(logits), -1, -1, -1)], dim=-1)
    return torch.softmax(logits, dim=-1)[..., :num_keys].to(dtype)
