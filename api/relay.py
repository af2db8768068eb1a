"""The relay: what is pushed to this pod reaches the streams that wait for it, in order, without gap or repetition.

A push is a hint, the log is the truth: an entry that follows the last one is accepted, an older one dropped, and
whatever is missing is read from the log. It knows nothing of HTTP, and nothing of what entries mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from shared import connection
from shared.job import Entry
from shared.keys import Shard
from shared.queue import Queue, parse_push
from shared.settings import Settings

log = logging.getLogger(__name__)

TICK_S = 0.1                                            # how exactly silence is noticed
READ_LIMIT = 256                                        # entries of one look into a log


class Stream:
    """One request's view of its log. `batches()` gives every entry once, in order."""

    def __init__(self, job_id: str, queue: Queue, max_pending: int) -> None:
        self.job_id = job_id
        self.queue = queue
        self.last: Entry | None = None                  # the last one that `batches()` gave
        self.left = False                               # the client is gone
        self.heartbeat_due = False
        self.silent_s = 0.0
        self._pending: list[Entry] = []
        self._max_pending = max_pending
        self._behind = False                            # the log has what we do not
        self._wake = asyncio.Event()

    def push(self, entry: Entry) -> None:
        """Takes what was pushed, if it is the next; else remembers that the log must be read."""
        newest = self._pending[-1] if self._pending else self.last
        position = newest.position if newest else 0     # position 0, the header, is known before anything is pushed
        if entry.position <= position:
            return
        if entry.position != position + 1 or len(self._pending) >= self._max_pending:
            self.look()
            return
        self._pending.append(entry)
        self._wake.set()

    def look(self) -> None:
        """Has the log read: something may have been missed."""
        self._behind = True
        self._wake.set()

    def leave(self) -> None:
        self.left = True
        self._wake.set()

    def tick(self, passed_s: float, sweep_s: float, heartbeat_s: float) -> None:
        """Time passes in silence: look into the log every `sweep_s`, ask for a heartbeat every `heartbeat_s`."""
        before, self.silent_s = self.silent_s, self.silent_s + passed_s
        if before // sweep_s != self.silent_s // sweep_s:
            self.look()
        if before // heartbeat_s != self.silent_s // heartbeat_s:
            self.heartbeat_due = True
            self._wake.set()

    async def batches(self) -> AsyncIterator[list[Entry]]:
        """What has arrived, as it arrives; an empty batch is a heartbeat. Ends when the client left.

        Raises StreamLost when the log is gone.
        """
        while not self.left:
            await self._wake.wait()
            self._wake.clear()
            entries = self._take_pending()
            if self._behind:
                entries += await self._read_missed()
            if entries:
                self.silent_s = 0.0
            if entries or self.heartbeat_due:
                self.heartbeat_due = False
                yield entries

    def _take_pending(self) -> list[Entry]:
        entries, self._pending = self._pending, []
        self.last = entries[-1] if entries else self.last
        return entries

    async def _read_missed(self) -> list[Entry]:
        """What the log has behind the last entry. What is pushed meanwhile stands in it too, or follows it."""
        self._behind = False
        try:
            missed = await self.queue.read(self.job_id, after=self.last, limit=READ_LIMIT)
        except (*connection.UNREACHABLE, *connection.UNWRITABLE, OSError):
            return []                                   # Redis is away: the next sweep looks again
        pushed, self._pending = self._pending, []
        self.last = missed[-1] if missed else self.last
        if len(missed) == READ_LIMIT:
            self.look()
        for entry in pushed:
            self.push(entry)
        return missed


class Relay:
    """All streams of one pod, fed by one subscription."""

    def __init__(self, pod_id: str, settings: Settings) -> None:
        self.pod_id = pod_id
        self.settings = settings
        self._streams: dict[str, Stream] = {}
        self._heard: dict[str, asyncio.Event] = {}      # channel → set once it is subscribed

    def __repr__(self) -> str:
        return f"<Relay {len(self._streams)} streams, {len(self._heard)} shards>"

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    async def hear(self, shard: Shard) -> None:
        """Listens to a shard before anything is submitted to it."""
        await self._heard.setdefault(shard.key(f"push:{self.pod_id}"), asyncio.Event()).wait()

    def open(self, job_id: str, queue: Queue) -> Stream:
        stream = self._streams[job_id] = Stream(job_id, queue, self.settings.max_pending_entries)
        return stream

    def close(self, stream: Stream) -> None:
        self._streams.pop(stream.job_id, None)

    def leave_all(self) -> None:
        """The pod stops: every stream that still runs ends here."""
        for stream in self._streams.values():
            stream.leave()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._tick())

    async def _listen(self) -> None:
        async for channel, message in connection.listen(self.settings.redis_url, self._heard):
            if message is None:
                self._heard[channel].set()
                for stream in self._streams.values():
                    stream.look()
                continue
            for job_id, entry in parse_push(message):
                if waiting := self._streams.get(job_id):
                    waiting.push(entry)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        before = loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            now = loop.time()
            for stream in self._streams.values():
                stream.tick(now - before, self.settings.sweep_s, self.settings.heartbeat_s)
            before = now


