"""Where deleted objects stood in their lists, kept for a while: who lists and deletes in turn goes on behind them.

It knows no objects, only ids and when each was made.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from shared.keys import tenant_key

REMEMBERED_S = 600.0                                    # far longer than a client takes over one page

List = Literal["completions", "files"]


async def remember(redis: Redis, tenant: str, of: List, member: str, created_ms: int) -> None:
    """To be called before the deletion. A full Redis remembers nothing, and has room after it."""
    with suppress(OutOfMemoryError):
        await redis.set(_key(tenant, of, member), created_ms, px=round(REMEMBERED_S * 1000))


async def created_ms(redis: Redis, tenant: str, of: List, member: str) -> int | None:
    """When it was made; None if it was never in the list, or is not remembered any more."""
    found = await redis.get(_key(tenant, of, member))
    return None if found is None else int(found)


def _key(tenant: str, of: List, member: str) -> str:
    return tenant_key(tenant, f"deleted:{of}:{member}")
