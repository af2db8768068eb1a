"""The relay: delivers what is pushed to this pod to the streams that wait for it, in order, no gaps, no repeats.

A push is a hint, the log is the truth: an entry that follows the last one is accepted, an older one dropped, and
whatever is missing is read from the log. If the log lacks what was delivered, Redis has lost it, and it is restored. It
knows nothing of HTTP, nor of what entries mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from itertools import chain
from typing import Any

from api.delivered import Delivered, Room
from shared import connection
from shared.errors import DeadlineExceeded, StreamLost, Unavailable, job_error
from shared.job import Entry
from shared.keys import Shard
from shared.queue import Behind, Queue, parse_push
from shared.settings import Settings

log = logging.getLogger(__name__)

ATTEND_S = 1.0                                          # how often a pod renews its readers; far below reader_ttl_s
TICK_S = 0.1                                            # resolution of the silence timers
READ_LIMIT = 256                                        # entries per read of a log
READ_TIMEOUT_S = 2.0                                    # per read: no heartbeats are sent meanwhile
MAX_SWEEP_S = 10.0                                      # of silence, between reads: thousands may wait in the queue
LATE_S = 30.0                                           # after its deadline, for other processes to end a job
HEAR_TIMEOUT_S = 2.0


class Stream:
    """One request's view of its log. `batches()` gives every entry once, in order."""

    def __init__(self, job_id: str, queue: Queue, settings: Settings, delivered: Delivered) -> None:
        self.job_id = job_id
        self.queue = queue
        self.delivered = delivered
        self.last: Entry | None = None                  # the last one that `batches()` returned
        self.left = False                               # the client is gone, or the pod stops
        self.silent_s = 0.0                             # since entries arrived
        self.unsent_s = 0.0                             # since bytes went to the client, set by the sender
        self._settings = settings
        self._pending: list[Entry] = []
        self._behind = False                            # the log has entries that we lack
        self._given_up: str | None = None               # the error code of a terminal that was pushed
        self._sweep_at_s = settings.sweep_s             # the next sweep, in seconds of silence
        self._wake = asyncio.Event()

    def __repr__(self) -> str:
        position = self.last.position if self.last else 0
        return f"<Stream {self.job_id} at {position}, {len(self._pending)} pending, silent for {self.silent_s:.1f} s>"

    @property
    def has_ended(self) -> bool:
        """Whether all entries were returned."""
        return self.last is not None and self.last.kind == "end"

    def push(self, entry: Entry) -> None:
        """Accepts a pushed entry if it is the next one; else notes that the log must be read.

        An entry of another epoch is not accepted: Redis may hold older data, with a different past, so the log is read.
        """
        newest = self._pending[-1] if self._pending else self.last
        position = newest.position if newest else 0     # position 0, the header, is known before any push
        if entry.position <= position and (newest is None or entry.epoch == newest.epoch):
            return
        if entry.kind == "end":
            self._given_up = entry.finish.error
        is_next = entry.position == position + 1 and (not position or newest is None or entry.epoch == newest.epoch)
        if not is_next or len(self._pending) >= self._settings.max_pending_entries:
            self.look()
            return
        self._pending.append(entry)
        self._wake.set()

    def look(self) -> None:
        """Requests a read of the log: something may have been missed."""
        self._behind = True
        self._wake.set()

    def leave(self) -> None:
        self.left = True
        self._wake.set()

    def tick(self, passed_s: float) -> None:
        """Advances the timers. In silence the log is read, at `sweep_s` and then at growing intervals."""
        self.silent_s += passed_s
        self.unsent_s += passed_s
        if self.silent_s >= self._sweep_at_s:
            self._sweep_at_s = min(2 * self._sweep_at_s, self._sweep_at_s + MAX_SWEEP_S)
            self.look()
        if self.unsent_s >= self._settings.heartbeat_s:
            self._wake.set()

    async def batches(self) -> AsyncIterator[list[Entry]]:
        """Yields entries as they arrive; an empty batch is a heartbeat. Ends when the client has left.

        Raises StreamLost when the log is gone, DeadlineExceeded when Redis stays away.
        """
        while not self.left:
            await self._wake.wait()
            self._wake.clear()
            entries = self._take_pending()
            if self._behind and entries:
                self._wake.set()                        # first what we have: the log may be gone
            elif self._behind:
                entries = await self._read_missed()
            if entries:
                self.silent_s, self._sweep_at_s = 0.0, self._settings.sweep_s
                yield entries
            elif self.unsent_s >= self._settings.heartbeat_s:
                self.unsent_s = 0.0
                yield []

    def _take_pending(self) -> list[Entry]:
        entries, self._pending = self._pending, []
        self._take(entries)
        return entries

    def _take(self, entries: list[Entry]) -> None:
        self.last = entries[-1] if entries else self.last
        self.delivered.add(entries)

    async def _read_missed(self) -> list[Entry]:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                try:
                    return await self.read()
                except (StreamLost, Behind) as lost:
                    if self._given_up and isinstance(lost, StreamLost):
                        raise job_error(self._given_up) from None       # its log has expired: it was not lost
                    await self.delivered.put_back(self.queue)
                    log.warning("%r was restored: Redis had lost it", self)
                    self.look()
                    return []
        except (*connection.TROUBLE, TimeoutError):
            if self.silent_s > self._settings.request_deadline_s + LATE_S:
                raise DeadlineExceeded from None
            return []                                   # Redis is away: the next sweep reads again

    async def read(self) -> list[Entry]:
        """The next entries of the log. Entries pushed meanwhile are among them, or follow them."""
        self._behind = False
        missed = await self.queue.read(self.job_id, after=self.last, limit=READ_LIMIT)
        pushed, self._pending = self._pending, []
        self._take(missed)
        if missed:
            self.look()                                 # until nothing is missing; fences make a full read look short
        for entry in pushed:
            self.push(entry)
        return missed


