"""What a pod has delivered of one answer, packed as in the log: enough to restore the log if Redis loses it.

It knows neither clients nor events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from shared.errors import StreamLost
from shared.job import Entry, Job
from shared.queue import Queue

MAX_KEPT_BYTES = 8 << 20                                # per answer: some 100,000 tokens, or 5,000 with logprobs
MAX_POD_BYTES = 512 << 20                               # for all streams of a pod; those that exceed it keep nothing
MAX_PUT_BACKS = 16                                      # per answer


@dataclass(slots=True)
class Room:
    """Bytes kept by all streams of a pod."""

    num_bytes: int = 0


@dataclass(slots=True)
class Delivered:
    job: Job | None = None                              # None: it had ended before this pod relayed it, or is too large
    header: str = ""
    room: Room = field(default_factory=Room)            # shared by the relay, once it has the stream
    _lines: bytearray = field(default_factory=bytearray)
    _num_put_backs: int = 0

    def add(self, entries: Iterable[Entry]) -> None:
        if self.job is None:
            return
        num_before = len(self._lines)
        for entry in entries:
            if entry.position:                          # the header is kept separately
                self._lines += entry.line.encode() + b"\n"
        self.room.num_bytes += len(self._lines) - num_before
        if len(self._lines) > MAX_KEPT_BYTES or self.room.num_bytes > MAX_POD_BYTES:
            self.forget()

    def forget(self) -> None:
        """From now on nothing can be restored."""
        self.room.num_bytes -= len(self._lines)
        self.job, self._lines = None, bytearray()

    def entries(self) -> list[Entry]:
        return [Entry.parse(line) for line in self._lines.decode().splitlines()]

    async def put_back(self, queue: Queue) -> None:
        """Restores the log, unless Redis has it. Raises StreamLost when this pod lacks a part, or did so too often."""
        if self.job is None or self._num_put_backs >= MAX_PUT_BACKS:
            raise StreamLost
        entries = self.entries()
        first = entries[0].deltas[:1] if entries and entries[0].kind == "delta" else []
        await queue.restore(self.job, self.header, entries, epoch=entries[-1].epoch if entries else 0,
                            weights_id="".join(delta.weights_id for delta in first))
        self._num_put_backs += 1                        # one that Redis refuses for now does not count
