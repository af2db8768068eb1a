"""From logits to tokens on a CPU, for rows with different sampling parameters.

The vocabulary is never sorted. Truncated rows (top_k, top_p) draw among the likeliest `NUM_CANDIDATES` tokens if those
suffice; the others hash noise for every token, and a flat row with top_p takes the best token within its nucleus.
Kernels compute the noise (noise.py) and the likeliest tokens (likeliest.py); where they do not run, torch does. It
knows rows of logits and their parameters, nothing of slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from math import log
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from worker.engine import rng
from worker.model import cpu
from worker.model.transfer import send

if TYPE_CHECKING:
    from shared.job import Sampling
    from worker.engine.params import Params

NUM_CANDIDATES = 64
BLOCK_TOKENS = 1 << 16      # of noise computed at a time


def draw(logits: Tensor, params: Sequence[Params], keys: Sequence[int]) -> Tensor:
    """A token id for each row, drawn with the noise of the row's key."""
    random = [i for i, p in enumerate(params) if not p.is_greedy]
    if not random:
        return _largest(logits)
    token_ids = torch.empty(len(params), dtype=torch.long)
    greedy = [i for i, p in enumerate(params) if p.is_greedy]
    if greedy:
        token_ids[greedy] = _largest(some(logits, greedy))
    temperatures = torch.tensor([params[i].sampling.temperature for i in random])
    token_ids[random] = _draw_random(some(logits, random), temperatures, [keys[i] for i in random],
                                     [params[i] for i in random])
    return token_ids


