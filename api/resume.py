"""Resumes an answer on any pod: found by its id, folded again from the start of its log, sent from a position on.

A position is the ordinal of an event, and every pod counts events alike. It knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from api.delivered import Delivered
from api.pod import Pod
from api.relay import Stream
from api.stored import Record
from api.wire.fold import FOLD_VERSIONS, EventFold, TokenBytes
from api.wire.languages import Asked, event_fold, num_events_until, whole_fold
from shared.errors import (
    CompletionInProgress,
    CompletionNotFound,
    InvalidValue,
    NotFound,
    NoWorker,
    PositionNotReached,
    ResponseNotFound,
    StreamLost,
    Unavailable,
    job_error,
)
from shared.job import Language
from shared.keys import shard_of
from shared.queue import Behind, Found, Queue

MAX_POSITION_DIGITS = 15
RETRY_S = 1.0                                           # until a running answer may have ended, or reached a position


async def find(pod: Pod, tenant: str, completion_id: str, language: Language) -> tuple[Queue, Found]:
    """The shard and the state of an answer. Raises NotFound, also for another tenant or another API."""
    shard = shard_of(completion_id)
    # The id may be invented: its queue is not cached yet.
    found = await Queue(pod.redis, shard, pod.settings).find(completion_id) if shard else None
    if shard is None or found is None or found.tenant != tenant or found.header.language != language:
        raise ResponseNotFound if language == "responses" else CompletionNotFound
    return pod.directory.queue(shard), found


async def find_stored(pod: Pod, tenant: str, completion_id: str, language: Language) -> tuple[Record, Queue, Found]:
    """Also what was asked. Removes the record if the answer has expired. Raises NotFound."""
    record = await pod.store.get(tenant, completion_id)
    if record is None or record.language != language:
        raise ResponseNotFound if language == "responses" else CompletionNotFound
    try:
        return record, *await find(pod, tenant, completion_id, language)
    except NotFound:
        if record.is_settled:
            await pod.store.remove(tenant, completion_id)
        raise


def position(text: str | None, param: str) -> int | None:
    """The position of the client's last event. Raises InvalidValue when the text is not a position."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_POSITION_DIGITS):
        raise InvalidValue("A position is the number of an event, as its id: line says.", param=param)
    return int(text)


async def whole(pod: Pod, queue: Queue, found: Found, asked: Asked | None = None) -> bytes:
    """An answer as one object. If it failed or still runs, raises its JobEnded or CompletionInProgress, unless its API
    can express that in an object. Raises NoWorker as `token_bytes` does."""
    fold = whole_fold(found.job_id, found.header, await token_bytes(pod, found), asked)
    if found.finish is None and not fold.tells_halves:
        raise CompletionInProgress(retry_after_s=RETRY_S)
    with _kept_until_now(found):
        for entry in await queue.read(found.job_id):
            fold.feed(entry)
    return fold.body()


@contextmanager
def _kept_until_now(found: Found) -> Iterator[None]:
    """Turns StreamLost of a finished answer into CompletionNotFound: its log has expired since it was found."""
    try:
        yield
    except StreamLost:
        if found.finish:
            raise CompletionNotFound from None
        raise


async def join(pod: Pod, queue: Queue, found: Found) -> Stream:
    """A stream of an answer, from its start."""
    await pod.relay.hear(queue.shard)
    stream = pod.relay.open(found.job_id, queue, Delivered(found.job, found.header.encode()))
    try:
        await attend(pod, stream)
    except BaseException:
        pod.relay.close(stream)
        raise
    return stream


async def follow(pod: Pod, queue: Queue, found: Found, after: int | None, asked: Asked | None = None
                 ) -> tuple[Stream, EventFold, bytes]:
    """A stream that continues after event `after`, its fold, and the events that exist already.

    Raises PositionNotReached or InvalidValue when there is no such event. After the last event it is empty; after an
    error event, that error is raised.
    """
    fold = event_fold(found.job_id, found.header, await token_bytes(pod, found), asked,
                      after=num_events_until(found.header.language, after))
    await pod.relay.hear(queue.shard)
    stream = pod.relay.open(found.job_id, queue, Delivered(found.job, found.header.encode()))
    try:
        with _kept_until_now(found):
            said = await _catch_up(stream, fold)
        if not fold.ended:
            await attend(pod, stream)                  # only now: a refused request was no reader
    except BaseException:
        pod.relay.close(stream)
        raise
    return stream, fold, said


async def attend(pod: Pod, stream: Stream) -> None:
    await stream.queue.attend(pod.id, [stream.job_id])
    stream.look()                                       # for entries from before the pod was pushed to


async def _catch_up(stream: Stream, fold: EventFold) -> bytes:
    """Reads until there are events to send; the rest arrives as in any stream."""
    said = b""
    while not (said or fold.ended):
        try:
            entries = await stream.read()
        except Behind:                                  # Redis has lost what we just read: it is being restored
            raise PositionNotReached(retry_after_s=RETRY_S) from None
        if not entries:
            break
        said = b"".join(map(fold.feed, entries))
    if fold.num_events < fold.after:
        if fold.ended:
            raise InvalidValue("The completion has fewer events than this.", param="starting_after")
        raise PositionNotReached(retry_after_s=RETRY_S)
    error = entries[-1].finish.error if fold.ended and not said else None
    if error and not fold.tells_failures:
        raise job_error(error)
    return said


def without_logprobs(found: Found) -> Found:
    """The answer as it would be read had they not been requested: no tokenizer is needed."""
    return replace(found, header=replace(found.header, logprobs=False))


async def token_bytes(pod: Pod, found: Found) -> TokenBytes:
    """For log probabilities. Raises NoWorker when they are requested, no worker announces the tokenizer, and no card is
    kept."""
    if found.header.fold_version not in FOLD_VERSIONS:
        raise Unavailable(retry_after_s=RETRY_S)        # an answer of another release, whose pods count its events
    if not found.header.logprobs:
        return lambda _: b""
    shard, tokenizer_id = shard_of(found.job_id), found.header.tokenizer_id
    assert shard, "only what has an id like others is found"
    try:
        return (await pod.directory.tokenizer(found.header.model, tokenizer_id)).token_bytes
    except NoWorker:
        if kept := await pod.cards.tokenizer(shard, tokenizer_id):
            return kept.token_bytes
        raise
