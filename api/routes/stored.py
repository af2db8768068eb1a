"""Chat completions that were begun before: whole, from a position on, cancelled; those that are stored also listed,
with what was asked for them, described, and deleted."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from api import docs
from api.auth import Door
from api.pod import Pod
from api.respond import read_body
from api.resume import find, follow, position, whole
from api.sse import COMPLETION_ID, EventStream
from api.stored import Record
from api.wire.fold import dump
from api.wire.metadata import parse_metadata
from shared.errors import CompletionInProgress, CompletionNotFound, Draining, InvalidValue, JobEnded, NotFound
from shared.queue import Found

FLAGS = {None: False, "false": False, "0": False, "true": True, "1": True}
MAX_LISTED = 100
DEFAULT_LISTED = 20
ADDRESS = "/v1/chat/completions"

Stream = Annotated[str | None, Query(description="true: server-sent events, also while it runs")]
StartingAfter = Annotated[str | None, Query(description="number of the last event that you have")]
LastEventID = Annotated[str | None, Header(description="as starting_after, which wins")]
After = Annotated[str | None, Query(description="id of the last one that you have")]
Limit = Annotated[str | None, Query(description=f"1 to {MAX_LISTED}; else {DEFAULT_LISTED}")]
Order = Annotated[str | None, Query(description="asc: the oldest first; desc: the newest")]


def router(pod: Pod, door: Door) -> APIRouter:
    routes = APIRouter()

    @routes.get(ADDRESS)
    async def list_chat_completions(request: Request, after: After = None, limit: Limit = None, order: Order = None,
                                    model: str | None = None, tenant: str = Depends(door)) -> Response:
        """The chat completions that were stored and have ended well, with `metadata[NAME]=VALUE` those that have it."""
        wanted = {match[1]: value for name, value in request.query_params.items()
                  if (match := re.fullmatch(r"metadata\[(.+)\]", name))}

        def suits(record: Record) -> bool:
            return model in (None, record.model) and wanted.items() <= record.metadata.items()

        records, has_more = await pod.store.page(tenant, after=after, limit=page_size(limit),
                                                 newest_first=is_newest_first(order, default="asc"), suits=suits)
        bodies = [body for record in records if (body := await _body(pod, tenant, record))]
        ids = [record.id for record in records]
        rest = dump({"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None, "has_more": has_more})
        return _json(b'{"object":"list","data":[%b],%b' % (b",".join(bodies), rest[1:]))

    @routes.get(ADDRESS + "/{completion_id}", openapi_extra=docs.COMPLETION)
    async def retrieve_chat_completion(completion_id: str, stream: Stream = None, starting_after: StartingAfter = None,
                                       last_event_id: LastEventID = None, tenant: str = Depends(door)) -> Response:
        """A chat completion that was begun before: the whole, once it is finished, or a stream from an event on."""
        is_stream, after = asked_from(stream, starting_after, last_event_id)
        queue, found = await find(pod, tenant, completion_id, "chat")
        headers = {COMPLETION_ID: found.job_id}
        if not is_stream:
            record = await pod.store.get(tenant, completion_id)
            return _json(_described(await whole(pod, queue, found), record), headers)
        if pod.draining:
            raise Draining(retry_after_s=0.1)
        reader, fold, said = await follow(pod, queue, found, after)
        return EventStream(reader, fold, headers, said=said, on_close=partial(pod.part, reader))

    @routes.get(ADDRESS + "/{completion_id}/messages")
    async def list_messages(completion_id: str, after: After = None, limit: Limit = None, order: Order = None,
                            tenant: str = Depends(door)) -> dict[str, Any]:
        """The messages that a stored chat completion answers."""
        record = await _stored(pod, tenant, completion_id)
        messages = [{"id": f"{completion_id}-{number}", "content": None, "name": None} | message
                    for number, message in enumerate(record.items)]
        return page_of(messages, after, page_size(limit), newest_first=is_newest_first(order, default="asc"))

    @routes.post(ADDRESS + "/{completion_id}", openapi_extra=docs.request("MetadataRequest"))
    async def update_chat_completion(completion_id: str, request: Request, tenant: str = Depends(door)) -> Response:
        """Gives a stored chat completion other metadata."""
        metadata = parse_metadata(await read_body(pod, request))
        record = await pod.store.update(tenant, await _stored(pod, tenant, completion_id), metadata)
        queue, found = await find(pod, tenant, completion_id, "chat")
        return _json(_described(await whole(pod, queue, found), record))

    @routes.delete(ADDRESS + "/{completion_id}")
    async def delete_chat_completion(completion_id: str, tenant: str = Depends(door)) -> dict[str, Any]:
        """Forgets a stored chat completion, with what it answers; one that runs is cancelled."""
        await _stored(pod, tenant, completion_id)
        queue, _ = await find(pod, tenant, completion_id, "chat")
        await queue.erase(completion_id)
        await pod.store.remove(tenant, completion_id)
        return {"object": "chat.completion.deleted", "id": completion_id, "deleted": True}

    @routes.post(ADDRESS + "/{completion_id}/cancel")
    async def cancel_chat_completion(completion_id: str, tenant: str = Depends(door)) -> dict[str, str]:
        """Ends a chat completion, whoever reads it; says what it ended with, now or before."""
        found = await end(pod, tenant, completion_id)
        error = found.finish and found.finish.error
        status = "completed" if not error else "cancelled" if error == "cancelled" else "failed"
        return {"id": completion_id, "object": "chat.completion", "status": status}

    return routes


async def end(pod: Pod, tenant: str, completion_id: str) -> Found:
    """Cancels what still runs, and says how it stands then."""
    queue, found = await find(pod, tenant, completion_id, "chat")
    if found.finish is None:
        await queue.cancel(completion_id)
        _, found = await find(pod, tenant, completion_id, "chat")
    return found


def asked_from(stream: str | None, starting_after: str | None, last_event_id: str | None) -> tuple[bool, int]:
    """Whether a stream is wanted, and behind which of its events. Raises InvalidValue."""
    if stream not in FLAGS:
        raise InvalidValue("stream is true or false.", param="stream")
    if starting_after is not None and not FLAGS[stream]:
        raise InvalidValue("starting_after is only allowed when stream is true.", param="starting_after")
    return FLAGS[stream], (position(last_event_id, "Last-Event-ID") if starting_after is None else
                           position(starting_after, "starting_after"))


def page_size(limit: str | None, *, default: int = DEFAULT_LISTED, most: int = MAX_LISTED) -> int:
    """Raises InvalidValue."""
    if limit is None:
        return default
    if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= most):
        raise InvalidValue(f"limit is a number from 1 to {most}.", param="limit")
    return int(limit)


def is_newest_first(order: str | None, *, default: str) -> bool:
    """Raises InvalidValue."""
    if order not in (None, "asc", "desc"):
        raise InvalidValue("order is asc or desc.", param="order")
    return (order or default) == "desc"


def page_of(items: list[dict[str, Any]], after: str | None, limit: int, *, newest_first: bool) -> dict[str, Any]:
    """A part of a list that is known whole. Raises InvalidValue when nothing in it has the id `after`."""
    ordered = items[::-1] if newest_first else items
    if after is not None:
        places = [place for place, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidValue("after is no id of this list.", param="after")
        ordered = ordered[places[0] + 1:]
    page = ordered[:limit]
    return {"object": "list", "data": page, "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None, "has_more": len(ordered) > limit}


async def _stored(pod: Pod, tenant: str, completion_id: str) -> Record:
    record = await pod.store.get(tenant, completion_id)
    if record is None or record.language != "chat":
        raise CompletionNotFound
    return record


async def _body(pod: Pod, tenant: str, record: Record) -> bytes | None:
    """None: it runs, has failed, or is kept no longer."""
    try:
        return _described(await whole(pod, *await find(pod, tenant, record.id, "chat")), record)
    except (NotFound, CompletionInProgress, JobEnded):
        return None


def _described(body: bytes, record: Record | None) -> bytes:
    return body if record is None else body[:-1] + b',"metadata":%b}' % dump(record.metadata)


def _json(body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, media_type="application/json", headers=headers)
