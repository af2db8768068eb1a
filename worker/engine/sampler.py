"""From a row of logits to a token, for many rows at once, each with parameters of its own.

Order of the stages: logit_bias, penalties, temperature, top_k, top_p, min_p, as in transformers; a stage that no row
needs is skipped. Of equally likely tokens the lower id is kept first. A row's token depends on that row only: not on
its neighbours, nor on its place in the batch. It knows slots and ids, nothing of text or schedules.

On a GPU one kernel draws for all rows (kernels.py), without synchronisation. On a CPU one pass over the logits suffices
for most rows (noise.py); the others are drawn in drawing.py, penalties are in penalties.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.engine import rng
from worker.engine.drawing import draw, kernels_for, likeliest, log_of, log_totals, some
from worker.engine.params import Params
from worker.model.transfer import Transfer, send

if TYPE_CHECKING:
    from worker.engine.noise import RunnersUp, Wishes

FORBIDDEN = -1e30           # added to a logit; a float can be divided by MIN_TEMPERATURE then
ANYTHING = -1               # 32 bits: any of so many tokens
CPU = torch.device("cpu")

Logprobs = tuple[int, float, tuple[tuple[int, float], ...]]    # token id, its log probability, the likeliest


class Draw(NamedTuple):
    token_id: int
    logprobs: Logprobs | None
    is_valid: bool              # False: the logits were NaN


@dataclass(slots=True)
class Draws:
    """The draws of one forward, row by row."""

    num_logprobs: list[int | None]
    transfer: Transfer          # token ids and whether they are valid, [2, rows]; log probabilities of rows that ask
    runners_up: RunnersUp | None = None

    def read(self) -> list[Draw]:
        (token_ids, is_valid), *of_asked = (tensor.tolist() for tensor in self.transfer.wait())
        asked = iter(zip(*of_asked, strict=True))
        return [Draw(token_id, None if count is None else _logprobs(token_id, count, *next(asked)), valid)
                for token_id, count, valid in zip(token_ids, self.num_logprobs, is_valid, strict=True)]

    def next_of(self, row: int) -> Iterator[int]:
        """The tokens that would be drawn if the earlier ones were excluded; empty where that is unknown."""
        return iter(()) if self.runners_up is None or self.num_logprobs[row] is not None else self.runners_up.of(row)


def _logprobs(token_id: int, count: int, of_drawn: float, ids: list[int], of_likeliest: list[float]) -> Logprobs:
    return token_id, of_drawn, tuple(islice(zip(ids, of_likeliest, strict=True), count))


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
    _allowed: npt.NDArray[np.int32] | None = field(init=False, default=None)    # [rows, words]: a bit per token id
    last_token_ids: Tensor = field(init=False)                  # [slots]: what each has drawn last

    def __post_init__(self) -> None:
        self.has_kernel = self.device.type == "cuda"
        self.params = [None] * self.num_slots
        self.last_token_ids = torch.zeros(self.num_slots, dtype=torch.long, device=self.device)

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

    def sample(self, logits: Tensor, rows: Sequence[Row], *, wants_runners_up: bool = False) -> Draws:
        """Runners-up are known for rows drawn by the one-pass kernel only."""
        params, runners_up = [self._params(row.slot) for row in rows], None
        if self.has_kernel:
            drawn = self._draw_there(logits, rows, params)
        else:
            drawn, runners_up = self._draw_here(logits, rows, params, wants_runners_up)
        self._count(rows, params, drawn[0])
        return Draws([p.sampling.num_logprobs for p in params],
                     Transfer(drawn, *self._logprobs(logits, drawn[0], params)), runners_up)

    def _draw_there(self, logits: Tensor, rows: Sequence[Row], params: Sequence[Params]) -> Tensor:
        """On a GPU, all rows at once: [2, rows]."""
        from worker.engine import kernels  # needs Triton

        low, high = rng.split_keys(_keys(rows, params))
        wishes = kernels.Wishes(
            low[:, 0].numpy(), high[:, 0].numpy(), [min(p.sampling.top_k, self.vocab_size) for p in params],
            [row.slot for row in rows], [0 if p.is_greedy else p.sampling.temperature for p in params],
            [p.sampling.top_p for p in params], [log_of(p.sampling.min_p) for p in params])
        return kernels.draw(self._adjusted(logits, rows, params), logits,
                            send(wishes.packed(), self.device, torch.int32), self.last_token_ids)

    def _draw_here(self, logits: Tensor, rows: Sequence[Row], params: Sequence[Params], wants_runners_up: bool
                   ) -> tuple[Tensor, RunnersUp | None]:
        """On a CPU: [2, rows], and the runners-up."""
        wishes, runners_up = self._wishes(logits, rows, params), None
        if wishes is None:
            token_ids = draw(self._adjusted(logits, rows, params), params, _keys(rows, params))
            drawn = torch.stack((token_ids, logits.gather(1, token_ids[:, None])[:, 0].isfinite()))
        else:
            noise = kernels_for("noise", logits)
            runners_up = noise.RunnersUp.empty(len(rows)) if wants_runners_up else None
            drawn = cast(Tensor, noise.draw(logits, wishes, runners_up))
        self.last_token_ids.numpy()[[row.slot for row in rows]] = drawn[0].numpy()
        return drawn, runners_up

    def _wishes(self, logits: Tensor, rows: Sequence[Row], params: Sequence[Params]) -> Wishes | None:
        """Arguments of the one-pass kernel; None if a row needs more than one pass."""
        noise = kernels_for("noise", logits)
        is_constrained = any(row.allowed is not None for row in rows)
        if noise is None or (is_constrained and not noise.takes_bits(logits)) or any(
                not p.is_plain or self._is_too_short(row, p)
                for row, p in zip(rows, params, strict=True)):
            return None
        allowed = self._bits(rows) if is_constrained else None
        if all(p.is_greedy for p in params):
            return cast("Wishes", noise.Wishes(allowed=allowed))
        temperatures = torch.tensor([0.0 if p.is_greedy else p.sampling.temperature for p in params])
        return cast("Wishes", noise.Wishes(temperatures, rng.split_keys(_keys(rows, params)), allowed))

    def _bits(self, rows: Sequence[Row]) -> Tensor:
        """The allowed tokens of each row, in one fixed buffer, since the system zeroes a new one."""
        if self._allowed is None or len(self._allowed) < len(rows):
            self._allowed = np.empty((len(rows), -(-self.vocab_size // 32)), dtype=np.int32)
        for bits, row in zip(self._allowed, rows, strict=False):
            bits[:] = ANYTHING if row.allowed is None else row.allowed
        return torch.from_numpy(self._allowed[:len(rows)])

    def _is_too_short(self, row: Row, params: Params) -> bool:
        """Whether min_tokens forbids an end; for constrained rows the mask does that."""
        return row.position < params.sampling.min_tokens and bool(params.stop_token_ids) and row.allowed is None

    def _params(self, slot: int) -> Params:
        params = self.params[slot]
        assert params is not None, f"slot {slot} samples but never joined"
        return params

    def _adjusted(self, raw: Tensor, rows: Sequence[Row], params: Sequence[Params]) -> Tensor:
        """Applies bias, penalties and min_tokens, which affect greedy rows too."""
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
        """Puts forbidden tokens below all others; on a CPU by a sum, in a third of the time of a masked fill."""
        if self.device.type != "cpu":
            return logits.masked_fill(self._forbidden(allowed), float("-inf"))
        noise = kernels_for("noise", logits)
        if noise and noise.takes_bits(logits):
            return cast(Tensor, noise.forbid(logits, torch.from_numpy(allowed)))
        bits = np.unpackbits((~allowed).view(np.uint8), axis=1, count=self.vocab_size, bitorder="little")
        return torch.add(logits, torch.from_numpy(bits), alpha=FORBIDDEN)

    def _forbidden(self, allowed: npt.NDArray[np.int32]) -> Tensor:
        """One boolean per token id, from the bits of the allowed ones."""
        words = send(~allowed, self.device, torch.int32)[:, :, None]
        places = torch.arange(32, dtype=torch.int32, device=self.device)
        return (words >> places & 1).bool().flatten(1)[:, :self.vocab_size]

    def _copied(self, raw: Tensor) -> Tensor:
        """A float32 copy to be changed; on a CPU in one fixed buffer, since the system zeroes a new one."""
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
        kernels = None if self.has_kernel else kernels_for("penalties", logits)
        if kernels:
            kernels.penalize(logits, at, of, self._seen, self._counts, penalties)
            return
        repetition, frequency, presence = penalties[:, :, None]
        penalized, counts = logits[at], self._counts[of]
        scaled = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
        penalized = torch.where(self._seen[of], scaled, penalized) - counts * frequency
        logits[at] = penalized - counts.clamp_(max=1) * presence

    def _count(self, rows: Sequence[Row], params: Sequence[Params], token_ids: Tensor) -> None:
        penalized = [i for i, p in enumerate(params) if p.is_penalized]
        if penalized:
            assert self._counts is not None and self._seen is not None
            slots = send([rows[i].slot for i in penalized], self.device)
            drawn = some(token_ids, penalized)
            self._counts[slots, drawn] += 1
            self._seen[slots, drawn] = True

    def _logprobs(self, raw: Tensor, token_ids: Tensor, params: Sequence[Params]) -> tuple[Tensor, ...]:
        """For rows that ask: of the drawn token, and the ids and log probabilities of the likeliest tokens."""
        asked = [i for i, p in enumerate(params) if p.sampling.num_logprobs is not None]
        if not asked:
            return ()
        of_asked = some(raw, asked)
        of_asked = of_asked.float() if self.has_kernel else of_asked
        of_drawn = of_asked.gather(1, some(token_ids, asked)[:, None])[:, 0].float()
        log_total = self._log_totals(of_asked)
        most = max(params[i].sampling.num_logprobs or 0 for i in asked)
        values, ids = likeliest(of_asked, max(1, most))
        values = values.float()
        return of_drawn - log_total, ids, values - log_total[:, None]

    def _log_totals(self, logits: Tensor) -> Tensor:
        if not self.has_kernel:
            return log_totals(logits)
        from worker.engine import kernels

        return kernels.log_totals(logits)


def _keys(rows: Sequence[Row], params: Sequence[Params]) -> list[int]:
    return [rng.row_key(p.key, row.position) for p, row in zip(params, rows, strict=True)]
