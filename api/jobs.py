"""From a request to a job: renders, counts, makes the grammar, and refuses whatever can be refused.

Whatever can be known before acceptance is reported by HTTP status, for streams too; nothing is decided later.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from api.adapt import adapted
from api.directory import Served
from api.stored import Record
from api.wire.completions import CompletionRequest
from api.wire.dialects import Dialect
from api.wire.dialects.dialect import eased_schemas
from api.wire.parts import fold_version
from api.wire.reading import Reading
from api.wire.reasoning import END
from api.wire.request import ChatRequest, Message
from api.wire.sampled import Sampled
from api.wire.tools import ChatTool
from shared.card import Card
from shared.errors import ContextTooLong, InvalidGrammar, InvalidValue, Unavailable, UnsupportedParameter
from shared.grammar import MAX_GRAMMAR_CHARS, TOO_LONG, within
from shared.job import Header, Job, Language, Sampling
from shared.prefix import prefix_names, some
from shared.settings import Settings
from shared.tokenizer import Tokenizer
from shared.trial import TOO_MUCH

# In a grammar, where no token ends a thought that the prompt has begun.
BEHIND_THOUGHT = f'start: thought @asked\nthought[lazy]: THOUGHT\nTHOUGHT: /(?s:.)*/ "{END}"\n'
FORMS = ThreadPoolExecutor(32, "form")                  # threads that only wait for trials of grammars
PLACES = asyncio.Semaphore(256)                         # requests that wait for these threads; more are refused
EASING_S = 2.0                                          # to find which of a request's tools cannot be enforced
INLINE_BYTES = 16_384                                   # longer requests are rendered in a thread, not in the loop


@dataclass(frozen=True, slots=True)
class Order:
    """What a client asks of a model, in whichever API."""

    request: ChatRequest | CompletionRequest
    tenant: str
    num_body_bytes: int
    language: Language = "chat"
    is_unread: bool = False                             # it runs on without readers
    record: Record | None = None                        # to be stored; the log is kept for `store_s` then
    priority: int = 0
    deadline_s: float | None = None                     # for waiting and computing; None: as configured
    retain_s: float | None = None                       # how long its log is kept; None: as configured
    continues: bool = False                             # it continues a stored conversation, of any length

    @property
    def is_long(self) -> bool:
        return self.continues or self.num_body_bytes > INLINE_BYTES


async def make_job(order: Order, served: Served, completion_id: str, *, pod_id: str, settings: Settings, retain_s: float
                   ) -> tuple[Job, Header]:
    """The job and the header of its log. Raises BadRequest, with the reason, when there can be none."""
    request, card = order.request, served.card
    prompt = (await asyncio.to_thread(encode, request, served.tokenizer) if order.is_long else
              encode(request, served.tokenizer))
    reading = (Reading.of(prompt, card.chat_templates.values(), served.tokenizer.added_id, wanted=settings.tool_dialect,
                          tools=request.offered_tools, keeps_form=request.is_constrained and not request.must_call,
                          decode=served.tokenizer.decode)
               if isinstance(request, ChatRequest) else Reading())
    sampling = replace(resolve_sampling(request, card, len(prompt)), shown_token_ids=reading.shown_token_ids,
                       tells_stop=order.language == "messages")
    if request.is_constrained or (isinstance(request, ChatRequest) and (request.must_call or request.has_strict_tools)):
        if PLACES.locked():
            raise Unavailable(retry_after_s=1.0)
        async with PLACES:
            grammar = await asyncio.get_running_loop().run_in_executor(
                FORMS, _compile, request, served.tokenizer, reading)
        sampling = replace(sampling, grammar=grammar,
                           grammar_after=reading.think_end_id if reading.reasoning == "open" else None)
    n, created_s = request.n or 1, int(time.time())
    if n > (most := min(card.max_num_seqs, settings.max_tenant_choices)):
        raise InvalidValue(f"n is at most {most} for this model.", param="n")
    job = Job(id=completion_id, tenant=order.tenant, pod="" if order.is_unread else pod_id,
              prompt_token_ids=tuple(prompt), sampling=sampling, tokenizer_id=card.tokenizer_id,
              weights_id=card.weights_id, n=n, priority=order.priority, created_s=created_s, retain_s=retain_s,
              prefix=some(prefix_names(order.tenant, prompt, card.prefill_chunk_tokens), card.prefill_chunk_tokens),
              deadline_s=order.deadline_s or settings.request_deadline_s)
    return job, _header(order, job, reading, card)


def _header(order: Order, job: Job, reading: Reading, card: Card) -> Header:
    request, options = order.request, order.request.stream_options
    chat = request if isinstance(request, ChatRequest) else None
    return Header(model=request.model, created_s=job.created_s, fingerprint=card.fingerprint, seed=job.sampling.seed,
                  n=job.n, num_prompt_tokens=len(job.prompt_token_ids), tokenizer_id=card.tokenizer_id,
                  stream=bool(request.stream), include_usage=bool(options and options.include_usage),
                  continuous_usage=bool(options and options.continuous_usage_stats),
                  logprobs=request.num_logprobs is not None, reasoning=reading.reasoning,
                  think_end_id=reading.think_end_id, tool_dialect=reading.dialect.name if reading.dialect else "",
                  typed_arguments=reading.typed_arguments,
                  has_named_tool=bool(chat and chat.calls.is_named), has_functions=bool(chat and chat.is_legacy),
                  language=order.language, fold_version=fold_version(reading.dialect, reading.reasoning))


def encode(request: ChatRequest | CompletionRequest, tokenizer: Tokenizer) -> list[int]:
    """The prompt's token ids. Raises BadRequest, also when there are none."""
    if isinstance(request, ChatRequest):
        prompt, param = encode_chat(request.messages, request.offered_tools, request.template_variables,
                                    tokenizer), "messages"
    else:
        prompt, param = _encode_prompt(request, tokenizer), "prompt"
    if not prompt:
        raise InvalidValue("The prompt is empty.", param=param)
    _refuse_unknown_ids(prompt, tokenizer.card, param)
    return prompt


