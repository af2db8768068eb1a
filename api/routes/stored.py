"""Chat completions begun earlier: whole, from a position on, cancelled; stored ones are also listed with their
requests, described, and deleted."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from api import docs
from api.auth import Door
from api.pod import Pod
from api.respond import read_body, rest
from api.resume import find, find_stored, whole, without_logprobs
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
from api.wire.fold import dump
from api.wire.metadata import parse_metadata
from shared.errors import CompletionInProgress, Draining, JobEnded, NotFound, NoWorker
from shared.queue import Found, Queue

ADDRESS = "/v1/chat/completions"


def router(pod: Pod, door: Door) -> APIRouter:
    routes = APIRouter()

    @routes.get(ADDRESS, openapi_extra=docs.says(gives="ChatCompletionPage"))
    async def list_chat_completions(request: Request, after: After = None, limit: Limit = None, order: Sorting = None,
                                    model: str | None = None, tenant: str = Depends(door)) -> Response:
        """The stored chat completions that ended well; with `metadata[NAME]=VALUE` only those that have it."""
        wanted = {match[1]: value for name, value in request.query_params.items()
                  if (match := re.fullmatch(r"metadata\[(.*)\]", name, re.DOTALL))}
        told, gone, num_wanted = dict[str, bytes](), list[Record](), page_size(limit)
        async for record in pod.store.listed(tenant, after=after, newest_first=is_newest_first(order, default="asc")):
            if model not in (None, record.model) or not wanted.items() <= record.metadata.items():
                continue
            try:
                told[record.id] = _described(await _shown(pod, *await find(pod, tenant, record.id, "chat")), record)
            except (NotFound, JobEnded):
                gone.append(record)
            except CompletionInProgress:
                continue
            if len(told) > num_wanted:
                break
        await pod.store.forget(tenant, gone)
        ids = list(told)[:num_wanted]
        rest = dump({"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None,
                     "has_more": len(told) > num_wanted})
        return _json(b'{"object":"list","data":[%b],%b' % (b",".join(told[each] for each in ids), rest[1:]))

    @routes.get(ADDRESS + "/{completion_id}", openapi_extra=docs.says(gives="ChatCompletion", events=docs.BEHIND))
    async def retrieve_chat_completion(completion_id: str, stream: WantsStream = None,
                                       starting_after: StartingAfter = None, last_event_id: LastEventID = None,
                                       tenant: str = Depends(door)) -> Response:
        """A chat completion begun earlier: whole once it is finished, or a stream that resumes after an event."""
        is_stream, after = asked_from(stream, starting_after, last_event_id)
        queue, found = await find(pod, tenant, completion_id, "chat")
        headers = {COMPLETION_ID: found.job_id}
        if not is_stream:
            record = await pod.store.get(tenant, completion_id)
            return _json(_described(await whole(pod, queue, found), record), headers)
        if pod.draining:
            raise Draining(retry_after_s=0.1)
        return await rest(pod, queue, found, after)

    @routes.get(ADDRESS + "/{completion_id}/messages", openapi_extra=docs.says(gives="Page"))
    async def list_messages(completion_id: str, after: After = None, limit: Limit = None, order: Sorting = None,
                            tenant: str = Depends(door)) -> dict[str, Any]:
        """The messages that a stored chat completion answers."""
        record, _, _ = await find_stored(pod, tenant, completion_id, "chat")
        messages = [{"id": f"{completion_id}-{number}", "content": None, "name": None} | message
                    for number, message in enumerate(record.items)]
        return page_of(messages, after, page_size(limit), newest_first=is_newest_first(order, default="asc"))

    @routes.post(ADDRESS + "/{completion_id}",
                 openapi_extra=docs.says(takes="MetadataRequest", gives="ChatCompletion"))
    async def update_chat_completion(completion_id: str, request: Request, tenant: str = Depends(door)) -> Response:
        """Gives a stored chat completion other metadata."""
        metadata = parse_metadata(await read_body(pod, request))
        record, queue, found = await find_stored(pod, tenant, completion_id, "chat")
        body = await whole(pod, queue, found)
        return _json(_described(body, await pod.store.update(tenant, record, metadata)))

    @routes.delete(ADDRESS + "/{completion_id}", openapi_extra=docs.says(gives="Deleted"))
    async def delete_chat_completion(completion_id: str, tenant: str = Depends(door)) -> dict[str, Any]:
        """Deletes a stored chat completion and the request it answers; a running one is cancelled."""
        _, queue, _ = await find_stored(pod, tenant, completion_id, "chat")
        await queue.erase(completion_id)
        await pod.store.remove(tenant, completion_id)
        return {"object": "chat.completion.deleted", "id": completion_id, "deleted": True}

    @routes.post(ADDRESS + "/{completion_id}/cancel", openapi_extra=docs.says(gives="Ended"))
    async def cancel_chat_completion(completion_id: str, tenant: str = Depends(door)) -> dict[str, str]:
        """Ends a chat completion, whoever reads it; returns how it ended, now or earlier."""
        found = await end(pod, tenant, completion_id)
        error = found.finish and found.finish.error
        status = "completed" if not error else "cancelled" if error == "cancelled" else "failed"
        return {"id": completion_id, "object": "chat.completion", "status": status}

    return routes


async def end(pod: Pod, tenant: str, completion_id: str) -> Found:
    """Cancels a running answer; returns its state then."""
    queue, found = await find(pod, tenant, completion_id, "chat")
    if found.finish is None:
        await queue.cancel(completion_id)
        _, found = await find(pod, tenant, completion_id, "chat")
    return found


async def _shown(pod: Pod, queue: Queue, found: Found) -> bytes:
    """In a list: one whose log probabilities cannot be told is shown without them, and takes no other one with it."""
    try:
        return await whole(pod, queue, found)
    except NoWorker:
        return await whole(pod, queue, without_logprobs(found))


def _described(body: bytes, record: Record | None) -> bytes:
    return body if record is None else body[:-1] + b',"metadata":%b}' % dump(record.metadata)


def _json(body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, media_type="application/json", headers=headers)
