"""What travels between the API and the workers: a job, the entries of its log, and its end.

Every class here is frozen and carries its own codec. Nothing here knows Redis, HTTP or tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

SCHEMA_VERSION = 1

_compact = json.JSONEncoder(separators=(",", ":")).encode       # json.dumps would create one at every step of an answer

Language = Literal["chat", "completions", "responses", "messages"]
"""The API in which a request was made and is answered (api/wire)."""

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

MAX_SEED = 2**64 - 1
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn, for every choice of one request.

    The stages run in the order of transformers: logit_bias, penalties, temperature, top_k, top_p, min_p. Noise is a
    pure function of (seed, choice, position, token id): a seed gives the same answer in any batch.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0                            # 0: greedy
    top_p: float = 1.0                                  # 1: off
    top_k: int = 0                                      # 0: off
    min_p: float = 0.0                                  # 0: off
    presence_penalty: float = 0.0                       # on tokens generated so far
    frequency_penalty: float = 0.0                      # on tokens generated so far
    repetition_penalty: float = 1.0                     # on tokens in the prompt or generated so far
    logit_bias: tuple[tuple[int, float], ...] = ()      # (token id, added to its logit)
    num_logprobs: int | None = None                     # None: none; k: for the drawn token and the k likeliest
    min_tokens: int = 0                                 # until then no end-of-sequence, stop token or stop string
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()                          # texts; matched by worker/output, not by the engine
    stop_token_ids: tuple[int, ...] = ()
    speculative: bool = True                            # tokens may be drafted; the answer is the same
    tells_stop: bool = False                            # the log records which stop string was found
    grammar: str = ""                                   # constraint on the answer (shared/grammar.py); empty: none
    grammar_after: int | None = None                    # the grammar begins behind this token; until then no end
    shown_token_ids: tuple[int, ...] = ()               # special tokens whose text is shown: the markers of a dialect


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probabilities at one drawn token, from the unprocessed logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()             # (token id, log probability), likeliest first


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice gained since its last delta: the unit of the answer's log."""

    index: int                                          # which of the n choices
    token_ids: tuple[int, ...]                          # every drawn token: enough to continue on another worker
    text: str                                           # to be shown: no partial characters, no partial stop strings
    finish_reason: FinishReason | None = None           # set on the last delta of a choice
    logprobs: tuple[TokenLogprob, ...] = ()             # one for each token id, when they were asked for
    num_cached_tokens: int = 0                          # prompt tokens found in the cache; on a choice's first delta
    is_exact: bool = True                               # False: from here on valid, but perhaps another text
    stop: str = ""                                      # the stop string that ended the choice; the text excludes it
    weights_id: str = ""                                # in the first entry: of its worker, if the job names others


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request is charged. The prompt counts once; completion tokens sum over the choices."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """The terminal entry of a log: exactly one ends every accepted job. lua/prelude.lua writes it too."""

    usage: Usage
    error: str | None = None                            # a code of shared/errors.py; None: the answer is complete
    ended_s: int = field(default=0, compare=False)      # Unix time; 0 in logs of earlier releases

    def encode(self) -> str:
        return _finish_adapter.dump_json(self).decode()

    @classmethod
    def decode(cls, raw: str) -> Finish:
        return _finish_adapter.validate_json(raw)


@dataclass(frozen=True, slots=True)
class Header:
    """The first entry of a log: what stays the same for the whole answer, whoever computes or relays it."""

    model: str                                          # as the client named it
    created_s: int
    fingerprint: str
    seed: int
    n: int
    num_prompt_tokens: int
    tokenizer_id: str = ""                              # of the token ids in the deltas
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    reasoning: Literal["", "open", "maybe"] = ""        # whether it begins with reasoning (api/wire/reasoning.py)
    think_end_id: int | None = None                     # the token that ends reasoning, if it is a single token
    tool_dialect: str = ""                              # how the model writes calls (api/wire/dialects); empty: none
    typed_arguments: tuple[str, ...] = ()               # tool arguments that are not strings, if a dialect must know
    has_named_tool: bool = False                        # tool_choice named a function: finish_reason stays stop
    has_functions: bool = False                         # calls are answered in OpenAI's older form, function_call
    language: Language = "chat"
    fold_version: int = 1                               # of api/wire: how entries are folded into events

    def encode(self) -> str:
        return _header_adapter.dump_json(self).decode()

    @classmethod
    def decode(cls, raw: str) -> Header:
        return _header_adapter.validate_json(raw)


Kind = Literal["header", "fence", "delta", "end"]


class Entry(NamedTuple):
    """One entry of an answer's log, as the log, a push and a publish carry it."""

    epoch: int
    position: int                                       # header 0, then deltas and the terminal: no gaps, no repeats
    num_tokens: int                                     # drawn by all choices up to here
    kind: Kind
    data: str                                           # JSON text, unchanged; its content depends on the kind

    @property
    def id(self) -> str:
        return f"{self.epoch}-{self.position}" if self.position else "0-1"

    @property
    def line(self) -> str:
        """Its line in a push, to be preceded by the job's id."""
        return f"{self.epoch} {self.position} {self.num_tokens} {self.kind} {self.data}"

    @classmethod
    def parse(cls, line: str) -> Entry:
        epoch, position, num_tokens, kind, data = line.split(" ", 4)
        return cls(int(epoch), int(position), int(num_tokens), kind, data)  # type: ignore[arg-type]

    def says_the_same(self, other: Entry) -> bool:
        """Equal but for the epoch: the entries of a restored log have new ids."""
        return (self.position, self.num_tokens, self.kind, self.data) == (
            other.position, other.num_tokens, other.kind, other.data)

    @property
    def deltas(self) -> list[Delta]:
        return [_delta(*row) for row in json.loads(self.data)]

    @property
    def finish(self) -> Finish:
        return Finish.decode(self.data)

    @property
    def header(self) -> Header:
        return Header.decode(self.data)


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted request, as the API queues it: token ids, the resolved seed, every decision made."""

    id: str                                             # the completion id: shard and 128 random bits
    tenant: str                                         # a hash of the key, never the key
    pod: str                                            # the first pod that relays it; empty: the job needs no reader
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    tokenizer_id: str                                   # of the card that rendered the prompt: must equal the worker's
    weights_id: str                                     # of that card: only equal weights continue a started answer
    n: int = 1
    prefix: tuple[str, ...] = ()                        # names of some of the prompt's prefixes (shared/prefix.py)
    priority: int = 0                                   # 0: interactive; higher values wait behind lower ones
    created_s: int = 0
    deadline_s: float = 3600.0                          # maximum age since acceptance, in Redis time
    retain_s: float | None = None                       # how long its log is kept after its end; None: as configured
    version: int = SCHEMA_VERSION

    def encode(self) -> bytes:
        return _job_adapter.dump_json(self)

    @classmethod
    def decode(cls, raw: bytes | str) -> Job:
        """Raises ValueError when the bytes are not a job of this schema version."""
        try:
            job = _job_adapter.validate_json(raw)
        except ValidationError as error:
            raise ValueError(f"not a job: {error.error_count()} errors") from None
        if job.version != SCHEMA_VERSION:
            raise ValueError(f"a job of schema version {job.version}, not {SCHEMA_VERSION}")
        return job


_job_adapter = TypeAdapter(Job)
_finish_adapter = TypeAdapter(Finish)
_header_adapter = TypeAdapter(Header)


def encode_deltas(deltas: list[Delta]) -> str:
    """Deltas as compact JSON rows: fields in order, trailing empty ones left out."""
    return _compact([_row(delta) for delta in deltas])


def _row(delta: Delta) -> list[Any]:
    logprobs = [[entry.token_id, entry.logprob, entry.top] for entry in delta.logprobs]
    row: list[Any] = [delta.index, delta.token_ids, delta.text, delta.finish_reason, logprobs,
                      delta.num_cached_tokens, int(not delta.is_exact), delta.stop, delta.weights_id]
    while len(row) > 3 and not row[-1]:
        row.pop()
    return row


def _delta(index: int, token_ids: list[int], text: str, reason: FinishReason | None = None,
           logprobs: list[Any] | None = None, num_cached_tokens: int = 0, is_inexact: int = 0, stop: str = "",
           weights_id: str = "") -> Delta:
    entries = tuple(TokenLogprob(token_id, logprob, tuple((i, p) for i, p in top))
                    for token_id, logprob, top in logprobs or ())
    return Delta(index, tuple(token_ids), text, reason, entries, num_cached_tokens, not is_inexact, stop, weights_id)
