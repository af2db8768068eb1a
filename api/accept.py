"""Acceptance: a request becomes a job in line, and a stream that hears of it; under a key, once for all who ask.

It knows neither HTTP nor what stands in a log.
"""

from __future__ import annotations

from dataclasses import replace

from api.delivered import Delivered
from api.directory import Served
from api.idempotency import UNSUBMITTED_S, Reservation
from api.pod import Pod
from api.relay import Stream
from api.submit import Order, make_job
from api.wire.languages import ID_KINDS
from shared.errors import APIError, Overloaded
from shared.job import Header
from shared.keys import new_completion_id


async def submit(pod: Pod, served: Served, order: Order, completion_id: str) -> tuple[Stream, Header]:
    """Listens, then submits. Raises what make_job does, or Overloaded with the time at which the line has moved."""
    pod.limits.check_memory()
    wanted_s = order.retain_s or (pod.settings.store_s if order.record else pod.settings.retain_s)
    job, header = await make_job(order, served, completion_id, pod_id=pod.id, settings=pod.settings,
                                 retain_s=pod.limits.retain_s(wanted_s))
    if order.record:
        await pod.store.put(order.tenant, replace(order.record, id=job.id))
    queue = served.queue                                # whoever found it has had the relay listen to its shard
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


def new_id(served: Served, order: Order) -> str:
    return new_completion_id(served.queue.shard, ID_KINDS[order.language])


async def submit_once(pod: Pod, served: Served, order: Order, key: str, body: bytes) -> str:
    """As submit, under a key: the id of the completion that it stands for, which is in line, runs or has ended.

    A second request submits too, for the first may have died before it did: submit is idempotent by job id.
    """
    what = order.tenant, key, order.language, body
    reservation = await pod.reservations.reserve(*what, new_id(served, order))
    if not await _is_known(pod, reservation):
        if reservation.age_s > UNSUBMITTED_S or await _is_erased(pod, reservation):
            # Its answer is not kept any more. Another one has another id: the key begins anew.
            await pod.reservations.give_back(reservation)
            reservation = await pod.reservations.reserve(*what, new_id(served, order))
        await _submit_reserved(pod, served, order, reservation)
    return reservation.completion_id


async def _submit_reserved(pod: Pod, served: Served, order: Order, reservation: Reservation) -> None:
    queue = pod.directory.queue(reservation.shard)
    try:
        stream, _ = await submit(pod, replace(served, queue=queue), order, reservation.completion_id)
    except APIError:
        if reservation.is_ours:
            await pod.reservations.give_back(reservation)
        raise
    pod.relay.close(stream)                             # who asked reads the log from its start, as all who come later


async def _is_erased(pod: Pod, reservation: Reservation) -> bool:
    return not reservation.is_ours and await pod.directory.queue(reservation.shard).is_erased(reservation.completion_id)


async def _is_known(pod: Pod, reservation: Reservation) -> bool:
    queue = pod.directory.queue(reservation.shard)
    return not reservation.is_ours and await queue.find(reservation.completion_id) is not None
