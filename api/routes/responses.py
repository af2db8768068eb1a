"""`/v1/responses`: created, also in the background; retrieved, resumed after an event, cancelled, deleted; counted."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from api import docs
from api.auth import Door
from api.conversation import before, resolved
from api.directory import Served
from api.jobs import Order, encode
from api.pod import Pod
from api.respond import UNSTORED, Caller, read_body, read_order, respond, rest
from api.resume import find, find_stored, whole
from api.routes.listing import (
    After,
    LastEventID,
    Limit,
    Sorting,
    StartingAfter,
    WantsStream,
    asked_from,
    is_newest_first,
    page_of,
    page_size,
)
from api.sse import COMPLETION_ID
from api.stored import Record
from api.submit import new_id, submit, submit_once
from api.wire.items import listed
from api.wire.languages import whole_fold
from api.wire.responses import ResponseRequest, in_our_words, parse_response
from shared.errors import Draining, StorageFull

ADDRESS = "/v1/responses"


def router(pod: Pod, door: Door) -> APIRouter:
    routes, known = APIRouter(), Depends(Caller.through(door))

    @routes.post(ADDRESS,
                 openapi_extra=docs.says(takes="ResponseRequest", gives="ResponseObject", events="typed events"))
    async def create_response(caller: Caller = known) -> Response:
        """Answers a conversation in items, whole, as a stream of typed events, or in the background."""
        body = await read_order(pod, caller)
        asked = parse_response(body, pod.settings.max_messages)
        served = await pod.directory.find(asked.model)
        items = await _conversation(pod, caller.tenant, asked)
        chat, echo = asked.chat(items), asked.asked
        record = Record("", "responses", asked.model, round(time.time() * 1000), echo["metadata"], tuple(items), echo)
        order = Order(chat, caller.tenant, len(body), "responses", is_unread=bool(asked.background),
                      record=record if asked.is_stored else None, continues=items != asked.items)
        with in_our_words():
            if asked.background and not asked.stream:
                return await _begin(pod, served, order, caller, body)
            try:
                return await respond(pod, served, order, caller, body, echo)
            except StorageFull:
                if asked.must_be_stored:
                    raise
                return await respond(pod, served, replace(order, record=None), caller, body, echo | UNSTORED)

    @routes.post(ADDRESS + "/input_tokens",
                 openapi_extra=docs.says(takes="ResponseRequest", gives="ResponseInputTokens"))
    async def count_input_tokens(request: Request, tenant: str = Depends(door)) -> dict[str, Any]:
        """Counts the tokens of a request as the model would read them, without answering it."""
        asked = parse_response(await read_body(pod, request), pod.settings.max_messages)
        served = await pod.directory.find(asked.model)
        items = await _conversation(pod, tenant, asked)
        with in_our_words():
            prompt = await asyncio.to_thread(encode, asked.chat(items), served.tokenizer)
        return {"object": "response.input_tokens", "input_tokens": len(prompt)}

    @routes.get(ADDRESS + "/{response_id}", openapi_extra=docs.says(gives="ResponseObject", events=docs.BEHIND))
    async def retrieve_response(response_id: str, stream: WantsStream = None, starting_after: StartingAfter = None,
                                last_event_id: LastEventID = None, tenant: str = Depends(door)) -> Response:
        """A response as it stands, or its events after the sequence number `starting_after`, also while it runs."""
        is_stream, position = asked_from(stream, starting_after, last_event_id)
        record, queue, found = await find_stored(pod, tenant, response_id, "responses")
        if not is_stream:
            return _json(await whole(pod, queue, found, record.asked), response_id)
        if pod.draining:
            raise Draining(retry_after_s=0.1)
        return await rest(pod, queue, found, position, record.asked)

    @routes.post(ADDRESS + "/{response_id}/cancel", openapi_extra=docs.says(gives="ResponseObject"))
    async def cancel_response(response_id: str, tenant: str = Depends(door)) -> Response:
        """Ends a response, whoever reads it; returns its state then."""
        record, queue, found = await find_stored(pod, tenant, response_id, "responses")
        if found.finish is None:
            await queue.cancel(response_id)
        return await _told(pod, tenant, record)

    @routes.delete(ADDRESS + "/{response_id}", openapi_extra=docs.says(gives="Deleted"))
    async def delete_response(response_id: str, tenant: str = Depends(door)) -> dict[str, Any]:
        """Deletes a response and the request it answers; a running one is cancelled."""
        _, queue, _ = await find_stored(pod, tenant, response_id, "responses")
        await queue.erase(response_id)
        await pod.store.remove(tenant, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @routes.get(ADDRESS + "/{response_id}/input_items", openapi_extra=docs.says(gives="Page"))
    async def list_input_items(response_id: str, after: After = None, limit: Limit = None, order: Sorting = None,
                               tenant: str = Depends(door)) -> dict[str, Any]:
        """The items that a response answers, those of the earlier conversation included."""
        record, _, _ = await find_stored(pod, tenant, response_id, "responses")
        return page_of(listed(record.items, response_id), after, page_size(limit),
                       newest_first=is_newest_first(order, default="desc"))

    return routes


async def _conversation(pod: Pod, tenant: str, asked: ResponseRequest) -> list[dict[str, Any]]:
    return await before(pod, tenant, asked.previous_response_id) + await resolved(pod, tenant, asked.items)


async def _begin(pod: Pod, served: Served, order: Order, caller: Caller, body: bytes) -> Response:
    """In the background: answered as soon as it is accepted."""
    assert order.record
    if caller.key is not None:
        response_id = await submit_once(pod, served, order, caller.key, body)
        return await _told(pod, caller.tenant, replace(order.record, id=response_id))
    stream, header = await submit(pod, served, order, new_id(served, order))
    pod.relay.close(stream)
    # The state at acceptance, however quick a worker is.
    fold = whole_fold(stream.job_id, header, served.tokenizer.token_bytes, order.record.asked)
    return _json(fold.body(), stream.job_id)


async def _told(pod: Pod, tenant: str, record: Record) -> Response:
    body = await whole(pod, *await find(pod, tenant, record.id, "responses"), record.asked)
    return _json(body, record.id)


def _json(body: bytes, response_id: str) -> Response:
    return Response(body, media_type="application/json", headers={COMPLETION_ID: response_id})