def encode_chat(said: Sequence[Message], tools: Sequence[ChatTool] | None, variables: Mapping[str, Any],
                tokenizer: Tokenizer) -> list[int]:
    """Raises TemplateRefused, or BadRequest when there is no chat template."""
    return tokenizer.encode_chat(adapted(said, tokenizer.template_for(tools)), tools, variables)


def _encode_prompt(request: CompletionRequest, tokenizer: Tokenizer) -> list[int]:
    [prompt] = request.prompts
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt, add_special_tokens=request.add_special_tokens is not False)
    return prompt


def _compile(request: Sampled, tokenizer: Tokenizer, reading: Reading) -> str:
    """The grammar of the answer; empty: no constraint. Raises BadRequest."""
    grammar = _asked(request, tokenizer, reading)
    if not grammar or reading.reasoning != "open" or reading.think_end_id is not None:
        return grammar
    return tokenizer.make_grammar("made", within(BEHIND_THOUGHT, asked=grammar))


def _asked(request: Sampled, tokenizer: Tokenizer, reading: Reading) -> str:
    """The grammar of what the request asks for.

    If calls are required: calls. If a form is requested: the form, or calls where tools are offered. Else, where a tool
    is strict: text in which all calls follow the schemas.
    """
    if not isinstance(request, ChatRequest):
        return request.compile_grammar(tokenizer.make_grammar)
    dialect = reading.dialect
    if request.must_call:
        return _calls(request, tokenizer, dialect)
    calls = _calls(request, tokenizer, dialect) if request.offered_tools and dialect and dialect.can_call else ""
    form = request.compile_grammar(tokenizer.make_grammar)
    grammar = dialect.framed(form, tokenizer.added_id) if dialect and form else form
    if calls and form:
        grammar = within("start: @asked | @calls", asked=grammar, calls=calls)
    elif calls and dialect:
        is_one = request.parallel_tool_calls is False
        grammar = dialect.among_text(calls, is_one=is_one, may_think=reading.reasoning == "maybe",
                                     added_id=tokenizer.added_id)
    if grammar not in ("", form):
        tokenizer.make_grammar("made", grammar)
    return grammar


