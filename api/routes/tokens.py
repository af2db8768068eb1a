"""`POST /tokenize` and `POST /detokenize`: what a model's tokenizer makes of a text, and of tokens."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from api import docs
from api.jobs import encode_chat
from api.pod import Pod
from api.respond import read_body
from api.wire.tokens import TokenizeRequest, parse_detokenize, parse_tokenize
from shared.errors import InvalidValue, MissingField
from shared.tokenizer import Tokenizer


def router(pod: Pod) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize", openapi_extra=docs.says(takes="TokenizeRequest", gives="Tokens"))
    async def tokenize(request: Request) -> dict[str, Any]:
        """Token ids of a text, or of a chat as the model would read it."""
        asked = parse_tokenize(await read_body(pod, request), pod.settings.max_messages)
        served = await pod.directory.find(asked.model or _only(pod))
        token_ids = await asyncio.to_thread(_encode, asked, served.tokenizer)
        strings = [served.tokenizer.fast.id_to_token(i) for i in token_ids] if asked.return_token_strs else None
        return {"count": len(token_ids), "max_model_len": served.card.max_model_len, "tokens": token_ids,
                "token_strs": strings}

    @routes.post("/detokenize", openapi_extra=docs.says(takes="DetokenizeRequest", gives="Text"))
    async def detokenize(request: Request) -> dict[str, str]:
        """The text of tokens, special ones as they are written."""
        asked = parse_detokenize(await read_body(pod, request))
        served = await pod.directory.find(asked.model or _only(pod))
        if any(token_id >= served.card.vocab_size for token_id in asked.tokens):
            raise InvalidValue(f"token ids are below {served.card.vocab_size} for this model.", param="tokens")
        return {"prompt": await asyncio.to_thread(served.tokenizer.decode, asked.tokens)}

    return routes


def _only(pod: Pod) -> str:
    """The name of the model if only one is served. Raises MissingField."""
    names = {card.model: name for name, card in reversed(pod.directory.names().items())}
    if len(names) != 1:
        raise MissingField("model: Field required", param="model")
    return next(iter(names.values()))


def _encode(asked: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    if asked.messages is None:
        return tokenizer.encode_text(asked.prompt or "", add_special_tokens=asked.add_special_tokens is not False)
    return encode_chat(asked.messages, asked.tools, asked.template_variables, tokenizer)
