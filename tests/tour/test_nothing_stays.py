"""Answers that have ended and expired leave nothing, in Redis or in a process. The long form is tests/bench/soak.py."""

from __future__ import annotations

from pathlib import Path

from deploy.redis import RedisServer
from tests.bench.soak import soak
from tests.nursery import Nursery

NUM_FIRST, NUM_JOBS = 100, 400


def test_jobs_that_have_ended_leave_nothing(nursery: Nursery, tmp_path: Path) -> None:
    """Redis and the processes are where they were."""
    redis = RedisServer(tmp_path / "redis").start()
    try:
        before, after = soak(NUM_FIRST, NUM_JOBS, tmp_path, redis.url, nursery.start)
        assert list(before.grown_to(after)) == [], f"{before} became {after}"
    finally:
        redis.stop()
