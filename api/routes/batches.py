"""`/v1/batches`: many requests in one file, answered within a day, behind all that somebody waits for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from api import docs
from api.auth import Door
from api.pod import Pod
from api.respond import read_body
from api.routes.listing import After, Limit, page_size
from api.wire.batches import Batch, can_be_cancelled, parse_batch
from shared.errors import BatchOver, Draining, InvalidValue, NoSuchFile

ADDRESS = "/v1/batches"


def router(pod: Pod, door: Door) -> APIRouter:
    routes = APIRouter()

    @routes.post(ADDRESS, openapi_extra=docs.says(takes="BatchRequest", gives="BatchObject"))
    async def create_batch(request: Request, tenant: str = Depends(door)) -> dict[str, Any]:
        """Begins a batch; its lines are checked first."""
        asked = parse_batch(await read_body(pod, request), pod.settings.file_s)
        if pod.draining:
            raise Draining(retry_after_s=0.1)
        pod.limits.check_memory()
        try:
            file = await pod.files.get(tenant, asked.input_file_id)
            if file.purpose != "batch":
                raise InvalidValue("The purpose of an input file is batch.", param="input_file_id")
            return (await pod.batches.create(tenant, asked)).body()
        except NoSuchFile:
            raise NoSuchFile(param="input_file_id") from None

    @routes.get(ADDRESS, openapi_extra=docs.says(gives="Page"))
    async def list_batches(after: After = None, limit: Limit = None, tenant: str = Depends(door)) -> dict[str, Any]:
        """The batches of the key, the newest first."""
        batches, has_more = await pod.batches.page(tenant, after=after, limit=page_size(limit))
        bodies = [batch.body() for batch in batches]
        return {"object": "list", "data": bodies, "first_id": bodies[0]["id"] if bodies else None,
                "last_id": bodies[-1]["id"] if bodies else None, "has_more": has_more}

    @routes.get(ADDRESS + "/{batch_id}", openapi_extra=docs.says(gives="BatchObject"))
    async def retrieve_batch(batch_id: str, tenant: str = Depends(door)) -> dict[str, Any]:
        """How far a batch has come."""
        return (await pod.batches.get(tenant, batch_id)).body()

    @routes.post(ADDRESS + "/{batch_id}/cancel", openapi_extra=docs.says(gives="BatchObject"))
    async def cancel_batch(batch_id: str, tenant: str = Depends(door)) -> dict[str, Any]:
        """Ends a batch. What is answered by then stays in its output file."""
        return (await _cancelled(pod, await pod.batches.get(tenant, batch_id))).body()

    return routes


async def _cancelled(pod: Pod, batch: Batch) -> Batch:
    """Raises BatchOver."""
    while can_be_cancelled(batch):
        await pod.batches.advance(batch, "cancelling")  # unless it has come further meanwhile
        batch = await pod.batches.get(batch.tenant, batch.id)
    if batch.status not in ("cancelling", "cancelled"):
        raise BatchOver
    return batch
