"""`POST /v1/chat/completions`: parse, submit, relay, answer."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Depends, Request, Response

from api import docs
from api.auth import Door
from api.directory import Served
from api.pod import Pod
from api.relay import Stream
from api.sse import EventStream
from api.submit import make_job
from api.wire.chat import ChunkFold, CompletionFold
from api.wire.request import parse
from shared.errors import BodyTooLarge, Draining, Overloaded, TooSlow
from shared.job import Header, Job

DRAINED_BYTES = 1 << 20                                 # of a refused body: closing at once can swallow the refusal
BODY_TIMEOUT_S = 60.0


def router(pod: Pod, door: Door) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", openapi_extra=docs.CHAT)
    async def create_chat_completion(request: Request, tenant: str = Depends(door)) -> Response:
        """Answers a conversation, whole or as a stream of server-sent events."""
        began_s = time.monotonic()
        body = await read_body(request, pod.settings.max_body_bytes)
        if pod.draining:
            raise Draining(retry_after_s=0.1)
        chat = parse(body, pod.settings.max_messages)
        served = await pod.directory.find(chat.model)
        pod.limits.check_memory()
        job, header = await make_job(chat, served, num_body_bytes=len(body), tenant=tenant, pod_id=pod.id,
                                     settings=pod.settings)
        stream = await submit(pod, served, job, header)
        headers = {"x-baton-completion-id": job.id}
        if header.stream:
            return EventStream(stream, ChunkFold(job.id, header, served.tokenizer.token_bytes), headers,
                               on_first=lambda: pod.metrics.ttft_s.observe(time.monotonic() - began_s),
                               on_close=lambda complete: pod.part(stream, complete))
        fold = CompletionFold(job.id, header, served.tokenizer.token_bytes)
        try:
            await collect(stream, fold, request)
        finally:
            pod.part(stream, fold.ended)
        return Response(fold.body(), media_type="application/json", headers=headers)

    return routes


async def submit(pod: Pod, served: Served, job: Job, header: Header) -> Stream:
    """Listens, then submits. Raises Overloaded with the time at which the line will have moved."""
    queue = served.queue                                # whoever found it has had the relay listen to its shard
    stream = pod.relay.open(job.id, queue)
    try:
        await queue.submit(job, header, retain_s=pod.limits.retain_s())
    except Overloaded as refusal:
        pod.relay.close(stream)
        refusal.retry_after_s = await pod.limits.retry_after_s(queue.shard.id)
        raise
    except BaseException:
        pod.part(stream, complete=False)                # it may have been accepted
        raise
    return stream


async def collect(stream: Stream, fold: CompletionFold, request: Request) -> None:
    """Reads a stream to its end. Raises what ended it, or Unavailable when the client or the pod left."""
    watch = asyncio.create_task(_watch(request, stream))
    try:
        async for entries in stream.batches():
            for entry in entries:
                fold.feed(entry)
            if fold.ended:
                return
    finally:
        watch.cancel()
    raise Draining(retry_after_s=1.0)                   # to a client that has left this goes nowhere


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
