"""`baton jobs` as an operator types it, against a real Redis with jobs in every state."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from redis.asyncio import Redis

from shared.card import Announcement
from shared.job import Job
from shared.keys import DIRECTORY
from shared.queue import Queue
from tests.shared.test_queue import LIKE, SHARD, claim_one, delta, lose_lease, make_queue, submit
from tests.system import BATON, REPOSITORY


@pytest.fixture
async def queue(each_redis: Redis) -> Queue:
    await each_redis.hset(DIRECTORY, SHARD.id, Announcement(SHARD.id, ("a/{model}",), "card", 0).encode())
    return make_queue(each_redis)


@pytest.fixture
def url(each_redis_url: str) -> str:
    return each_redis_url


def jobs(url: str, *arguments: str, code: int = 0) -> str:
    done = subprocess.run([*BATON, "jobs", *arguments, "--redis-url", url], capture_output=True, text=True,
                          cwd=REPOSITORY, env={"COLUMNS": "200", "PATH": ""}, timeout=60, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


async def bury(queue: Queue) -> Job:
    """A job that three workers died of."""
    job = await submit(queue)
    for attempt in range(3):
        assert (await queue.claim(f"w{attempt}", 1, 8, **LIKE)).jobs
        await lose_lease(queue)
        await queue.reap()
    return job


async def test_jobs_are_listed_shown_and_cancelled(queue: Queue, url: str) -> None:
    running = await submit(queue)
    claimed = await claim_one(queue)
    await queue.publish("w1", [delta(claimed, 1)])
    queued = await submit(queue)
    listed = jobs(url)
    assert "a/{model}: 1 queued, 1 running" in listed
    (row,) = [line for line in listed.splitlines() if running.id in line]
    assert "running" in row and "w1" in row
    assert queued.id in listed
    assert "running" in jobs(url, "show", running.id)
    assert "is cancelled" in jobs(url, "cancel", running.id)
    assert "had ended: cancelled" in jobs(url, "cancel", running.id)
    assert running.id not in jobs(url)


async def test_a_running_job_is_put_back_in_line(queue: Queue, url: str) -> None:
    job = await submit(queue)
    await claim_one(queue)
    assert "back in line" in jobs(url, "requeue", job.id)
    assert (await queue.describe(job.id))["state"] == "queued"
    assert "does not run" in jobs(url, "requeue", job.id, code=2)


async def test_a_dead_letter_is_read_and_submitted_again(queue: Queue, url: str) -> None:
    job = await bury(queue)
    assert job.id in jobs(url, "dead")
    said = jobs(url, "requeue", job.id)
    (again,) = (await queue.claim("w9", 1, 8, **LIKE)).jobs
    assert again.job.id in said and again.job.id != job.id
    assert again.job.prompt_token_ids == job.prompt_token_ids


async def test_what_is_not_there_is_said_in_one_line(queue: Queue, url: str, tmp_path: Path) -> None:
    assert "is no completion id" in jobs(url, "show", "chatcmpl-nonsense", code=2)
    unknown = f"chatcmpl-{SHARD.id}-{'0' * 32}"
    for action in ("show", "cancel", "requeue"):
        assert "there is no job" in jobs(url, action, unknown, code=2)
    assert "no Redis answers" in jobs(f"unix://{tmp_path}/none", code=2)
