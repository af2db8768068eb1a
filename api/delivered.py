"""What a pod has delivered of one answer, packed as the log had it: enough to put it back into a Redis that lost it.

It knows neither clients nor events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from shared.errors import StreamLost
from shared.job import Entry, Job
from shared.queue import Queue

MAX_KEPT_BYTES = 8 << 20                                # of one answer: some 100,000 tokens, or 5,000 with logprobs
MAX_POD_BYTES = 512 << 20                               # of all streams of a pod; those that grow beyond keep nothing
MAX_PUT_BACKS = 16                                      # of one answer


@dataclass(slots=True)
class Room:
    """What the streams of a pod keep, in bytes."""

    num_bytes: int = 0


@dataclass(slots=True)
class Delivered:
    job: Job | None = None                              # None: it had ended before this pod heard of it, or is too much
    header: str = ""
    room: Room = field(default_factory=Room)            # the relay's, once it has the stream
    _lines: bytearray = field(default_factory=bytearray)
    _num_put_backs: int = 0

    def add(self, entries: Iterable[Entry]) -> None:
        if self.job is None:
            return
        num_before = len(self._lines)
        for entry in entries:
            if entry.position:                          # the header is kept by itself
                self._lines += entry.line.encode() + b"\n"
        self.room.num_bytes += len(self._lines) - num_before
        if len(self._lines) > MAX_KEPT_BYTES or self.room.num_bytes > MAX_POD_BYTES:
            self.forget()

    def forget(self) -> None:
        """From here on nothing can be put back."""
        self.room.num_bytes -= len(self._lines)
        self.job, self._lines = None, bytearray()

    def entries(self) -> list[Entry]:
        return [Entry.parse(line) for line in self._lines.decode().splitlines()]

    async def put_back(self, queue: Queue) -> None:
        """Restores the log, unless Redis has it. Raises StreamLost when this pod lacks a part, or did it too often."""
        if self.job is None or self._num_put_backs >= MAX_PUT_BACKS:
            raise StreamLost
        entries = self.entries()
        await queue.restore(self.job, self.header, entries, epoch=entries[-1].epoch if entries else 0)
        self._num_put_backs += 1                        # those that Redis refuses for now are no put-backs