def _calls(request: ChatRequest, tokenizer: Tokenizer, dialect: Dialect | None) -> str:
    """The grammar of calls alone; for tools that are not strict it omits what cannot be enforced. Raises BadRequest."""
    choice = request.calls
    if dialect is None or not dialect.can_call:
        raise UnsupportedParameter("This model's chat template does not say how it calls tools, so it cannot be made "
                                   "to.", param="tool_choice")
    known, is_one = dialect, choice.is_named or request.parallel_tool_calls is False

    def made(*functions: Mapping[str, Any]) -> str:
        if sum(len(json.dumps(each.get("parameters"))) for each in functions) > MAX_GRAMMAR_CHARS:
            raise InvalidGrammar(TOO_LONG, param="tools")
        return tokenizer.make_grammar("made", known.grammar(functions, is_one=is_one, added_id=tokenizer.added_id))

    deadline_s = time.monotonic() + EASING_S

    def eased(function: Mapping[str, Any]) -> Mapping[str, Any]:
        if time.monotonic() > deadline_s:
            raise InvalidGrammar(TOO_MUCH, param="tools")
        candidates = [function] if function.get("strict") else [function, *eased_schemas(function)]
        for candidate in candidates:
            try:
                made(candidate)
                return candidate
            except InvalidGrammar as refusal:
                error = refusal
        number = [tool["function"]["name"] for tool in request.tools or ()].index(str(function["name"]))
        raise InvalidGrammar(str(error), param=f"tools[{number}].function")

    functions: list[Mapping[str, Any]] = choice.of(request.tools or ())
    try:
        return made(*functions)
    except InvalidGrammar:
        functions = [eased(each) for each in functions]
    try:
        return made(*functions)
    except InvalidGrammar as error:
        raise InvalidGrammar(str(error), param="tools") from None


def resolve_sampling(request: Sampled, card: Card, num_prompt_tokens: int) -> Sampling:
    """Every parameter with its default filled in and its token ids checked. Raises BadRequest."""
    room = card.max_model_len - num_prompt_tokens
    max_tokens = request.answer_limit or room
    if room < 1 or max_tokens > room:
        raise _too_long(request, card.max_model_len, num_prompt_tokens)
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidValue("min_tokens must not be above the limit of tokens.", param="min_tokens")
    biases = {int(token_id): bias for token_id, bias in (request.logit_bias or {}).items()}
    _refuse_unknown_ids(biases, card, "logit_bias")
    _refuse_unknown_ids(request.stop_token_ids or (), card, "stop_token_ids")
    ours = Sampling(max_tokens=max_tokens)

    def wished(value: float | None, name: str) -> float:
        """As asked, else as the model's folder says, else ours."""
        return float(card.sampling_defaults.get(name, getattr(ours, name)) if value is None else value)

    return Sampling(
        max_tokens=max_tokens,
        seed=secrets.randbits(64) if request.seed is None else request.seed % 2**64,
        temperature=wished(request.temperature, "temperature"),
        top_p=wished(request.top_p, "top_p"),
        top_k=min(max(int(wished(request.top_k, "top_k")), 0), card.vocab_size),
        min_p=wished(request.min_p, "min_p"),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=wished(request.repetition_penalty, "repetition_penalty"),
        logit_bias=tuple(biases.items()),
        num_logprobs=request.num_logprobs,
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        speculative=request.speculative is not False,
        stop=tuple(request.stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()))


def _too_long(request: Sampled, most: int, num_prompt_tokens: int) -> ContextTooLong:
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    limit, asked, theirs = request.answer_limit, "", f"prompt is too long: {num_prompt_tokens} tokens > {most} maximum"
    if limit:
        asked = f" and {limit} in the completion"
    if limit and num_prompt_tokens < most:
        theirs = (f"input length and `max_tokens` exceed context limit: {num_prompt_tokens} + {limit} > {most}, "
                  "decrease input length or `max_tokens` and try again")
    return ContextTooLong(f"This model's maximum context length is {most} tokens. However, you requested "
                          f"{num_prompt_tokens} tokens in the {param}{asked}.", param=param, as_anthropic=theirs)


def _refuse_unknown_ids(token_ids: Any, card: Card, param: str) -> None:
    if any(token_id >= card.vocab_size for token_id in token_ids):
        raise InvalidValue(f"{param}: token ids are below {card.vocab_size} for this model.", param=param)
