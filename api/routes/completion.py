"""`/v1/chat/completions/{id}`: an answer that was begun before, whole, from a position on, or cancelled."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Response

from api import docs
from api.auth import Door
from api.pod import Pod
from api.resume import find, follow, position, whole
from api.sse import COMPLETION_ID, EventStream
from shared.errors import Draining, InvalidValue

FLAGS = {None: False, "false": False, "0": False, "true": True, "1": True}


def router(pod: Pod, door: Door) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/chat/completions/{completion_id}", openapi_extra=docs.COMPLETION)
    async def retrieve_chat_completion(
        completion_id: str,
        stream: Annotated[str | None, Query(description="true: server-sent events, also while it runs")] = None,
        starting_after: Annotated[str | None, Query(description="number of the last event that you have")] = None,
        last_event_id: Annotated[str | None, Header(description="as starting_after, which wins")] = None,
        tenant: str = Depends(door),
    ) -> Response:
        """A chat completion that was begun before: the whole, once it is finished, or a stream from an event on."""
        if stream not in FLAGS:
            raise InvalidValue("stream is true or false.", param="stream")
        if starting_after is not None and not FLAGS[stream]:
            raise InvalidValue("starting_after is only allowed when stream is true.", param="starting_after")
        after = (position(last_event_id, "Last-Event-ID") if starting_after is None else
                 position(starting_after, "starting_after"))
        queue, found = await find(pod, tenant, completion_id)
        headers = {COMPLETION_ID: found.job_id}
        if not FLAGS[stream]:
            return Response(await whole(pod, queue, found), media_type="application/json", headers=headers)
        if pod.draining:
            raise Draining(retry_after_s=0.1)
        reader, fold, said = await follow(pod, queue, found, after)
        return EventStream(reader, fold, headers, said=said, on_close=partial(pod.part, reader))

    @routes.post("/v1/chat/completions/{completion_id}/cancel")
    async def cancel_chat_completion(completion_id: str, tenant: str = Depends(door)) -> dict[str, str]:
        """Ends a chat completion, whoever reads it; says what it ended with, now or before."""
        queue, found = await find(pod, tenant, completion_id)
        if found.finish is None:
            await queue.cancel(completion_id)
            _, found = await find(pod, tenant, completion_id)
        error = found.finish and found.finish.error
        status = "completed" if not error else "cancelled" if error == "cancelled" else "failed"
        return {"id": completion_id, "object": "chat.completion", "status": status}

    return routes
