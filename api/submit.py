"""Acceptance: a request becomes a queued job, and a stream that follows it; under a key once, however often requested.

It knows neither HTTP nor the contents of a log.
"""

from __future__ import annotations

from dataclasses import replace

from api.delivered import Delivered
from api.directory import Served
from api.idempotency import UNSUBMITTED_S, Reservation
from api.jobs import Order, make_job
from api.pod import Pod
from api.relay import Stream
from api.wire.languages import ID_KINDS
from shared.errors import APIError, Cancelled, Overloaded
from shared.job import Header
from shared.keys import new_completion_id
from shared.queue import Found, Queue


async def submit(pod: Pod, served: Served, order: Order, completion_id: str) -> tuple[Stream, Header]:
    """Subscribes, then submits. Raises the errors of make_job, or Overloaded with the time after which to retry."""
    pod.limits.check_memory()
    job, header = await make_job(order, served, completion_id, pod_id=pod.id, settings=pod.settings,
                                 retain_s=pod.limits.retain_s(retain_s(pod, order)))
    if order.record:
        await pod.store.put(order.tenant, replace(order.record, id=job.id))
        if header.logprobs:
            await pod.cards.keep(served)
    queue = served.queue                                # the directory has subscribed to its shard
    stream = pod.relay.open(job.id, queue, Delivered(job, header.encode()))
    try:
        await queue.submit(job, header)
    except Overloaded as refusal:
        pod.relay.close(stream)
        if order.record:
            await pod.store.remove(order.tenant, job.id)
        refusal.retry_after_s = await pod.limits.retry_after_s(queue.shard.id)
        raise
    except BaseException:
        pod.part(stream)                                # it may have been accepted
        raise
    return stream, header


def retain_s(pod: Pod, order: Order) -> float:
    """How long to keep the log of an answer, if Redis has room."""
    return order.retain_s or (pod.settings.store_s if order.record else pod.settings.retain_s)


def new_id(served: Served, order: Order) -> str:
    return new_completion_id(served.queue.shard, ID_KINDS[order.language])


async def submit_once(pod: Pod, served: Served, order: Order, key: str, body: bytes, *, goes_on: bool = False) -> str:
    """As submit, under a key: the id of the completion to which the key refers, which is queued, runs or has ended.

    A repeated request submits too, since the first may have failed before it did: submit is idempotent by job id. If
    the answer has expired, or was cancelled because its client had left, the key starts a new completion with a new id;
    in the latter case unless the client `goes_on` after the events that it has.
    """
    what = order.tenant, key, order.language, body, retain_s(pod, order)
    reservation = await pod.reservations.reserve(*what, new_id(served, order))
    found = None if reservation.is_ours else await _find(pod, reservation)
    is_over = not reservation.is_ours and (
        found.finish is not None and found.finish.error == Cancelled.code and not goes_on if found else
        reservation.age_s > UNSUBMITTED_S or await _queue(pod, reservation).is_erased(reservation.completion_id))
    if is_over:
        await pod.reservations.give_back(reservation)
        reservation = await pod.reservations.reserve(*what, new_id(served, order))
    if is_over or found is None:
        await _submit_reserved(pod, served, order, reservation)
    return reservation.completion_id


async def _submit_reserved(pod: Pod, served: Served, order: Order, reservation: Reservation) -> None:
    queue = _queue(pod, reservation)
    try:
        stream, _ = await submit(pod, replace(served, queue=queue), order, reservation.completion_id)
    except APIError:
        if reservation.is_ours and await _find(pod, reservation) is None:       # else another request has submitted it
            await pod.reservations.give_back(reservation)
        raise
    pod.relay.close(stream)                             # every request reads the log from its start


def _queue(pod: Pod, reservation: Reservation) -> Queue:
    return pod.directory.queue(reservation.shard)


async def _find(pod: Pod, reservation: Reservation) -> Found | None:
    return await _queue(pod, reservation).find(reservation.completion_id)
