"""`POST /v1/chat/completions`: parse, submit, relay, answer."""

from __future__ import annotations

import time

from fastapi import APIRouter, Depends, Response

from api import docs
from api.auth import Door
from api.jobs import Order
from api.pod import Pod
from api.respond import Caller, read_order, respond
from api.stored import Record
from api.wire.request import ChatRequest, parse


def router(pod: Pod, door: Door) -> APIRouter:
    routes, known = APIRouter(), Depends(Caller.through(door))

    @routes.post("/v1/chat/completions",
                 openapi_extra=docs.says(takes="ChatRequest", gives="ChatCompletion", events=docs.CHUNKS))
    async def create_chat_completion(caller: Caller = known) -> Response:
        """Answers a conversation, whole or as a stream of server-sent events."""
        body = await read_order(pod, caller)
        chat = parse(body, pod.settings.max_messages)
        served = await pod.directory.find(chat.model)
        order = Order(chat, caller.tenant, len(body), record=_record(chat) if chat.store else None)
        return await respond(pod, served, order, caller, body)

    return routes


def _record(chat: ChatRequest) -> Record:
    messages = tuple(message.model_dump(exclude_none=True) for message in chat.messages)
    return Record("", "chat", chat.model, round(time.time() * 1000), chat.metadata or {}, messages)
