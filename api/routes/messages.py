"""`POST /v1/messages` and `…/count_tokens`: chats, in Anthropic's language."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request, Response

from api import docs
from api.auth import Door
from api.jobs import Order, encode
from api.pod import Pod
from api.respond import Caller, read_body, read_order, respond
from api.wire.messages import parse_count, parse_message


def router(pod: Pod, door: Door) -> APIRouter:
    routes, known = APIRouter(), Depends(Caller.through(door))

    @routes.post("/v1/messages", openapi_extra=docs.in_messages(
        docs.says(takes="MessageRequest", gives="MessageObject", events="message_start to message_stop, or an error")))
    async def create_message(caller: Caller = known) -> Response:
        """Answers a conversation, whole or as a stream of server-sent events."""
        body = await read_order(pod, caller)
        chat = parse_message(body, pod.settings.max_messages)
        served = await pod.directory.find(chat.model)
        return await respond(pod, served, Order(chat, caller.tenant, len(body), "messages"), caller, body)

    @routes.post("/v1/messages/count_tokens", dependencies=[Depends(door)],
                 openapi_extra=docs.in_messages(docs.says(takes="CountRequest", gives="InputTokens")))
    async def count_tokens(request: Request) -> dict[str, int]:
        """How many tokens a conversation has, as the model reads it."""
        chat = parse_count(await read_body(pod, request), pod.settings.max_messages)
        served = await pod.directory.find(chat.model)
        return {"input_tokens": len(await asyncio.to_thread(encode, chat, served.tokenizer))}

    return routes
