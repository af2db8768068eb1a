"""From a request to an accepted job: render, count, refuse what can be refused, put the rest in line.

All that can be known before acceptance is an HTTP status, also for streams; nothing is decided afterwards.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from api.directory import Served
from api.wire.chat import fold_version
from api.wire.dialects import Dialect
from api.wire.reading import Reading
from api.wire.request import ChatRequest, Message
from shared.card import Card
from shared.errors import ContextTooLong, InvalidGrammar, InvalidValue, UnsupportedParameter
from shared.job import Header, Job, Sampling
from shared.prefix import prefix_names, some
from shared.settings import Settings
from shared.tokenizer import Tokenizer

INLINE_BYTES = 16_384                                   # longer requests are rendered beside the loop that relays


async def make_job(request: ChatRequest, served: Served, completion_id: str, *, num_body_bytes: int, tenant: str,
                   pod_id: str, settings: Settings) -> tuple[Job, Header]:
    """The job and the header of its log. Raises the BadRequest that says why there is none."""
    card = served.card
    messages = adapted(request.messages, card)
    encode = partial(served.tokenizer.encode_chat, messages, request.offered_tools, request.template_variables)
    prompt = await asyncio.to_thread(encode) if num_body_bytes > INLINE_BYTES else encode()
    if not prompt:
        raise InvalidValue("The messages make an empty prompt.", param="messages")
    sampling = resolve_sampling(request, card, len(prompt))
    reading = Reading.of(prompt, card.chat_templates.values(), served.tokenizer.added_id,
                         wanted=settings.tool_dialect, tools=request.offered_tools)
    sampling = replace(sampling, shown_token_ids=reading.shown_token_ids)
    dialect = reading.dialect
    if request.is_constrained or request.calls.mode == "required":
        grammar = await asyncio.to_thread(_compile, request, served.tokenizer, dialect)
        after = reading.think_end_id if reading.reasoning == "open" else None
        sampling = replace(sampling, grammar=grammar, grammar_after=after)
    n, created_s = request.n or 1, int(time.time())
    if n > card.max_num_seqs:
        raise InvalidValue(f"n is at most {card.max_num_seqs} for this model.", param="n")
    job = Job(id=completion_id, tenant=tenant, pod=pod_id, prompt_token_ids=tuple(prompt), sampling=sampling,
              tokenizer_id=card.tokenizer_id, weights_id=card.weights_id, n=n, created_s=created_s,
              prefix=some(prefix_names(tenant, prompt, card.prefill_chunk_tokens)),
              deadline_s=settings.request_deadline_s)
    options = request.stream_options
    header = Header(model=request.model, created_s=created_s, fingerprint=card.fingerprint, seed=sampling.seed, n=n,
                    num_prompt_tokens=len(prompt), tokenizer_id=card.tokenizer_id, stream=bool(request.stream),
                    include_usage=bool(options and options.include_usage),
                    continuous_usage=bool(options and options.continuous_usage_stats),
                    logprobs=bool(request.logprobs), reasoning=reading.reasoning,
                    think_end_id=reading.think_end_id, tool_dialect=dialect.name if dialect else "",
                    typed_arguments=reading.typed_arguments,
                    has_named_tool=request.calls.is_named, has_functions=request.is_legacy,
                    fold_version=fold_version(dialect, reading.reasoning))
    return job, header


def _compile(request: ChatRequest, tokenizer: Tokenizer, dialect: Dialect | None) -> str:
    """What the answer must be: calls, if some are required, or what else was asked for. Raises BadRequest."""
    choice = request.calls
    if choice.mode != "required":
        form = request.compile_grammar(tokenizer.check_grammar)
        framed = dialect.framed(form, tokenizer.added_id) if dialect else form
        if framed != form:
            tokenizer.check_grammar(framed)
        return framed
    if dialect is None or not dialect.can_call:
        raise UnsupportedParameter("This model's chat template does not say how it calls tools, so it cannot be made "
                                   "to.", param="tool_choice")
    is_one = choice.is_named or request.parallel_tool_calls is False
    try:
        grammar = dialect.grammar(choice.of(request.tools or ()), is_one=is_one, added_id=tokenizer.added_id)
        tokenizer.check_grammar(grammar)
    except InvalidGrammar as error:
        raise InvalidGrammar(str(error), param="tools") from None
    return grammar


def adapted(said: Sequence[Message], card: Card) -> list[dict[str, Any]]:
    """Messages as the model's template takes them. Most know no developer: what one says stands in a system turn, as
    OpenAI itself reads it."""
    messages = [message.for_template() for message in said]
    if not any("developer" in template for template in card.chat_templates.values()):
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    return messages


def resolve_sampling(request: ChatRequest, card: Card, num_prompt_tokens: int) -> Sampling:
    """Every parameter with its default filled in and its token ids checked. Raises BadRequest."""
    room = card.max_model_len - num_prompt_tokens
    max_tokens = request.answer_limit or room
    if room < 1 or max_tokens > room:
        asked = f" and {max_tokens} in the completion" if request.answer_limit else ""
        raise ContextTooLong(f"This model's maximum context length is {card.max_model_len} tokens. However, you "
                             f"requested {num_prompt_tokens} tokens in the messages{asked}.", param="messages")
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidValue("min_tokens must not be above max_tokens.", param="min_tokens")
    biases = {int(token_id): bias for token_id, bias in (request.logit_bias or {}).items()}
    _refuse_unknown_ids(biases, card, "logit_bias")
    _refuse_unknown_ids(request.stop_token_ids or (), card, "stop_token_ids")
    defaults = replace(Sampling(max_tokens=max_tokens), **card.sampling_defaults)  # type: ignore[arg-type]
    return Sampling(
        max_tokens=max_tokens,
        seed=secrets.randbits(64) if request.seed is None else request.seed % 2**64,
        temperature=_given(request.temperature, defaults.temperature),
        top_p=_given(request.top_p, defaults.top_p),
        top_k=min(max(int(_given(request.top_k, defaults.top_k)), 0), card.vocab_size),
        min_p=_given(request.min_p, defaults.min_p),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        logit_bias=tuple(biases.items()),
        num_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        speculative=request.speculative is not False,
        stop=tuple(request.stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()))


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _refuse_unknown_ids(token_ids: Any, card: Card, param: str) -> None:
    if any(token_id >= card.vocab_size for token_id in token_ids):
        raise InvalidValue(f"{param}: token ids are below {card.vocab_size} for this model.", param=param)
