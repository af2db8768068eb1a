"""Answers an order over HTTP, as an event stream or as one object at the end; also an answer that has begun before.

It knows requests and responses, nothing of the languages of the API.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from starlette.requests import ClientDisconnect

from api.auth import Door
from api.directory import Served
from api.jobs import Order
from api.pod import Pod
from api.relay import Stream
from api.resume import attend, find, follow, join, position, token_bytes
from api.sse import COMPLETION_ID, EventStream, Source
from api.submit import new_id, submit, submit_once
from api.wire.fold import Whole
from api.wire.languages import Asked, event_fold, whole_fold
from shared.errors import BodyTooLarge, Draining, TooSlow, UnsupportedEncoding
from shared.queue import Found, Queue

DRAINED_BYTES = 1 << 20                                 # of a refused body: closing at once can discard the response
BODY_TIMEOUT_S = 60.0
UNSTORED = {"store": False}                             # what an answer repeats if there was no room to store it
TOO_LARGE = "The body of a request has at most {} bytes."


@dataclass(frozen=True, slots=True)
class Caller:
    """The client of a request, and its position if it asked before."""

    request: Request
    tenant: str
    key: str | None
    last_event_id: str | None

    @classmethod
    def through(cls, door: Door) -> Callable[..., Awaitable[Caller]]:
        """A dependency of a route."""
        async def come(request: Request, idempotency_key: Key = None, last_event_id: LastEventID = None,
                       tenant: str = Depends(door)) -> Caller:
            return cls(request, tenant, idempotency_key, last_event_id)

        return come


Key = Annotated[str | None, Header(description="the same key and body: the same completion")]
LastEventID = Annotated[str | None, Header(description="with an Idempotency-Key: the last event that you have")]


async def respond(pod: Pod, served: Served, order: Order, caller: Caller, body: bytes, asked: Asked | None = None
                  ) -> Response:
    """Submits an order, once for an Idempotency-Key, and answers it."""
    request = caller.request
    if caller.key is not None:
        after = position(caller.last_event_id, "Last-Event-ID")
        completion_id = await submit_once(pod, served, order, caller.key, body, goes_on=bool(after))
        return await again(pod, order, completion_id, after, request, asked)
    stream, header = await submit(pod, served, order, new_id(served, order))
    token_bytes = served.tokenizer.token_bytes
    if header.stream:
        if order.is_unread:                             # its job names no pod to push to
            await attend(pod, stream)
        fold = event_fold(stream.job_id, header, token_bytes, asked, is_numbered=False)
        return EventStream(stream, fold, {COMPLETION_ID: stream.job_id}, said=fold.begin(),
                           on_first=first_token_timer(pod, request), on_close=partial(pod.part, stream))
    return await collect(pod, [stream], stream, whole_fold(stream.job_id, header, token_bytes, asked), request)


async def again(pod: Pod, order: Order, completion_id: str, after: int | None, request: Request, asked: Asked | None
                ) -> Response:
    """An answer that may have begun before, in the form that its log's header gives."""
    queue, found = await find(pod, order.tenant, completion_id, order.language)
    if asked and order.record and not await pod.store.has(order.tenant, completion_id):
        asked = {**asked, **UNSTORED}                   # as it was told the first time, whatever room there is now
    if found.header.stream:
        return await rest(pod, queue, found, after, asked, None if after else first_token_timer(pod, request))
    fold_whole = whole_fold(completion_id, found.header, await token_bytes(pod, found), asked)
    stream = await join(pod, queue, found)
    return await collect(pod, [stream], stream, fold_whole, request)


async def rest(pod: Pod, queue: Queue, found: Found, after: int | None, asked: Asked | None = None,
               on_first: Callable[[], None] | None = None) -> EventStream:
    """The events after `after`, of running answers too. Raises the errors of `follow`."""
    stream, fold, said = await follow(pod, queue, found, after, asked)
    return EventStream(stream, fold, {COMPLETION_ID: found.job_id}, said=said, on_first=on_first or (lambda: None),
                       on_close=partial(pod.part, stream))


def first_token_timer(pod: Pod, request: Request) -> Callable[[], None]:
    """Observes, when it is called, how long ago the request came."""
    return lambda: pod.metrics.ttft_s.observe(time.monotonic() - request.scope["began_s"])


async def collect(pod: Pod, streams: list[Stream], source: Source, fold: Whole[Any], request: Request) -> Response:
    """Reads streams to their end. Raises the error that ended them, ClientDisconnect, or Draining when the pod left."""
    watch = asyncio.create_task(_watch(request, source))
    try:
        async for entries in source.batches():
            for entry in entries:
                fold.feed(entry)
            if fold.ended:
                return Response(fold.body(), media_type="application/json", headers={COMPLETION_ID: fold.id})
    finally:
        watch.cancel()
        for stream in streams:
            pod.part(stream)
    if watch.done():
        raise ClientDisconnect
    raise Draining(retry_after_s=0.1)


async def _watch(request: Request, source: Source) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    source.leave()


async def read_order(pod: Pod, caller: Caller) -> bytes:
    """The body of a request that becomes a job. Raises Draining, and the errors of read_body."""
    body = await read_body(pod, caller.request)
    if pod.draining:
        raise Draining(retry_after_s=0.1)
    return body


async def read_body(pod: Pod, request: Request) -> bytes:
    """The body, whatever its content type. Raises UnsupportedEncoding, TooSlow, or BodyTooLarge before its end."""
    pieces, num_bytes, max_bytes = [], 0, pod.settings.max_body_bytes
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise UnsupportedEncoding
    if int(request.headers.get("content-length", 0)) > max_bytes + DRAINED_BYTES:
        raise BodyTooLarge(TOO_LARGE.format(max_bytes))
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
        raise BodyTooLarge(TOO_LARGE.format(max_bytes))
    return b"".join(pieces)
