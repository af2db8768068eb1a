"""`POST /v1/completions`: continues one prompt or several."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fastapi import APIRouter, Depends, Response

from api import docs
from api.auth import Door
from api.directory import Served
from api.jobs import Order
from api.pod import Pod
from api.relay import Stream
from api.respond import Caller, collect, first_token_timer, read_order, respond
from api.several import Several
from api.sse import COMPLETION_ID, EventStream
from api.submit import new_id, submit
from api.wire.completions import CompletionRequest, TextsChunkFold, TextsFold, parse_completion
from shared import connection
from shared.errors import InvalidValue
from shared.job import Header


def router(pod: Pod, door: Door) -> APIRouter:
    routes, known = APIRouter(), Depends(Caller.through(door))

    @routes.post("/v1/completions",
                 openapi_extra=docs.says(takes="CompletionRequest", gives="TextCompletion", events=docs.CHUNKS))
    async def create_completion(caller: Caller = known) -> Response:
        """Continues a text, or several, whole or as a stream of server-sent events."""
        body = await read_order(pod, caller)
        asked = parse_completion(body)
        served = await pod.directory.find(asked.model)
        if len(asked.prompts) == 1:
            return await respond(pod, served, Order(asked, caller.tenant, len(body), "completions"), caller, body)
        if caller.key is not None:
            raise InvalidValue("An Idempotency-Key is for requests of one prompt.", param="Idempotency-Key")
        return await _respond_to_several(pod, served, asked, caller, len(body))

    return routes


async def _respond_to_several(pod: Pod, served: Served, asked: CompletionRequest, caller: Caller, num_body_bytes: int
                              ) -> Response:
    num_choices, most = len(asked.prompts) * (asked.n or 1), pod.settings.max_tenant_choices
    if num_choices > most:                              # it would be told to retry for ever
        raise InvalidValue(f"A key has at most {most} choices at once, those of all prompts together.", param="prompt")
    orders = [Order(one, caller.tenant, num_body_bytes, "completions") for one in asked.each()]
    accepted = await _submit_all(pod, served, orders)
    streams, headers = [stream for stream, _ in accepted], [header for _, header in accepted]
    completion_id, source = streams[0].job_id, Several(streams)
    if not asked.stream:
        return await collect(pod, streams, source, TextsFold(completion_id, headers), caller.request)

    def close() -> None:
        for stream in streams:
            pod.part(stream)

    return EventStream(source, TextsChunkFold(completion_id, headers), {COMPLETION_ID: completion_id},
                       on_first=first_token_timer(pod, caller.request), on_close=close)


async def _submit_all(pod: Pod, served: Served, orders: list[Order]) -> list[tuple[Stream, Header]]:
    """All of them, or none. Raises the first refusal."""
    accepted: list[tuple[Stream, Header]] = []
    try:
        for order in orders:
            accepted.append(await submit(pod, served, order, new_id(served, order)))
    except BaseException:
        for stream, _ in accepted:
            pod.relay.close(stream)
        with suppress(*connection.TROUBLE):
            await asyncio.gather(*(stream.queue.cancel(stream.job_id) for stream, _ in accepted))
        raise
    return accepted
