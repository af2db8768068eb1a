"""From a row of logits to a token, for many rows at once, each with parameters of its own.

Order of the stages: logit_bias, penalties, temperature, top_k, top_p, min_p, as in transformers; a stage that no row
needs is skipped. Of tokens equally likely the lower id is kept first. A row's token depends on nothing but that row:
not on its neighbours, nor on where in the batch it lies. It knows slots and ids, nothing of text or schedules.

No vocabulary is sorted. Truncated rows (top_k, top_p) draw among the likeliest `NUM_CANDIDATES` tokens when those are
enough; the others hash noise for every token, and a flat row with top_p takes the best one that is in its nucleus. On a
GPU one kernel draws for all rows (kernels.py), and nothing here waits for it; on a CPU there is one for the noise
(noise.py), one for the likeliest (likeliest.py) and one for penalties (penalties.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from math import log
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.engine import rng
from worker.model import cpu
from worker.model.transfer import Transfer, send

if TYPE_CHECKING:
    from shared.job import Sampling
    from worker.engine.noise import Wishes

MIN_TEMPERATURE = 1e-5      # below: greedy
NUM_CANDIDATES = 64
BLOCK_TOKENS = 1 << 16      # of noise at a time
FORBIDDEN = -1e30           # added to a logit; a float can be divided by MIN_TEMPERATURE then
CPU = torch.device("cpu")

Logprobs = tuple[int, float, tuple[tuple[int, float], ...]]    # token id, its log probability, the likeliest


class Draw(NamedTuple):
    token_id: int
    logprobs: Logprobs | None
    is_valid: bool              # False: the logits were not numbers


@dataclass(slots=True)
class Draws:
    """Of one forward, row by row."""

    num_logprobs: list[int | None]
    transfer: Transfer          # token ids and whether they are valid, [2, rows]; log probabilities of rows that ask

    def read(self) -> list[Draw]:
        (token_ids, is_valid), *of_asked = (tensor.tolist() for tensor in self.transfer.wait())
        asked = iter(zip(*of_asked, strict=True))
        return [Draw(token_id, None if count is None else _logprobs(token_id, count, *next(asked)), valid)
                for token_id, count, valid in zip(token_ids, self.num_logprobs, is_valid, strict=True)]


def _logprobs(token_id: int, count: int, of_drawn: float, ids: list[int], of_likeliest: list[float]) -> Logprobs:
    return token_id, of_drawn, tuple(islice(zip(ids, of_likeliest, strict=True), count))


@dataclass(slots=True)
class Params:
    """Of one choice, as the sampler reads them at every step."""

    sampling: Sampling
    key: int
    stop_token_ids: list[int]       # none of them before min_tokens
    bias: tuple[tuple[int, float], ...]
    is_greedy: bool
    is_truncated: bool
    is_penalized: bool
    is_plain: bool                  # one pass over the logits finds its token: that of the largest logit and noise

    @classmethod
    def of(cls, sampling: Sampling, choice: int, stop_token_ids: frozenset[int]) -> Params:
        bias = tuple(dict(sampling.logit_bias).items())
        is_truncated = sampling.top_p < 1 or sampling.top_k > 0
        is_penalized = (bool(sampling.presence_penalty or sampling.frequency_penalty)
                        or sampling.repetition_penalty != 1)
        return cls(sampling, rng.choice_key(sampling.seed, choice), sorted(stop_token_ids), bias,
                   is_greedy=sampling.temperature < MIN_TEMPERATURE, is_truncated=is_truncated,
                   is_penalized=is_penalized,
                   is_plain=not (is_truncated or is_penalized or bias or sampling.min_p > 0))


class Row(NamedTuple):
    slot: int
    position: int               # of the token to draw, counted from the answer's first
    allowed: npt.NDArray[np.int32] | None = None    # a bit for each token id that may be drawn; None: all


@dataclass(slots=True)
class Sampler:
    num_slots: int
    vocab_size: int
    device: torch.device = CPU
    has_kernel: bool = field(init=False)
    params: list[Params | None] = field(init=False)
    _counts: Tensor | None = field(init=False, default=None)    # [slots, vocab]: how often each token was generated
    _seen: Tensor | None = field(init=False, default=None)      # [slots, vocab]: in the prompt or generated
    _bias: dict[int, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)      # slot → token ids, values
    _copy: Tensor | None = field(init=False, default=None)      # [rows, vocab] in float32, of logits that are adjusted
    _token_ids: Tensor = field(init=False)
    last_token_ids: Tensor = field(init=False)                  # [slots]: what each has drawn last

    def __post_init__(self) -> None:
        self.has_kernel = self.device.type == "cuda"
        self.params = [None] * self.num_slots
        self.last_token_ids = torch.zeros(self.num_slots, dtype=torch.long, device=self.device)
        self._token_ids = torch.arange(self.vocab_size, dtype=torch.int32, device=self.device)

    def join(self, slot: int, params: Params, prompt: Sequence[int], generated: Sequence[int]) -> None:
        self.params[slot] = params
        if params.bias:
            token_ids, values = zip(*params.bias, strict=True)
            self._bias[slot] = send(token_ids, self.device), send(values, self.device, torch.float32)
        if not params.is_penalized:
            return
        if self._counts is None or self._seen is None:
            self._counts = torch.zeros(self.num_slots, self.vocab_size, device=self.device)
            self._seen = torch.zeros(self.num_slots, self.vocab_size, dtype=torch.bool, device=self.device)
        drawn = send(generated, self.device)
        self._counts[slot] = torch.bincount(drawn, minlength=self.vocab_size)
        self._seen[slot] = False
        self._seen[slot, send(prompt, self.device)] = True
        self._seen[slot, drawn] = True

    def leave(self, slot: int) -> None:
        self.params[slot] = None

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> Draws:
        params = [self._params(row.slot) for row in rows]
        drawn = (self._draw_there if self.has_kernel else self._draw_here)(logits, rows, params)
        self._count(rows, params, drawn[0])
        return Draws([p.sampling.num_logprobs for p in params],
                     Transfer(drawn, *self._logprobs(logits, drawn[0], params)))

    def _draw_there(self, logits: Tensor, rows: Sequence[Row], params: Sequence[Params]) -> Tensor:
        """On a GPU, at once: [2, rows]."""
        from worker.engine import kernels  # needs Triton

        low, high = rng.split_keys([rng.row_key(p.key, row.position) for p, row in zip(params, rows, strict=True)])
        wishes = kernels.Wishes(
            low[:, 0].numpy(), high[:, 0].numpy(), [p.sampling.top_k for p in params], [row.slot for row in rows],
            [0 if p.is_greedy else p.sampling.temperature for p in params], [p.sampling.top_p for p in params],
            [_log(p.sampling.min_p) for p in params])
        return kernels.draw(self._adjusted(logits, rows, params), logits,
                            send(wishes.packed(), self.device, torch.int32), self.last_token_ids)

    def _draw_here(self, logits: Tensor, rows: Sequence[Row], params: Sequence[Params]) -> Tensor:
        """[2, rows]"""
        wishes = self._wishes(logits, rows, params)
        token_ids = (self._draw(self._adjusted(logits, rows, params), rows, params) if wishes is None
                     else cast(Tensor, _kernels("noise", logits).draw(logits, wishes)))
        self.last_token_ids[torch.tensor([row.slot for row in rows])] = token_ids
        return torch.stack((token_ids, logits.gather(1, token_ids[:, None])[:, 0].isfinite()))

    def _wishes(self, logits: Tensor, rows: Sequence[Row], params: Sequence[Params]) -> Wishes | None:
        """For one pass over logits as they come; None where some row wants more than that."""
        noise = _kernels("noise", logits)
        is_constrained = any(row.allowed is not None for row in rows)
        if noise is None or (is_constrained and not noise.takes_bits(logits)) or any(
                not p.is_plain or self._is_too_short(row, p)
                for row, p in zip(rows, params, strict=True)):
            return None
        allowed = None
        if is_constrained:
            anything = np.full(-(-self.vocab_size // 32), -1, dtype=np.int32)
            bits = np.concatenate([anything if row.allowed is None else row.allowed for row in rows])
            allowed = torch.from_numpy(bits.reshape(len(rows), -1))
        if all(p.is_greedy for p in params):
            return cast("Wishes", noise.Wishes(allowed=allowed))
        temperatures = torch.tensor([0.0 if p.is_greedy else p.sampling.temperature for p in params])
        keys = rng.split_keys([rng.row_key(p.key, row.position) for p, row in zip(params, rows, strict=True)])
        return cast("Wishes", noise.Wishes(temperatures, keys, allowed))

    def _is_too_short(self, row: Row, params: Params) -> bool:
        """To end: what may follow is more than a wish."""
        return row.position < params.sampling.min_tokens and bool(params.stop_token_ids) and row.allowed is None

    def _params(self, slot: int) -> Params:
        params = self.params[slot]
        assert params is not None, f"slot {slot} samples but never joined"
        return params

    def _adjusted(self, raw: Tensor, rows: Sequence[Row], params: Sequence[Params]) -> Tensor:
        """Bias, penalties and min_tokens: what also moves a greedy row."""
        penalized = [i for i, p in enumerate(params) if p.is_penalized]
        biased = [i for i, p in enumerate(params) if p.bias]
        constrained = [i for i, row in enumerate(rows) if row.allowed is not None]
        too_short = [i for i, p in enumerate(params) if self._is_too_short(rows[i], p)]
        if not (penalized or biased or too_short or constrained):
            return raw
        logits = self._copied(raw) if penalized or biased or too_short or len(constrained) < len(rows) else raw.float()
        for i in biased:
            token_ids, values = self._bias[rows[i].slot]
            logits[i, token_ids] += values
        if penalized:
            self._penalize(logits, penalized, [rows[i].slot for i in penalized])
        for i in too_short:
            logits[i, send(params[i].stop_token_ids, self.device)] = float("-inf")
        if constrained:
            allowed = np.stack([row.allowed for row in rows if row.allowed is not None])
            if len(constrained) == len(rows):
                return self._constrained(logits, allowed)
            places = send(constrained, self.device)
            logits[places] = self._constrained(logits[places], allowed)
        return logits

    def _constrained(self, logits: Tensor, allowed: npt.NDArray[np.int32]) -> Tensor:
        """A sum takes a third of the time of a masked fill: on a CPU what is forbidden falls below whatever is not."""
        if self.device.type != "cpu":
            return logits.masked_fill(self._forbidden(allowed), float("-inf"))
        noise = _kernels("noise", logits)
        if noise and noise.takes_bits(logits):
            return cast(Tensor, noise.forbid(logits, torch.from_numpy(allowed)))
        bits = np.unpackbits((~allowed).view(np.uint8), axis=1, count=self.vocab_size, bitorder="little")
        return torch.add(logits, torch.from_numpy(bits), alpha=FORBIDDEN)

    def _forbidden(self, allowed: npt.NDArray[np.int32]) -> Tensor:
        """A truth value for each token id, of the bits of those that are allowed."""
        words = send(~allowed, self.device, torch.int32)[:, :, None]
        places = torch.arange(32, dtype=torch.int32, device=self.device)
        return (words >> places & 1).bool().flatten(1)[:, :self.vocab_size]

    def _copied(self, raw: Tensor) -> Tensor:
        """In float32, to be changed; on a CPU always in the same place, for a large one is given back and cleared."""
        if self.has_kernel:
            return raw.to(torch.float32, copy=True)
        if self._copy is None or len(self._copy) < len(raw):
            self._copy = torch.empty(max(len(raw), self.num_slots), self.vocab_size)
        return self._copy[:len(raw)].copy_(raw)

    def _penalize(self, logits: Tensor, places: list[int], slots: list[int]) -> None:
        assert self._counts is not None and self._seen is not None
        sampling = [self._params(slot).sampling for slot in slots]
        penalties = send(np.array([[s.repetition_penalty for s in sampling], [s.frequency_penalty for s in sampling],
                                   [s.presence_penalty for s in sampling]]), self.device, torch.float32)
        at, of = send(places, self.device), send(slots, self.device)
        kernels = None if self.has_kernel else _kernels("penalties", logits)
        if kernels:
            kernels.penalize(logits, at, of, self._seen, self._counts, penalties)
            return
        repetition, frequency, presence = penalties[:, :, None]
        penalized, counts = logits[at], self._counts[of]
        scaled = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
        penalized = torch.where(self._seen[of], scaled, penalized) - counts * frequency
        logits[at] = penalized - counts.clamp_(max=1) * presence

    def _draw(self, logits: Tensor, rows: Sequence[Row], params: Sequence[Params]) -> Tensor:
        random = [i for i, p in enumerate(params) if not p.is_greedy]
        if not random:
            return self._largest(logits)
        token_ids = torch.empty(len(rows), dtype=torch.long, device=self.device)
        greedy = [i for i, p in enumerate(params) if p.is_greedy]
        if greedy:
            token_ids[greedy] = self._largest(_rows(logits, greedy))
        temperatures = torch.tensor([params[i].sampling.temperature for i in random])
        keys = [rng.row_key(params[i].key, rows[i].position) for i in random]
        token_ids[random] = self._draw_random(_rows(logits, random), temperatures, keys, [params[i] for i in random])
        return token_ids

    def _log_totals(self, logits: Tensor, temperatures: Tensor | None = None) -> Tensor:
        """Of logits that are divided by temperatures, where those are given."""
        if self.has_kernel:
            from worker.engine import kernels

            return kernels.log_totals(logits)
        if ordering := _kernels("likeliest", logits):
            return cast(Tensor, ordering.log_totals(logits, temperatures))
        return torch.logsumexp(_scaled(logits, temperatures), dim=-1)

    def _draw_random(self, logits: Tensor, temperatures: Tensor, keys: list[int], params: list[Params]) -> Tensor:
        low, high = rng.split_keys(keys)
        truncated = [i for i, p in enumerate(params) if p.is_truncated]
        whole = [i for i, p in enumerate(params) if not p.is_truncated]
        token_ids = torch.empty(len(params), dtype=torch.long)
        for places, draw in ((truncated, self._draw_truncated), (whole, self._draw_whole)):
            if places:
                token_ids[places] = draw(_rows(logits, places), temperatures[places], low[places], high[places],
                                         [params[i].sampling for i in places])
        return token_ids

    def _largest(self, logits: Tensor) -> Tensor:
        noise = _kernels("noise", logits)
        return cast(Tensor, noise.draw(logits, noise.Wishes())) if noise else logits.argmax(dim=-1)

    def _draw_whole(self, logits: Tensor, temperatures: Tensor, low: Tensor, high: Tensor, sampling: list[Sampling]
                    ) -> Tensor:
        floors = None
        if any(s.min_p > 0 for s in sampling):
            floors = logits.amax(dim=-1) / temperatures + torch.tensor([_log(s.min_p) for s in sampling])
        if noise := _kernels("noise", logits):
            return cast(Tensor, noise.draw(logits, noise.Wishes(temperatures, (low, high), floors=floors)))
        scaled = _scaled(logits, temperatures)
        if floors is not None:
            scaled = scaled.masked_fill(scaled < floors[:, None], float("-inf"))
        return torch.cat([noisy.argmax(dim=-1) for noisy in self._with_noise(scaled, low, high)])

    def _with_noise(self, logits: Tensor, low: Tensor, high: Tensor) -> Iterator[Tensor]:
        """Some rows at a time, so that they stay in the processor's cache."""
        num_rows = max(1, BLOCK_TOKENS // self.vocab_size)
        parts = zip(logits.split(num_rows), low.split(num_rows), high.split(num_rows), strict=True)
        return (rng.gumbel(lows, highs, self._token_ids).add_(part) for part, lows, highs in parts)

    def _draw_truncated(self, logits: Tensor, temperatures: Tensor, low: Tensor, high: Tensor, sampling: list[Sampling]
                        ) -> Tensor:
        token_ids = torch.empty(len(logits), dtype=torch.long)
        log_total = self._log_totals(logits, temperatures)[:, None]
        pending = list(range(len(logits)))
        # top_p is a share of what top_k keeps, which must all be there
        num_candidates = max([NUM_CANDIDATES, *(s.top_k for s in sampling if s.top_p < 1)])
        while pending:
            num_candidates = min(num_candidates, self.vocab_size)
            here = [sampling[i] for i in pending]
            values, ids = _likeliest(_rows(logits, pending), num_candidates)
            values = _scaled(values, temperatures[pending])
            keep = _kept(values, log_total[pending], here)
            # the cut must lie above the last candidate: others as likely as that one may be missing
            is_cut = ~(keep & (values == values[:, -1:])).any(dim=-1) | (num_candidates == self.vocab_size)
            values = _at_least(values, values[:, :1], here).masked_fill(~keep, float("-inf"))
            noise = rng.gumbel(low[pending], high[pending], ids.int())
            token_ids[pending] = ids.gather(1, (values + noise).argmax(dim=-1, keepdim=True))[:, 0]
            pending = [i for i, is_drawn in zip(pending, is_cut.tolist(), strict=True) if not is_drawn]
            wide = [i for i in pending if not sampling[i].top_k]
            if wide:
                token_ids[wide] = self._draw_nucleus(_scaled(logits[wide], temperatures[wide]), low[wide], high[wide],
                                                     [sampling[i] for i in wide])
            pending = [i for i in pending if sampling[i].top_k]
            num_candidates *= 8
        return token_ids

    def _draw_nucleus(self, logits: Tensor, low: Tensor, high: Tensor, sampling: list[Sampling]) -> Tensor:
        """The first in the order of logits + noise whose likelier tokens weigh less than top_p.

        That is the argmax within the nucleus, whose borders nobody has to find: 1 / top_p tries on average at most.
        """
        token_ids = torch.empty(len(logits), dtype=torch.long, device=self.device)
        shares = torch.softmax(logits, dim=-1)
        top_p = torch.tensor([s.top_p for s in sampling], dtype=torch.float64, device=self.device)
        noisy = _at_least(logits, logits.amax(dim=-1, keepdim=True), sampling)
        noisy = torch.cat(list(self._with_noise(noisy, low, high)))
        pending = torch.arange(len(logits), device=self.device)
        while len(pending):
            drawn = noisy[pending].argmax(dim=-1, keepdim=True)
            here = logits[pending]
            value = here.gather(1, drawn)
            is_likelier = (here > value) | ((here == value) & (self._token_ids < drawn))
            mass = (shares[pending] * is_likelier).sum(dim=-1)
            is_inside = (mass.double() < top_p[pending]) | ~is_likelier.any(dim=-1)
            token_ids[pending[is_inside]] = drawn[is_inside, 0]
            noisy[pending, drawn[:, 0]] = float("-inf")
            pending = pending[~is_inside]
        return token_ids

    def _count(self, rows: Sequence[Row], params: Sequence[Params], token_ids: Tensor) -> None:
        penalized = [i for i, p in enumerate(params) if p.is_penalized]
        if penalized:
            assert self._counts is not None and self._seen is not None
            slots = send([rows[i].slot for i in penalized], self.device)
            drawn = _rows(token_ids, penalized)
            self._counts[slots, drawn] += 1
            self._seen[slots, drawn] = True

    def _logprobs(self, raw: Tensor, token_ids: Tensor, params: Sequence[Params]) -> tuple[Tensor, ...]:
        """Of the rows that ask: of their drawn token, and the ids and log probabilities of the likeliest."""
        asked = [i for i, p in enumerate(params) if p.sampling.num_logprobs is not None]
        if not asked:
            return ()
        of_asked = _rows(raw, asked)
        of_asked = of_asked.float() if self.has_kernel else of_asked
        of_drawn = of_asked.gather(1, _rows(token_ids, asked)[:, None])[:, 0].float()
        log_total = self._log_totals(of_asked)
        most = max(params[i].sampling.num_logprobs or 0 for i in asked)
        values, ids = _likeliest(of_asked, max(1, most))
        values = values.float()
        return of_drawn - log_total, ids, values - log_total[:, None]


def _kernels(name: Literal["noise", "likeliest", "penalties"], logits: Tensor) -> Any:
    """Those of a module beside this one, where they run and the rows suit them; else none."""
    if not cpu.computes(logits.dtype):
        return None
    module = import_module(f"worker.engine.{name}")     # needs llvmlite
    return module if module.fits(logits) else None


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """Without a copy when they are all: rows are listed once each, in order."""
    return x if len(rows) == len(x) else x[send(rows, x.device)]


def _scaled(logits: Tensor, temperatures: Tensor | None) -> Tensor:
    return logits.float() if temperatures is None else logits.float() / temperatures[:, None]


def _column(values: list[float], device: torch.device) -> Tensor:
    return send(values, device, torch.float32)[:, None]


def _log(min_p: float) -> float:
    return log(min_p) if min_p > 0 else float("-inf")


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row in falling order, the lower id first where they are equal."""
    if logits.is_cuda:
        return _likeliest_by_keys(logits, count)
    if (ordering := _kernels("likeliest", logits)) and (found := ordering.likeliest(logits, count)):
        return cast(tuple[Tensor, Tensor], found)
    values, ids = logits.float().topk(count, dim=-1)
    if bool((values[:, 1:] == values[:, :-1]).any()):
        ids, order = ids.sort(dim=-1)
        values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
    return values, ids


def _likeliest_by_keys(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """By whole numbers of which no two are equal: their upper halves are in the order of the logits, the lower ids."""
    bits = (logits + 0.0).view(torch.int32)             # of negative zero too: the two are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) - torch.arange(logits.shape[-1], device=logits.device)
    ids = (-keys.topk(count, dim=-1).values) & 0xFFFFFFFF
    return logits.gather(1, ids), ids


def _kept(values: Tensor, log_total: Tensor, sampling: list[Sampling]) -> Tensor:
    """Which of the falling `values` top_k and, among those, top_p keep; the first one always."""
    num_candidates, device = values.shape[1], values.device
    top_k = torch.tensor([s.top_k or num_candidates for s in sampling], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in sampling], dtype=torch.float64, device=device)[:, None]
    keep = torch.arange(num_candidates, device=device) < top_k
    if any(s.top_p < 1 for s in sampling):
        of_kept = torch.logsumexp(values.masked_fill(~keep, float("-inf")), dim=-1, keepdim=True)
        has_top_k = torch.tensor([s.top_k > 0 for s in sampling], device=device)[:, None]
        log_total = torch.where(has_top_k, of_kept, log_total)
        mass = torch.exp(values - log_total).double()
        keep &= (mass.cumsum(dim=-1) - mass < top_p) | (top_p >= 1)
        keep[:, 0] = True
    return keep


def _at_least(logits: Tensor, largest: Tensor, sampling: list[Sampling]) -> Tensor:
    """min_p: nothing less likely than that share of the likeliest."""
    floors = _column([_log(s.min_p) for s in sampling], logits.device)
    return logits.masked_fill(logits < largest + floors, float("-inf"))
