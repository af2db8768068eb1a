"""One line of a batch, from its request to its result: a job like others, queued behind all interactive ones.

An error of the request is its result; an error of the service is waited out. It knows nothing of files, nor of which
pod runs a batch.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import NamedTuple

from api.delivered import Delivered
from api.directory import Served
from api.jobs import Order
from api.pod import Pod
from api.relay import Stream
from api.resume import attend, join, token_bytes, whole
from api.submit import submit
from api.wire.batches import Batch, digits_of
from api.wire.fold import TokenBytes, WholeFold, dump
from api.wire.languages import ID_KINDS, whole_fold
from api.wire.lines import ENDPOINTS, GivenUp, Line, Result, answered, given_up, refused
from shared import connection
from shared.errors import (
    APIError,
    BadRequest,
    DeadlineExceeded,
    Draining,
    ModelNotFound,
    NotFound,
    NoWorker,
    Overloaded,
    StreamLost,
    Unavailable,
    job_error,
)
from shared.job import Header
from shared.keys import completion_id, shard_of
from shared.queue import Queue

log = logging.getLogger(__name__)

PRIORITY = 1                                            # behind interactive jobs
RETRY_S = 1.0
LATE_S = 60.0                                           # the time of a batch ends before the deadline of its jobs


class Asked(NamedTuple):
    result: Result
    job_id: str | None = None                           # None: no job was submitted


async def run(pod: Pod, batch: Batch, line: Line) -> None:
    """Runs until the line has a result, from this pod or another. Raises errors of Redis."""
    while True:
        try:
            asked = await _ask(pod, batch, line)
            break
        except (Overloaded, Unavailable) as busy:
            pause_s = busy.retry_after_s or RETRY_S
        except (StreamLost, DeadlineExceeded):          # Redis has lost the log, or stays unreachable
            pause_s = RETRY_S
        except connection.TROUBLE:
            raise
        except Exception:                               # a bug of ours costs one line, as it costs one request
            log.exception("line %d of %s failed", line.number, batch.id)
            asked = Asked(refused(line, digits_of(batch.id, line.number), APIError()))
            break
        await asyncio.sleep(pause_s * random.uniform(0.75, 1.25))
    if asked:
        await _record(pod, batch, line, asked)


async def close(pod: Pod, batch: Batch, line: Line, job_id: str | None, code: GivenUp) -> None:
    """Cancels the job of a line and records the line's result: the job's answer if it had ended, else `code`."""
    result = given_up(line, digits_of(batch.id, line.number), code)
    if job_id:
        queue = _queue(pod, job_id)
        await queue.cancel(job_id)
        result = await _ended(pod, queue, batch, line, job_id) or result
    await _record(pod, batch, line, Asked(result, job_id))


async def _record(pod: Pod, batch: Batch, line: Line, asked: Asked) -> None:
    """Keeps the log of an answer until its result is recorded, and no longer."""
    await pod.batches.record(batch, line.number, asked.result)
    if asked.job_id:
        await drop(pod, asked.job_id)


async def drop(pod: Pod, job_id: str) -> None:
    """Erases a job whose answer is no longer needed, running or not."""
    await _queue(pod, job_id).erase(job_id)


async def _ended(pod: Pod, queue: Queue, batch: Batch, line: Line, job_id: str) -> Result | None:
    found, digits = await queue.find(job_id), digits_of(batch.id, line.number)
    if found is None:
        return None
    if found.finish is None or found.finish.error == "cancelled":
        return None
    if found.finish.error:
        return refused(line, digits, job_error(found.finish.error))
    try:
        asked = ENDPOINTS[batch.endpoint].parse(dump(line.body), pod.settings.max_messages).asked
        return answered(line, digits, await whole(pod, queue, found, asked))
    except APIError:                                    # the answer can no longer be rendered
        return None


async def _ask(pod: Pod, batch: Batch, line: Line) -> Asked | None:
    """Submits or finds the line's job; None when there is a result already. Raises errors that may pass."""
    digits, endpoint = digits_of(batch.id, line.number), ENDPOINTS[batch.endpoint]
    body = dump(line.body)
    try:
        request, asked = endpoint.parse(body, pod.settings.max_messages)
        served = await _find(pod, batch, request.model)
        job_id = completion_id(served.queue.shard, digits, ID_KINDS[endpoint.language])
        rest_s = max(batch.expires_s - time.time(), 0) + LATE_S
        order = Order(request, batch.tenant, len(body), endpoint.language, is_unread=True, priority=PRIORITY,
                      deadline_s=rest_s, retain_s=rest_s)
        allotted = await pod.batches.allot(batch, line.number, job_id)
        if allotted is None:
            return None
        try:
            async with _stream(pod, served, order, allotted) as (stream, header, tokens):
                fold = whole_fold(stream.job_id, header, tokens, asked)
                return Asked(await _read(stream, fold, line, digits), allotted)
        except StreamLost:
            if await _queue(pod, allotted).find(allotted) is None:
                await drop(pod, allotted)               # its remains would block another attempt
            raise
    except (BadRequest, NotFound) as refusal:
        return Asked(refused(line, digits, refusal))


async def _find(pod: Pod, batch: Batch, model: str) -> Served:
    """A model that was served when the batch began may be served again: it is waited for."""
    try:
        return await pod.directory.find(model)
    except ModelNotFound:
        if model in batch.models:
            raise NoWorker(retry_after_s=RETRY_S) from None
        raise


@asynccontextmanager
async def _stream(pod: Pod, served: Served, order: Order, job_id: str
                  ) -> AsyncIterator[tuple[Stream, Header, TokenBytes]]:
    """The answer of a job that a pod which is gone may have submitted."""
    queue = _queue(pod, job_id)
    await pod.relay.hear(queue.shard)
    found = await queue.find(job_id)
    if found:
        tokens = await token_bytes(pod, found)
        stream, header = await join(pod, queue, found), found.header
    else:
        tokens = served.tokenizer.token_bytes
        stream, header = await submit(pod, replace(served, queue=queue), order, job_id)
    try:
        if not found:
            await attend(pod, stream)                   # it needs no reader, so it is pushed to no pod yet
        stream.delivered = Delivered()                  # no client has seen any of it: what is lost is computed again
        yield stream, header, tokens
    finally:
        pod.relay.close(stream)


async def _read(stream: Stream, fold: WholeFold, line: Line, digits: str) -> Result:
    """Raises Draining when the pod stops, and the errors of the relay."""
    async for entries in stream.batches():
        for entry in entries:
            if entry.kind == "end" and (error := entry.finish.error):
                return refused(line, digits, job_error(error))
            fold.feed(entry)
        if fold.ended:
            return answered(line, digits, fold.body())
    raise Draining(retry_after_s=RETRY_S)


def _queue(pod: Pod, job_id: str) -> Queue:
    shard = shard_of(job_id)
    assert shard, "jobs of lines have ids like others"
    return pod.directory.queue(shard)
