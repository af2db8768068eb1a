"""The conversation that a request for a response continues: a stored response's, or items of stored responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from api.pod import Pod
from api.resume import find_stored, whole, without_logprobs
from api.wire.items import is_reference, listed, response_of
from shared.errors import CompletionInProgress, InvalidValue, ItemNotFound, NotFound, PreviousResponseNotFound

MAX_REFERENCED = 256                                    # responses to whose items one request refers

Items = list[dict[str, Any]]


async def before(pod: Pod, tenant: str, response_id: str | None) -> Items:
    """The conversation that a stored response ended. Raises PreviousResponseNotFound, or CompletionInProgress."""
    if response_id is None:
        return []
    try:
        asked, answered = await _said(pod, tenant, response_id)
    except NotFound:
        raise PreviousResponseNotFound(param="previous_response_id") from None
    return asked + answered


async def resolved(pod: Pod, tenant: str, items: Sequence[dict[str, Any]]) -> Items:
    """The items, those to which others refer in their place. Raises ItemNotFound, CompletionInProgress or
    InvalidValue."""
    known: dict[str, dict[str, dict[str, Any]]] = {}    # of each response, by their ids

    async def found(item_id: str) -> dict[str, Any]:
        response_id = response_of(item_id)
        if response_id is None:
            raise ItemNotFound(param="input")
        if response_id not in known:
            if len(known) == MAX_REFERENCED:
                raise InvalidValue(f"At most {MAX_REFERENCED} responses can be referred to.", param="input")
            known[response_id] = await _by_id(pod, tenant, response_id)
        if item_id not in known[response_id]:
            raise ItemNotFound(param="input")
        return known[response_id][item_id]

    return [await found(item["id"]) if is_reference(item) else item for item in items]


async def _by_id(pod: Pod, tenant: str, response_id: str) -> dict[str, dict[str, Any]]:
    try:
        asked, answered = await _said(pod, tenant, response_id)
    except NotFound:
        raise ItemNotFound(param="input") from None
    return {item["id"]: item for item in [*listed(asked, response_id), *answered]}


async def _said(pod: Pod, tenant: str, response_id: str) -> tuple[Items, Items]:
    """What was asked and answered. Raises NotFound, or CompletionInProgress."""
    record, queue, found = await find_stored(pod, tenant, response_id, "responses")
    if found.finish is None:
        raise CompletionInProgress
    response = json.loads(await whole(pod, queue, without_logprobs(found), record.asked))
    return list(record.items), response["output"]
