"""One job in the making on this worker: the engine's token ids become text and log entries, in order.

It knows text, positions and what was logged before. It knows nothing of Redis or tensors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer

from shared.grammar import Grammars
from shared.job import Delta, Entry, Finish, FinishReason, TokenLogprob, Usage, encode_deltas
from shared.queue import Claimed, Write
from worker.constraint import GrammarConstraint
from worker.engine.engine import Output, Request
from worker.output.text import TextStream


@dataclass(slots=True)
class Choice:
    """One of the n answers, and what it has drawn since the last flush."""

    text: TextStream
    token_ids: list[int] = field(default_factory=list)              # all logged tokens, whichever worker drew them
    finish_reason: FinishReason | None = None
    unflushed: list[Delta] = field(default_factory=list)


class Answer:
    """Rebuilt from the log when another worker has begun it: the same ids give the same state."""

    def __init__(self, claimed: Claimed, tokenizer: Tokenizer, log: Sequence[Entry] = (), weights_id: str = "") -> None:
        """`weights_id`: of the worker."""
        self.job = claimed.job
        self.header = claimed.header
        self.log = [entry for entry in log if entry.position]   # from position 1 on, as Redis has acknowledged it
        self.epoch = claimed.epoch
        self.position = claimed.position
        self.num_tokens = claimed.num_tokens
        self.flushed_s = float("-inf")
        self.is_exact = claimed.is_like                 # equal to what any worker with equal numerics would write
        self.num_cached_tokens = 0                      # prompt tokens found in the cache when the answer began
        self._to_name = "" if claimed.position or weights_id == self.job.weights_id else weights_id
        sampling = self.job.sampling
        self.choices = [Choice(TextStream(tokenizer, sampling.stop, sampling.shown_token_ids, sampling.min_tokens))
                        for _ in range(self.job.n)]
        for delta in (delta for entry in log if entry.kind == "delta" for delta in entry.deltas):
            choice = self.choices[delta.index]
            choice.text.feed(delta.token_ids)
            choice.token_ids += delta.token_ids
            choice.finish_reason = delta.finish_reason
            self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)

    def __repr__(self) -> str:
        return f"<Answer {self.job.id} epoch {self.epoch} position {self.position}, {self.num_tokens} tokens>"

    @property
    def ended(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def request(self, grammars: Grammars) -> Request:
        """The request for the engine: the unfinished choices, from where they are now. Raises InvalidGrammar."""
        finished = frozenset(i for i, choice in enumerate(self.choices) if choice.finish_reason)
        grammar, after = self.job.sampling.grammar, self.job.sampling.grammar_after
        constraints = [GrammarConstraint.of(grammars, grammar, choice.token_ids, after) for choice in self.choices
                       ] if grammar else []
        return Request(self.job.id, self.job.prompt_token_ids, self.job.sampling, self.job.n,
                       tuple(tuple(choice.token_ids) for choice in self.choices), finished, self.job.tenant,
                       tuple(constraints))

    def take(self, output: Output) -> bool:
        """Adds a choice's new tokens. True: a stop string ended it, and the engine must be told."""
        choice = self.choices[output.index]
        if choice.finish_reason:
            return False                                # an engine that runs ahead drew more before it was told
        text = ""
        for num_fed, token_id in enumerate(output.token_ids, 1):
            text += choice.text.feed((token_id,))
            if choice.text.stopped:                     # tokens drawn after it are not part of the answer
                output = replace(output, token_ids=output.token_ids[:num_fed], logprobs=output.logprobs[:num_fed])
                break
        if choice.text.stopped:
            choice.finish_reason = "stop"
        elif output.finish_reason:
            choice.finish_reason = output.finish_reason  # type: ignore[assignment]
            text += choice.text.finish()
            if choice.text.stopped:
                choice.finish_reason = "stop"
        logprobs = tuple(TokenLogprob(*entry) for entry in output.logprobs)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        stop = choice.text.stop if self.job.sampling.tells_stop else ""
        choice.unflushed.append(Delta(output.index, output.token_ids, text, choice.finish_reason, logprobs,
                                      output.num_cached_tokens, self.is_exact, stop, self._to_name))
        return choice.text.stopped and not output.finish_reason

    def is_due(self, now_s: float, flush_s: float) -> bool:
        """Whether to log the tokens drawn so far. A delayed flush never holds back a choice's first or last tokens."""
        is_late = now_s - self.flushed_s >= flush_s
        return any(choice.unflushed and (is_late or choice.finish_reason or not choice.token_ids)
                   for choice in self.choices)

    def flush(self, now_s: float) -> list[Write]:
        """The entries for the tokens drawn since the last flush, and the terminal if the answer is complete."""
        deltas = [_merge(choice.unflushed) for choice in self.choices if choice.unflushed]
        for choice in self.choices:
            choice.token_ids += [token_id for delta in choice.unflushed for token_id in delta.token_ids]
            choice.unflushed.clear()
        self.flushed_s = now_s
        self.num_tokens += sum(len(delta.token_ids) for delta in deltas)
        self._to_name = "" if deltas else self._to_name
        writes = [self._write("delta", encode_deltas(deltas))] if deltas else []
        return [*writes, self._terminal()] if self.ended else writes

    def _terminal(self) -> Write:
        usage = Usage(len(self.job.prompt_token_ids), self.num_tokens, self.num_cached_tokens)
        return self._write("end", Finish(usage, ended_s=int(time.time())).encode())

    def _write(self, kind: str, data: str) -> Write:
        self.position += 1
        return Write(self.job.id, self.epoch, self.position, self.num_tokens, kind, data)  # type: ignore[arg-type]


def _merge(deltas: list[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return Delta(deltas[0].index, tuple(token_id for delta in deltas for token_id in delta.token_ids),
                 "".join(delta.text for delta in deltas), deltas[-1].finish_reason,
                 tuple(entry for delta in deltas for entry in delta.logprobs),
                 deltas[0].num_cached_tokens, deltas[0].is_exact, deltas[-1].stop, deltas[0].weights_id)
