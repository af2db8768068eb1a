"""The Lua scripts of what is kept by tenant: files, batches, stored requests, Idempotency-Keys. Those of jobs are
shared/queue.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redis.asyncio import Redis

LUA = Path(__file__).parent / "lua"


def register(redis: Redis, name: str) -> Any:
    """A script to call with keys and args, all in one tenant's slot."""
    return redis.register_script((LUA / f"{name}.lua").read_text())
