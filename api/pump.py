"""The pump: a pod takes batches that no other pod runs, and runs them to their end, some lines at a time.

All progress is in Redis, so the pump may stop at any point: when Redis is away, when the pod drains or dies. The next
one, on this pod or another, continues from there. It knows nothing of HTTP, nor of the contents of lines.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from api import batch_line
from api.batches import HOLD_S
from api.pod import Pod
from api.wire.batches import Batch, Step, next_step
from api.wire.lines import Checker, GivenUp, Raw, Splitter, read_line, refusal
from shared import connection
from shared.errors import APIError, ModelNotFound, NoSuchFile, NoWorker

log = logging.getLogger(__name__)

LOOK_S = 1.0                                            # between two searches for batches that no pod runs
MAX_LOOKED_AT = 32                                      # batches per search
MAX_PUMPED = 8                                          # batches of one pod at a time
TURN_S = 60.0                                           # without a line that ends: then other batches take its place
MAX_IN_FLIGHT = 64                                      # lines of one batch
RENEW_S = 1.0                                           # far below HOLD_S; also how soon a cancelled batch is noticed
CHUNK_LINES = 256                                       # looked up per round trip


async def pump(pod: Pod) -> None:
    """Takes and runs batches until cancelled."""
    pumping: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            await asyncio.sleep(LOOK_S * random.uniform(0.5, 1.5))
            pumping = {batch_id: task for batch_id, task in pumping.items() if not task.done()}
            if pod.draining or len(pumping) >= MAX_PUMPED:
                continue
            try:
                for tenant, batch_id in await pod.batches.some_live(MAX_LOOKED_AT):
                    is_free = batch_id not in pumping and len(pumping) < MAX_PUMPED
                    if is_free and (batch := await _held(pod, tenant, batch_id)):
                        pumping[batch_id] = asyncio.create_task(_run(pod, batch))
            except connection.TROUBLE as error:
                log.warning("batches could not be looked up: %s", type(error).__name__)
    finally:
        await connection.end(pumping.values())


async def _held(pod: Pod, tenant: str, batch_id: str) -> Batch | None:
    try:
        return await pod.batches.hold(tenant, batch_id, pod.id)
    except (ValueError, TypeError, KeyError) as error:  # written by another release: it must not end every pod in turn
        log.warning("batch %s cannot be read, and is left to others: %r", batch_id, error)
        return None


async def _run(pod: Pod, batch: Batch) -> None:
    """Runs a batch to its end, or until another batch takes its turn; any pod may then continue it."""
    try:
        await Pump(pod, batch).run()
        await pod.batches.let_go(batch.tenant, batch.id, pod.id)
    except Lost:
        log.warning("%r is run by another pod by now", batch)
    except (*connection.TROUBLE, APIError) as error:
        log.warning("%r is left for a moment: %s", batch, type(error).__name__)
    except Exception:                                   # a bug of ours must not end every pod in turn
        log.exception("%r was not run", batch)
        await asyncio.sleep(HOLD_S)                     # other pods may take it meanwhile


class Lost(Exception):
    """Another pod holds the batch."""


class Pump:
    """One batch that this pod holds."""

    def __init__(self, pod: Pod, batch: Batch) -> None:
        self.pod = pod
        self.batch = batch
        self._held_s = self._moved_s = asyncio.get_running_loop().time()

    @property
    def has_turn(self) -> bool:
        """Whether to keep its turn: without one, its jobs run on, and the pump returns to them later."""
        return not self.pod.draining and asyncio.get_running_loop().time() - self._moved_s < TURN_S

    @property
    def step(self) -> Step | None:
        return next_step(self.batch, time.time())

    async def run(self) -> None:
        steps: dict[Step, Callable[[], Awaitable[None]]] = {
            "validate": self._validate, "run": self._run_lines, "finalize": self._finalize,
            "complete": self._complete, "expire": self._expire, "cancel": self._cancel}
        while self.has_turn and (step := self.step):
            await steps[step]()
            await self._hold()
        if self.batch.is_over:
            log.info("%r", self.batch)
            for job_id in (await self.pod.batches.allotted(self.batch)).values():
                await batch_line.drop(self.pod, job_id)
            await self.pod.batches.leave(self.batch)

    # ── the steps, each of which may be stopped anywhere and done again ──

    async def _validate(self) -> None:
        batch, checker = self.batch, Checker(self.batch.endpoint)
        try:
            async for piece in self._input():
                # Some 20 µs a line: keeps the loop free for relaying.
                await asyncio.to_thread(checker.feed, piece)
                await self._hold_if_due()
                if checker.is_done or self.step != "validate":
                    break
            else:
                checker.end()
        except NoSuchFile as error:
            checker.errors.append(refusal(error))
        if self.step != "validate":
            return
        if checker.errors:
            await self.pod.batches.fail(batch, checker.errors)
        else:
            models = [model for model in checker.models if await self._is_known(model)]
            await self.pod.batches.advance(batch, "in_progress", num_lines=checker.num_lines,
                                           num_requests=checker.num_requests, models=json.dumps(models))

    async def _run_lines(self) -> None:
        try:
            await self._ask_lines()
        except NoSuchFile as error:
            errors = [refusal(error)]
            await self._publish_and(lambda batch: self.pod.batches.fail(batch, errors))

    async def _ask_lines(self) -> None:
        running: set[asyncio.Task[None]] = set()
        try:
            async for raw in self._unfinished():
                while len(running) >= MAX_IN_FLIGHT and self._goes_on:
                    running = await self._some_end(running)
                if not self._goes_on:
                    return
                line = read_line(raw, self.batch.endpoint)
                running.add(asyncio.create_task(batch_line.run(self.pod, self.batch, line)))
            while running and self._goes_on:
                running = await self._some_end(running)
        finally:
            await connection.end(running)
            for task in running:
                if not task.cancelled():
                    task.exception()                    # one task's error has ended the others

    async def _finalize(self) -> None:
        await self.pod.batches.advance(self.batch, "finalizing")

    async def _complete(self) -> None:
        await self._publish_and(lambda batch: self.pod.batches.advance(batch, "completed"))

    async def _expire(self) -> None:
        await self._close("batch_expired")
        await self._publish_and(lambda batch: self.pod.batches.advance(batch, "expired"))

    async def _cancel(self) -> None:
        await self._close("batch_cancelled")
        await self._publish_and(lambda batch: self.pod.batches.advance(batch, "cancelled"))

    # ── what they are made of ──

    async def _close(self, code: GivenUp) -> None:
        """Gives every line without a result one."""
        if not self.batch.has_begun:
            return                                      # the lines were never validated
        allotted = await self.pod.batches.allotted(self.batch)
        try:
            async for raw in self._unfinished():
                line = read_line(raw, self.batch.endpoint)
                await batch_line.close(self.pod, self.batch, line, allotted.get(line.number), code)
                await self._hold_if_due()
        except NoSuchFile:
            log.warning("%r has no input any more: the rest of its lines cannot be named", self.batch)

    async def _publish_and(self, advance: Callable[[Batch], Awaitable[object]]) -> None:
        await self._hold()                              # its counts are final now
        await self.pod.batches.publish(self.batch)
        await advance(self.batch)

    @property
    def _goes_on(self) -> bool:
        return self.has_turn and self.step in ("run", "finalize")

    async def _some_end(self, running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """Waits a moment for any of them to end; returns those that still run. Raises errors of Redis."""
        ended, running = await asyncio.wait(running, timeout=RENEW_S, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
            self._moved_s = asyncio.get_running_loop().time()
        await self._hold_if_due()
        return running

    async def _unfinished(self) -> AsyncIterator[Raw]:
        """Yields the lines without a result, in order. Raises NoSuchFile."""
        splitter = Splitter()
        async for piece in self._input():
            async for raw in self._without_result(splitter.feed(piece)):
                yield raw
        async for raw in self._without_result(splitter.end()):
            yield raw

    async def _without_result(self, lines: list[Raw]) -> AsyncIterator[Raw]:
        for begin in range(0, len(lines), CHUNK_LINES):
            await self._hold_if_due()
            for raw in await self.pod.batches.unfinished(self.batch, lines[begin:begin + CHUNK_LINES]):
                yield raw

    async def _input(self) -> AsyncIterator[bytes]:
        file = await self.pod.files.get(self.batch.tenant, self.batch.input_file_id)
        async for piece in self.pod.files.read(self.batch.tenant, file):
            yield piece

    async def _is_known(self, model: str) -> bool:
        try:
            await self.pod.directory.find(model)
        except ModelNotFound:
            return False
        except NoWorker:                                # for now
            return True
        return True

    async def _hold_if_due(self) -> None:
        if asyncio.get_running_loop().time() - self._held_s >= RENEW_S:
            await self._hold()

    async def _hold(self) -> None:
        """Renews the hold, and rereads the batch from Redis. Raises Lost."""
        held = await self.pod.batches.hold(self.batch.tenant, self.batch.id, self.pod.id)
        if held is None:
            raise Lost
        self.batch, self._held_s = held, asyncio.get_running_loop().time()
