"""Shared by routes that show stored objects: lists in pages, and streams that resume after an event."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Header, Query

from api.resume import position
from shared.errors import NOT_LISTED, InvalidValue

FLAGS = {None: False, "false": False, "0": False, "true": True, "1": True}
MAX_LISTED = 100
DEFAULT_LISTED = 20

WantsStream = Annotated[str | None, Query(description="true: server-sent events, also while it runs")]
StartingAfter = Annotated[str | None, Query(description="number of the last event that you have")]
LastEventID = Annotated[str | None, Header(description="as starting_after, which wins")]
After = Annotated[str | None, Query(description="id of the last one that you have")]
Limit = Annotated[str | None, Query(description=f"1 to {MAX_LISTED}; else {DEFAULT_LISTED}")]
Sorting = Annotated[str | None, Query(description="asc: the oldest first; desc: the newest")]


def asked_from(stream: str | None, starting_after: str | None, last_event_id: str | None) -> tuple[bool, int | None]:
    """Whether a stream is wanted, and after which of its events. Raises InvalidValue."""
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
    """A page of a list that is known in full. Raises InvalidValue when no item has the id `after`."""
    ordered = items[::-1] if newest_first else items
    if after is not None:
        places = [place for place, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidValue(NOT_LISTED, param="after")
        ordered = ordered[places[0] + 1:]
    page = ordered[:limit]
    return {"object": "list", "data": page, "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None, "has_more": len(ordered) > limit}
