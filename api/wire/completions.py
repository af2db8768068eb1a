"""`/v1/completions`: OpenAI's older API, which continues a text. The request, and its answers.

A request may have several prompts. Each is a job and a log of its own; together they are one answer, in which the
choices of the second prompt follow those of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quote
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from api.wire import sampled
from api.wire.body import names_of, read_object, refuse_wishes, validate
from api.wire.fold import DONE, EventFold, Whole, WholeFold, dump, head, usage_body
from api.wire.request import NAMES
from api.wire.sampled import MAX_CHOICES, Count, Sampled, TokenId
from shared.errors import InvalidValue, UnsupportedParameter
from shared.job import Delta, Entry, Header, Usage

DEFAULT_MAX_TOKENS = 16                                 # OpenAI's default for this address
MAX_PROMPT_TOKENS = 1 << 20
REFUSED = (*sampled.REFUSED, "best_of", "echo", "logprobs", "suffix")

Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
Prompt = str | list[int]


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: str | list[str] | Tokens | list[Tokens] = Field(
        description="a text, token ids, or several of either; special tokens in a text are meant")
    add_special_tokens: bool | None = Field(None, description="those that the tokenizer puts around a text; else true")
    max_tokens: Count | None = Field(None, ge=1, description=f"most tokens of an answer; else {DEFAULT_MAX_TOKENS}")
    best_of: int | None = Field(None, description="refused, but for n")
    echo: bool | None = Field(None, description="refused")
    logprobs: int | None = Field(None, description="refused")
    suffix: str | None = Field(None, description="refused")

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt_is_one_of_four(cls, prompt: Any) -> Any:
        # Checked as a whole, so that a wrong prompt gives one error and not four.
        if _is_tokens(prompt) or isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and prompt and (all(isinstance(each, str) for each in prompt)
                                                    or all(map(_is_tokens, prompt))):
            return prompt
        raise ValueError("a prompt is a text, token ids, or a list of texts or of token ids")

    @model_validator(mode="after")
    def _nothing_that_is_not_done(self) -> CompletionRequest:
        if self.logprobs == 0:
            raise UnsupportedParameter("This server does not do what logprobs asks for.", param="logprobs")
        refuse_wishes(self, (param for param in REFUSED if param != "best_of" or self.best_of != (self.n or 1)))
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise InvalidValue(f"A request has at most {MAX_CHOICES} choices, those of all prompts together.",
                               param="prompt")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    def each(self) -> list[CompletionRequest]:
        """One request per prompt."""
        return [self.model_copy(update={"prompt": prompt}) for prompt in self.prompts]

    @property
    def answer_limit(self) -> int:
        return self.max_tokens or DEFAULT_MAX_TOKENS


def _is_tokens(prompt: Any) -> bool:
    return (isinstance(prompt, list) and 0 < len(prompt) <= MAX_PROMPT_TOKENS
            and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in prompt))


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises BadRequest, with what is wrong."""
    return validate(CompletionRequest, read_object(body), NAMES | names_of(CompletionRequest))


class TextChunkFold(EventFold):
    """The events of one log."""

    def __init__(self, completion_id: str, header: Header, after: int = 0, first_index: int = 0) -> None:
        super().__init__(header, after)
        self.usage = Usage(header.num_prompt_tokens, 0)
        self._first_index = first_index
        self._num_cached_tokens = 0
        self._head = head(completion_id, "text_completion", header).encode()
        self._tail = b',"usage":null}' if header.include_usage else b"}"

    def feed(self, entry: Entry) -> bytes:
        if entry.kind == "delta":
            deltas = entry.deltas
            self._num_cached_tokens = max([self._num_cached_tokens, *(d.num_cached_tokens for d in deltas)])
            return b"".join(self._chunk(delta, entry) for delta in deltas if delta.text or delta.finish_reason)
        if entry.kind == "end":
            if error := entry.finish.error:
                return self._failure(error)
            self.ended, self.usage = True, entry.finish.usage
            return self._end()
        return b""

    def _chunk(self, delta: Delta, entry: Entry) -> bytes:
        tail = self._tail
        if self.header.continuous_usage:
            usage = Usage(self.header.num_prompt_tokens, entry.num_tokens, self._num_cached_tokens)
            tail = b',"usage":%b}' % dump(usage_body(usage))
        return self._event(b'%b"choices":[{"index":%d,"text":%b,"logprobs":null,"finish_reason":%b}]%b' % (
            self._head, self._first_index + delta.index, quote(delta.text).encode(), dump(delta.finish_reason), tail))

    def _end(self) -> bytes:
        return self.closing(self.usage)

    def closing(self, usage: Usage) -> bytes:
        """The events after the last choice."""
        if not self.header.include_usage:
            return DONE
        return self._event(b'%b"choices":[],"usage":%b}' % (self._head, dump(usage_body(usage)))) + DONE


class TextFold(WholeFold):
    """Folds a log into one `text_completion` object."""

    def body(self) -> bytes:
        return _whole([self])


class Numbered(NamedTuple):
    """An entry of one of several logs."""

    number: int
    entry: Entry


class TextsChunkFold(EventFold[Numbered]):
    """The events of several logs as they arrive: the order is not reproducible, so they have no numbers."""

    def __init__(self, completion_id: str, headers: Sequence[Header]) -> None:
        super().__init__(headers[0])
        self._folds = [_Unnumbered(completion_id, header, first_index=number * header.n)
                       for number, header in enumerate(headers)]

    def feed(self, entry: Numbered) -> bytes:
        fold = self._folds[entry.number]
        events = fold.feed(entry.entry)
        if entry.entry.kind == "end" and entry.entry.finish.error:
            self.ended = True
        elif all(fold.ended for fold in self._folds):
            self.ended = True
            events += fold.closing(_total([fold.usage for fold in self._folds]))
        self.num_events += bool(events)
        return events


class _Unnumbered(TextChunkFold):
    """The events of one of these logs."""

    def _end(self) -> bytes:
        return b""

    def _event(self, body: bytes) -> bytes:
        return b"data: %b\n\n" % body


class TextsFold(Whole[Numbered]):
    """Folds several logs into one object."""

    def __init__(self, completion_id: str, headers: Sequence[Header]) -> None:
        super().__init__(completion_id)
        self._folds = [TextFold(completion_id, header) for header in headers]

    def feed(self, entry: Numbered) -> None:
        self._folds[entry.number].feed(entry.entry)
        self.ended = all(fold.ended for fold in self._folds)

    def body(self) -> bytes:
        return _whole(self._folds)


def _whole(folds: Sequence[TextFold]) -> bytes:
    choices: list[dict[str, Any]] = []
    for deltas in (deltas for fold in folds for deltas in fold.deltas):
        choices.append({"index": len(choices), "text": "".join(delta.text for delta in deltas), "logprobs": None,
                        "finish_reason": deltas[-1].finish_reason if deltas else None})
    tail = {"choices": choices, "usage": usage_body(_total([fold.usage for fold in folds]))}
    return head(folds[0].id, "text_completion", folds[0].header).encode() + dump(tail)[1:]


def _total(usages: Sequence[Usage]) -> Usage:
    return Usage(sum(usage.num_prompt_tokens for usage in usages),
                 sum(usage.num_completion_tokens for usage in usages),
                 sum(usage.num_cached_tokens for usage in usages))