def log_totals(logits: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """log Σ exp of the logits, divided by the temperatures if given."""
    if ordering := kernels_for("likeliest", logits):
        return cast(Tensor, ordering.log_totals(logits, temperatures))
    scaled = _scaled(logits, temperatures)
    rows = max(2, len(scaled))                          # torch would sum a single row in parts, one for each thread
    return torch.logsumexp(scaled.expand(rows, -1), dim=-1)[:len(scaled)]


def _draw_random(logits: Tensor, temperatures: Tensor, keys: list[int], params: list[Params]) -> Tensor:
    low, high = rng.split_keys(keys)
    whole = [i for i, p in enumerate(params) if not p.is_truncated]
    wide = [i for i, p in enumerate(params) if p.sampling.top_p < 1 and p.sampling.top_k > NUM_CANDIDATES]
    others = [i for i, p in enumerate(params) if p.is_truncated and i not in wide]
    token_ids = torch.empty(len(params), dtype=torch.long)
    for places, draw_these in ((others, _draw_truncated), (wide, _draw_truncated), (whole, _draw_whole)):
        if places:
            token_ids[places] = draw_these(some(logits, places), temperatures[places], low[places], high[places],
                                           [params[i].sampling for i in places])
    return token_ids


def _largest(logits: Tensor) -> Tensor:
    noise = kernels_for("noise", logits)
    return cast(Tensor, noise.draw(logits, noise.Wishes())[0]) if noise else logits.argmax(dim=-1)


def _draw_whole(logits: Tensor, temperatures: Tensor, low: Tensor, high: Tensor, sampling: list[Sampling]) -> Tensor:
    floors = None
    if any(s.min_p > 0 for s in sampling):
        floors = logits.amax(dim=-1) / temperatures + torch.tensor([log_of(s.min_p) for s in sampling])
    if noise := kernels_for("noise", logits):
        return cast(Tensor, noise.draw(logits, noise.Wishes(temperatures, (low, high), floors=floors))[0])
    scaled = _scaled(logits, temperatures)
    if floors is not None:
        scaled = scaled.masked_fill(scaled < floors[:, None], float("-inf"))
    return torch.cat([noisy.argmax(dim=-1) for noisy in _with_noise(scaled, low, high)])


def _with_noise(logits: Tensor, low: Tensor, high: Tensor) -> Iterator[Tensor]:
    """Yields a few rows at a time, so that they stay in the processor's cache."""
    num_rows = max(1, BLOCK_TOKENS // logits.shape[1])
    parts = zip(logits.split(num_rows), low.split(num_rows), high.split(num_rows), strict=True)
    return (rng.gumbel(lows, highs, _token_ids(logits.shape[1])).add_(part) for part, lows, highs in parts)


def _draw_truncated(logits: Tensor, temperatures: Tensor, low: Tensor, high: Tensor, sampling: list[Sampling]
                    ) -> Tensor:
    token_ids = torch.empty(len(logits), dtype=torch.long)
    log_total = log_totals(logits, temperatures)[:, None]
    pending = list(range(len(logits)))
    # top_p is a share of what top_k keeps, so all of that must be among the candidates
    num_candidates = max([NUM_CANDIDATES, *(s.top_k for s in sampling if s.top_p < 1)])
    while pending:
        num_candidates = min(num_candidates, logits.shape[1])
        here = [sampling[i] for i in pending]
        values, ids = likeliest(some(logits, pending), num_candidates)
        values = _scaled(values, temperatures[pending])
        keep = _kept(values, log_total[pending], here)
        # the cut must lie above the last candidate: tokens as likely as that one may be missing
        is_cut = ~(keep & (values == values[:, -1:])).any(dim=-1) | (num_candidates == logits.shape[1])
        values = _at_least(values, values[:, :1], here).masked_fill(~keep, float("-inf"))
        noise = rng.gumbel(low[pending], high[pending], ids.int())
        token_ids[pending] = ids.gather(1, (values + noise).argmax(dim=-1, keepdim=True))[:, 0]
        pending = [i for i, is_drawn in zip(pending, is_cut.tolist(), strict=True) if not is_drawn]
        wide = [i for i in pending if not sampling[i].top_k]
        if wide:
            token_ids[wide] = _draw_nucleus(_scaled(logits[wide], temperatures[wide]), low[wide], high[wide],
                                            [sampling[i] for i in wide])
        pending = [i for i in pending if sampling[i].top_k]
        num_candidates *= 8
    return token_ids


def _draw_nucleus(logits: Tensor, low: Tensor, high: Tensor, sampling: list[Sampling]) -> Tensor:
    """The first token, in the order of logits + noise, whose likelier tokens together weigh less than top_p.

    This is the argmax within the nucleus, without computing its border: on average at most 1 / top_p tries.
    """
    token_ids = torch.empty(len(logits), dtype=torch.long)
    shares = torch.softmax(logits, dim=-1)
    top_p = torch.tensor([s.top_p for s in sampling], dtype=torch.float64)
    noisy = _at_least(logits, logits.amax(dim=-1, keepdim=True), sampling)
    noisy = torch.cat(list(_with_noise(noisy, low, high)))
    pending = torch.arange(len(logits))
    while len(pending):
        drawn = noisy[pending].argmax(dim=-1, keepdim=True)
        here = logits[pending]
        value = here.gather(1, drawn)
        is_likelier = (here > value) | ((here == value) & (_token_ids(logits.shape[1]) < drawn))
        rows = max(2, len(pending))                     # torch would sum a single row in parts
        mass = (shares[pending].expand(rows, -1) * is_likelier).sum(dim=-1)[:len(pending)]
        is_inside = (mass.double() < top_p[pending]) | ~is_likelier.any(dim=-1)
        token_ids[pending[is_inside]] = drawn[is_inside, 0]
        noisy[pending, drawn[:, 0]] = float("-inf")
        pending = pending[~is_inside]
    return token_ids


def kernels_for(name: Literal["noise", "likeliest", "penalties"], logits: Tensor) -> Any:
    """The kernels of a module beside this one, if they run and the rows suit them; else None."""
    if not cpu.computes(logits.dtype):
        return None
    module = import_module(f"worker.engine.{name}")     # needs llvmlite
    return module if module.fits(logits) else None


def some(x: Tensor, rows: list[int]) -> Tensor:
    """The given rows, which are distinct and in order; no copy if they are all rows."""
    return x if len(rows) == len(x) else x[send(rows, x.device)]


def _scaled(logits: Tensor, temperatures: Tensor | None) -> Tensor:
    return logits.float() if temperatures is None else logits.float() / temperatures[:, None]


def _column(values: list[float], device: torch.device) -> Tensor:
    return send(values, device, torch.float32)[:, None]


def log_of(min_p: float) -> float:
    return log(min_p) if min_p > 0 else float("-inf")


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of each row, descending, equal ones by ascending id."""
    if logits.is_cuda:
        return _likeliest_by_keys(logits, count)
    if (ordering := kernels_for("likeliest", logits)) and (found := ordering.likeliest(logits, count)):
        return cast(tuple[Tensor, Tensor], found)
    values, ids = logits.float().topk(min(count + 1, logits.shape[-1]), dim=-1)
    if bool((values[:, count - 1:count] == values[:, count:]).any()):       # topk takes any of equal ones
        return _likeliest_by_keys(logits.float(), count)
    values, ids = values[:, :count], ids[:, :count]
    if bool((values[:, 1:] == values[:, :-1]).any()):
        ids, order = ids.sort(dim=-1)
        values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
    return values, ids


def _likeliest_by_keys(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sorts distinct integer keys: the upper half has the order of the logits, the lower half encodes the id."""
    bits = (logits + 0.0).view(torch.int32)             # -0.0 becomes 0.0, as the two are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) - torch.arange(logits.shape[-1], device=logits.device)
    ids = (-keys.topk(count, dim=-1).values) & 0xFFFFFFFF
    return logits.gather(1, ids), ids


def _kept(values: Tensor, log_total: Tensor, sampling: list[Sampling]) -> Tensor:
    """Which of the descending `values` are kept by top_k and, among those, by top_p; always the first one."""
    num_candidates, device = values.shape[1], values.device
    top_k = torch.tensor([s.top_k or num_candidates for s in sampling], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in sampling], dtype=torch.float64, device=device)[:, None]
    keep = torch.arange(num_candidates, device=device) < top_k
    if any(s.top_p < 1 for s in sampling):
        weights = torch.exp((values - values[:, :1]).double())
        mass = weights.cumsum(dim=-1)                   # one by one, however many candidates there are
        of_kept = mass.gather(1, top_k.clamp(max=num_candidates) - 1)
        of_all = torch.exp((log_total - values[:, :1]).double())
        has_top_k = torch.tensor([s.top_k > 0 for s in sampling], device=device)[:, None]
        keep &= (mass - weights < top_p * torch.where(has_top_k, of_kept, of_all)) | (top_p >= 1)
        keep[:, 0] = True
    return keep


def _at_least(logits: Tensor, largest: Tensor, sampling: list[Sampling]) -> Tensor:
    """min_p: removes tokens less likely than that share of the likeliest."""
    floors = _column([log_of(s.min_p) for s in sampling], logits.device)
    return logits.masked_fill(logits < largest + floors, float("-inf"))


@cache
def _token_ids(vocab_size: int) -> Tensor:
    return torch.arange(vocab_size, dtype=torch.int32)
