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
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass

from api import batch_line
from api.batches import HOLD_S
from api.pod import Pod
from api.wire.batches import Batch, Step, next_step
from api.wire.lines import Checker, GivenUp, Raw, Splitter, read_line, refusal
from shared import connection
from shared.errors import APIError, ModelNotFound, NoSuchFile, NoWorker

log = logging.getLogger(__name__)

LOOK_S = 1.0                                            # between two searches for batches that no pod runs
MAX_LOOKED_AT = 512                                     # batches per search: many of one key hide none of another
MAX_TRIED = 32                                          # of them; those that other pods hold are tried in vain
MAX_PUMPED = 8                                          # batches of one pod at a time, and one that is giving way
TURN_S = 30.0                                           # then a batch gives way to one that waits, for a while
MAX_IN_FLIGHT = 64                                      # lines of one batch
RENEW_S = 1.0                                           # far below HOLD_S; also how soon a cancelled batch is noticed
CHUNK_LINES = 256                                       # looked up per round trip


@dataclass(slots=True)
class Turn:
    """A batch's place on this pod."""

    batch_id: str
    tenant: str
    began_s: float
    gives_way: bool = False                             # its jobs run on, and a pod returns to them later


async def pump(pod: Pod) -> None:
    """Takes and runs batches until cancelled."""
    turns: dict[asyncio.Task[None], Turn] = {}
    try:
        while True:
            await asyncio.sleep(LOOK_S * random.uniform(0.5, 1.5))
            for task in [task for task in turns if task.done()]:
                del turns[task]
            try:
                await _fill(pod, turns)
            except connection.TROUBLE as error:
                log.warning("batches could not be looked up: %s", type(error).__name__)
    finally:
        await connection.end(turns)


async def _fill(pod: Pod, turns: dict[asyncio.Task[None], Turn]) -> None:
    """Begins turns of batches that no pod holds, while there are places for them."""
    here = {turn.batch_id for turn in turns.values()}
    live = [each for each in await pod.batches.some_live(MAX_LOOKED_AT) if each[1] not in here]
    random.shuffle(live)
    for _ in range(min(len(live), MAX_TRIED)):
        tenant, batch_id = live.pop(next_to_take([tenant for tenant, _ in live], turns.values()))
        now_s = asyncio.get_running_loop().time()
        leaving = to_give_way(tenant, turns.values(), now_s)
        has_place = not pod.draining and (len(turns) < MAX_PUMPED or leaving)
        if has_place and (batch := await _held(pod, tenant, batch_id)):
            if leaving:
                leaving.gives_way = True
            turn = Turn(batch_id, tenant, now_s)
            turns[asyncio.create_task(_run(pod, batch, turn))] = turn


def next_to_take(waiting: list[str], turns: Collection[Turn]) -> int:
    """Which of the batches of these tenants: the first whose tenant has the fewest places."""
    num_places = _num_places(turns)
    return min(range(len(waiting)), key=lambda number: num_places[waiting[number]])


def to_give_way(tenant: str, turns: Collection[Turn], now_s: float) -> Turn | None:
    """The turn that ends for a batch of this tenant: of the tenant with the most places the longest. None if there is a
    place anyway, if somebody is giving way already, or if no turn is over that the tenant has a better claim to."""
    if len(turns) != MAX_PUMPED:
        return None
    num_places = _num_places(turns)
    over = [turn for turn in turns if now_s - turn.began_s >= TURN_S and not turn.gives_way
            and (turn.tenant == tenant or num_places[turn.tenant] > num_places[tenant])]
    return max(over, key=lambda turn: (num_places[turn.tenant], -turn.began_s), default=None)


def _num_places(turns: Collection[Turn]) -> Counter[str]:
    return Counter(turn.tenant for turn in turns if not turn.gives_way)


async def _held(pod: Pod, tenant: str, batch_id: str) -> Batch | None:
    try:
        return await pod.batches.hold(tenant, batch_id, pod.id)
    except (ValueError, TypeError, KeyError) as error:  # written by another release: it must not end every pod in turn
        log.warning("batch %s cannot be read, and is left to others: %r", batch_id, error)
        return None


async def _run(pod: Pod, batch: Batch, turn: Turn) -> None:
    """Runs a batch to its end, or until its turn ends; any pod may then continue it."""
    try:
        await Pump(pod, batch, turn).run()
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

    def __init__(self, pod: Pod, batch: Batch, turn: Turn) -> None:
        self.pod = pod
        self.batch = batch
        self.turn = turn
        self._held_s = asyncio.get_running_loop().time()

    @property
    def has_turn(self) -> bool:
        return not (self.pod.draining or self.turn.gives_way)

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
