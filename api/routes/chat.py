"""`POST /v1/chat/completions`: parse, submit, relay, answer."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response

from api import docs
from api.accept import submit, submit_once
from api.auth import Door
from api.pod import Pod
from api.relay import Stream
from api.resume import find, follow, join, position, token_bytes
from api.sse import COMPLETION_ID, EventStream
from api.wire.chat import ChunkFold, CompletionFold
from api.wire.request import parse
from shared.errors import BodyTooLarge, Draining, TooSlow
from shared.keys import new_completion_id

DRAINED_BYTES = 1 << 20                                 # of a refused body: closing at once can swallow the refusal
BODY_TIMEOUT_S = 60.0


def router(pod: Pod, door: Door) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", openapi_extra=docs.CHAT)
    async def create_chat_completion(
        request: Request,
        idempotency_key: Annotated[str | None, Header(description="the same key and body: the same completion")] = None,
        last_event_id: Annotated[str | None, Header(description="with an Idempotency-Key: the last you have")] = None,
        tenant: str = Depends(door),
    ) -> Response:
        """Answers a conversation, whole or as a stream of server-sent events."""
        began_s = time.monotonic()
        body = await read_body(request, pod.settings.max_body_bytes)
        if pod.draining:
            raise Draining(retry_after_s=0.1)
        chat = parse(body, pod.settings.max_messages)
        served = await pod.directory.find(chat.model)
        if idempotency_key is not None:
            after = position(last_event_id, "Last-Event-ID")
            completion_id = await submit_once(pod, served, chat, idempotency_key, body=body, tenant=tenant)
            return await again(pod, tenant, completion_id, after, request)
        stream, header = await submit(pod, served, chat, new_completion_id(served.queue.shard),
                                      num_body_bytes=len(body), tenant=tenant)
        if header.stream:
            return EventStream(stream, ChunkFold(stream.job_id, header, served.tokenizer.token_bytes),
                               {COMPLETION_ID: stream.job_id},
                               on_first=lambda: pod.metrics.ttft_s.observe(time.monotonic() - began_s),
                               on_close=partial(pod.part, stream))
        return await collect(pod, stream, CompletionFold(stream.job_id, header, served.tokenizer.token_bytes), request)

    return routes


async def again(pod: Pod, tenant: str, completion_id: str, after: int, request: Request) -> Response:
    """The answer that others may have begun, told as its log says that it was asked for."""
    queue, found = await find(pod, tenant, completion_id)
    if found.header.stream:
        stream, fold, said = await follow(pod, queue, found, after)
        return EventStream(stream, fold, {COMPLETION_ID: completion_id}, said=said, on_close=partial(pod.part, stream))
    fold_whole = CompletionFold(completion_id, found.header, await token_bytes(pod, found))
    return await collect(pod, await join(pod, queue, found), fold_whole, request)


async def collect(pod: Pod, stream: Stream, fold: CompletionFold, request: Request) -> Response:
    """Reads a stream to its end. Raises what ended it, or Draining when the client or the pod left."""
    watch = asyncio.create_task(_watch(request, stream))
    try:
        async for entries in stream.batches():
            for entry in entries:
                fold.feed(entry)
            if fold.ended:
                return Response(fold.body(), media_type="application/json", headers={COMPLETION_ID: stream.job_id})
    finally:
        watch.cancel()
        pod.part(stream, fold.ended)
    raise Draining(retry_after_s=0.1)                   # to a client that has left this goes nowhere


async def _watch(request: Request, stream: Stream) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stream.leave()


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, whatever its content type says. Raises TooSlow, or BodyTooLarge once a part of the rest was read."""
    pieces, num_bytes = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                num_bytes += len(piece)
                if num_bytes <= max_bytes:
                    pieces.append(piece)
                elif num_bytes > max_bytes + DRAINED_BYTES:
                    break
    except TimeoutError:
        raise TooSlow from None
    if num_bytes > max_bytes:
        raise BodyTooLarge(f"The body of a request has at most {max_bytes} bytes.")
    return b"".join(pieces)