class Relay:
    """All streams of one pod, fed by one subscription."""

    def __init__(self, pod_id: str, settings: Settings) -> None:
        self.pod_id = pod_id
        self.settings = settings
        self._streams: dict[str, set[Stream]] = {}      # by job id
        self._heard: dict[str, asyncio.Event] = {}      # channel → set once subscribed
        self._stopping = False
        self.room = Room()

    def __repr__(self) -> str:
        return f"<Relay {self.num_streams} streams, {len(self._heard)} shards>"

    @property
    def num_streams(self) -> int:
        return sum(map(len, self._streams.values()))

    def relays(self, job_id: str) -> bool:
        return job_id in self._streams

    async def hear(self, shard: Shard) -> None:
        """Subscribes to a shard before anything is submitted to it. Raises Unavailable when Redis is away."""
        subscribed = self._heard.setdefault(shard.key(f"push:{self.pod_id}"), asyncio.Event())
        try:
            async with asyncio.timeout(HEAR_TIMEOUT_S):
                await subscribed.wait()
        except TimeoutError:
            raise Unavailable(retry_after_s=1.0) from None

    def open(self, job_id: str, queue: Queue, delivered: Delivered) -> Stream:
        delivered.room = self.room
        stream = Stream(job_id, queue, self.settings, delivered)
        self._streams.setdefault(job_id, set()).add(stream)
        stream.left = self._stopping
        return stream

    def close(self, stream: Stream) -> None:
        stream.delivered.forget()
        readers = self._streams[stream.job_id]
        readers.discard(stream)
        if not readers:
            del self._streams[stream.job_id]

    def leave_all(self) -> None:
        """The pod stops: ends every running stream, and every stream opened later."""
        self._stopping = True
        for stream in self._all():
            stream.leave()

    def _all(self) -> Iterator[Stream]:
        return chain.from_iterable(self._streams.values())

    def chores(self) -> tuple[Coroutine[Any, Any, None], ...]:
        """What must run while there are streams, until cancelled."""
        return self._listen(), self._tick(), self._attend()

    async def _listen(self) -> None:
        async for channel, message in connection.listen(self.settings.redis_url, self._heard):
            if message is None:
                self._heard[channel].set()
                for stream in self._all():
                    stream.look()
                continue
            for job_id, entry in parse_push(message):
                for waiting in self._streams.get(job_id, ()):
                    waiting.push(entry)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        before = loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            now = loop.time()
            for stream in self._all():
                stream.tick(now - before)
            before = now

    async def _attend(self) -> None:
        """Renews the readers of the answers that this pod relays: about 2 µs of Redis per stream."""
        while True:
            await asyncio.sleep(ATTEND_S)
            jobs: dict[Queue, list[str]] = {}
            for job_id, streams in self._streams.items():
                jobs.setdefault(next(iter(streams)).queue, []).append(job_id)
            for (queue, job_ids), error in await connection.for_each(
                    jobs.items(), lambda item: item[0].attend(self.pod_id, item[1]), self.settings.reader_ttl_s / 4):
                log.warning("%r could not renew %d readers: %s", queue, len(job_ids), type(error).__name__)
