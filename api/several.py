"""Several streams as one: their entries as they come, each with the number of its stream.

It knows nothing of what entries mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from api.relay import Stream
from api.wire.completions import Numbered


class Several:
    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams

    @property
    def unsent_s(self) -> float:
        return min(stream.unsent_s for stream in self._streams)

    @unsent_s.setter
    def unsent_s(self, value: float) -> None:
        for stream in self._streams:
            stream.unsent_s = value

    def leave(self) -> None:
        for stream in self._streams:
            stream.leave()

    async def batches(self) -> AsyncIterator[list[Numbered]]:
        """As Stream.batches; ends when all have ended. Raises what any of them does."""
        arrived: asyncio.Queue[list[Numbered] | None] = asyncio.Queue()

        async def pass_on(number: int, stream: Stream) -> None:
            async for entries in stream.batches():
                arrived.put_nowait([Numbered(number, entry) for entry in entries])
                await arrived.join()                    # no stream continues before its entries were sent
                if entries and entries[-1].kind == "end":
                    break

        async def run() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for number, stream in enumerate(self._streams):
                        group.create_task(pass_on(number, stream))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
            finally:
                arrived.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while (entries := await arrived.get()) is not None:
                yield entries
                arrived.task_done()
            await running
        finally:
            running.cancel()
