"""The worker: claim, step, publish, finish, in one loop. The only file of this room that speaks to Redis.

The loop is also the heartbeat: a completed step renews the lease, never a task beside it. A step blocks the event loop
on purpose: a thread of its own would compete for the interpreter lock. A publish is sent before the next step begins,
and its outcome is handled after that step.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from redis.asyncio import Redis
from tokenizers import Tokenizer

from shared import connection
from shared.card import Announcement, Card
from shared.errors import InvalidGrammar, StreamLost
from shared.grammar import Grammars
from shared.keys import DIRECTORY, Shard
from shared.queue import Behind, Claimed, Outcome, Queue, Write
from shared.reaper import reap
from shared.settings import Settings
from worker.answer import Answer
from worker.engine.engine import Engine, Output
from worker.engine.request import FAILURES, NO_WAY_ON, NOT_A_NUMBER, Request
from worker.leaving import must_end_here

log = logging.getLogger(__name__)

AWAY = (*connection.UNREACHABLE, *connection.UNWRITABLE, OSError)
STEPS_REMEMBERED = 1000                                 # for the step times that a worker announces
WATCH_SLACK = 0.25                                      # of step_timeout_s: age of a watchdog, and a publish's share
LOOP_TURNS = 4                                          # loop iterations from a socket to its reader: some 20 µs each
MIN_RETAINED = 0.1                                      # of retain_s, if Redis has little memory left
FORGET_MODEL_S = 3600.0                                 # a model without workers stays known this long: 503, not 404


class Worker:
    def __init__(self, settings: Settings, redis: Redis, engine: Engine, card: Card, names: tuple[str, ...]) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"   # of this incarnation
        self.settings = settings
        self.engine = engine
        self.card = card
        self.queue = Queue(redis, Shard.of(names[0], settings.shard), settings)
        self._names = names
        self._card_hash, self._card_bytes = card.pack()
        self._tokenizer = Tokenizer.from_str(card.tokenizer_json)
        self._grammars = Grammars(card.tokenizer_json, card.vocab_size, card.eos_token_ids)
        self._answers: dict[str, Answer] = {}
        self._compiler = ThreadPoolExecutor(1, "compile")
        self._compiling: dict[str, asyncio.Future[Request]] = {}    # answers whose grammar is being compiled
        self.is_broken = False                          # its logits were NaN: a new process must load the model
        self._alone = ""                                # this job lost a worker: no other starts until it has a token
        self._claim_sequence = 1
        self._claim_at_s = self._renewed_s = self._asked_s = self._announced_s = float("-inf")
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._leaves_at_s = float("inf")                # from then on it hands over, and waits for nothing
        self._is_draining = False                       # it ends what was begun with its weights, and begins nothing
        self._sees_line = True                          # as far as the last claim tells, there is more to claim
        self._announcing: asyncio.Task[None] | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._publish_sequence = 1
        self._watched_s = float("-inf")                 # when the watchdog that ends a hanging step was started
        self._slack_s = settings.step_timeout_s * WATCH_SLACK
        self._step_s: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._num_tokens = 0                            # drawn since the last announcement

    def __repr__(self) -> str:
        return f"<Worker {self.name} {self.engine!r}>"

    def stop(self) -> None:
        """Ends the loop after the present step; jobs are handed over at once, unless nobody else could go on. Asked
        again, it hands them over nevertheless."""
        self._leaves_at_s = time.monotonic()
        self._stopping.set()
        self._wake.set()

    async def run(self) -> None:
        """Runs until `stop()`, or until it is broken."""
        chores = [asyncio.create_task(self._listen()), asyncio.create_task(reap(lambda: [self.queue], self.settings))]
        log.info("%s serves %s", self.name, ", ".join(self._names))
        try:
            while not self._stopping.is_set():
                await self._turn()
                for chore in filter(asyncio.Task.done, chores):
                    chore.result()                      # it ends only by an error
            await self._settle()
            if not self.is_broken:
                await self._end_what_must_end_here()
            log.info("%s hands over %d jobs", self.name, await self.queue.release(self.name))
        except AWAY:
            log.warning("%s leaves without Redis: its jobs go to others when its lease ends", self.name)
        finally:
            self._unwatch()
            await connection.end([task for task in (*chores, self._announcing, self._publishing) if task])
            self._compiler.shutdown(wait=False, cancel_futures=True)

    async def _end_what_must_end_here(self) -> None:
        """In a rolling change of weights: what was begun with these, here or by others that have left, for at most
        `drain_s`."""
        if self._announcing:
            await self._announcing
        await self._say(0.0)                            # that it leaves: others may look for one to hand over to
        others = [other for other in await self.queue.workers() if other.get("name", self.name) != self.name]
        if self.settings.allow_other_weights or not must_end_here(self.card.weights_id, others):
            return
        if not_begun := [job_id for job_id, answer in self._answers.items() if not answer.position]:
            await self.queue.release(self.name, not_begun)
            for job_id in not_begun:
                self._drop(job_id)
        log.info("%s is the last with its weights: %d answers may end in %g s", self.name, len(self._answers),
                 self.settings.drain_s)
        self._is_draining, self._claim_at_s = True, float("-inf")
        self._leaves_at_s = time.monotonic() + self.settings.drain_s
        while (self._answers or self._sees_line) and time.monotonic() < self._leaves_at_s and not self.is_broken:
            await self._turn()
        await self._settle()

    async def _turn(self) -> None:
        await self._admit()
        self._announce()
        if not self._answers:
            await self._settle()
            await self._rest()                          # then the next turn claims, which renews the lease
            return
        if self._compiling and not self.engine.has_work:
            await self._rest_while_compiling()
        while job_id := next((job_id for job_id, request in self._compiling.items() if request.done()), None):
            await self._compute(self._answers[job_id], self._compiling.pop(job_id).result)
        outputs = self._step() if self.engine.has_work else []      # a claimed answer may lack only its terminal
        await self._settle()
        writes = self._collect(outputs)
        if time.monotonic() - self._asked_s >= self.settings.lease_s / 4:
            writes += self._holds({write.job_id for write in writes})
            self._asked_s = time.monotonic()
        if writes:
            self._publishing = asyncio.create_task(self._publish(writes))
        if failures := [output for output in outputs if output.finish_reason in FAILURES]:
            await self._give_up(failures)
        for _ in range(LOOP_TURNS):
            await asyncio.sleep(0)                      # asyncio sends the new tokens, and reads what has arrived

    def _step(self) -> list[Output]:
        began_s = time.monotonic()
        if began_s - self._watched_s > self._slack_s:   # its thread needs no interpreter lock, and prints our stack
            faulthandler.dump_traceback_later(self.settings.step_timeout_s + 2 * self._slack_s, exit=True)
            self._watched_s = began_s
        outputs = self.engine.step()
        self._step_s.append(time.monotonic() - began_s)
        return outputs

    async def _rest(self) -> None:
        """Nothing to compute: waits for a submit, or until it must claim and renew anyway."""
        self._unwatch()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), max(0.0, self._claim_at_s - time.monotonic()))

    async def _rest_while_compiling(self) -> None:
        """Until a grammar is compiled, or there is something to claim; the lease is renewed in between."""
        self._unwatch()
        wake, timeout_s = asyncio.create_task(self._wake.wait()), self.settings.lease_s / 8
        wanted = list[asyncio.Future[Any]](self._compiling.values())
        if self._may_claim:
            wanted.append(wake)
            timeout_s = min(timeout_s, max(0.0, self._claim_at_s - time.monotonic()))
        await asyncio.wait(wanted, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        wake.cancel()

    # ── claim ──

    @property
    def _num_free(self) -> int:
        """Choices that could be computed beside those whose grammars are compiled."""
        return self.engine.num_free_seqs - sum(self._answers[job_id].job.n for job_id in self._compiling)

    @property
    def _may_claim(self) -> bool:
        return self._num_free > 0 and self._alone not in self._answers and (
            self._is_draining or not self._stopping.is_set())

    async def _admit(self) -> None:
        """Claims jobs if there is room, and a job was announced or it is time to look."""
        if not self._may_claim or not (self._wake.is_set() or time.monotonic() >= self._claim_at_s):
            return
        await self._settle()                            # handles refusals and restores before a newer claim
        self._unwatch()                                 # Redis may be slow
        self._wake.clear()
        now_s = time.monotonic()
        self._claim_at_s = now_s + self.settings.idle_poll_s
        card = self.card
        try:
            claims = await self.queue.claim(
                self.name, self._claim_sequence, self._num_free, tokenizer_id=card.tokenizer_id,
                weights_id=card.weights_id, numerics_id=card.numerics_id, most_choices=card.max_num_seqs,
                max_model_len=card.max_model_len, held=self._answers, begun_only=self._is_draining)
            self._renewed_s = now_s
            self._sees_line = bool(claims.jobs) or claims.look_again_s is not None
            if claims.look_again_s is not None:
                self._claim_at_s = min(self._claim_at_s, now_s + claims.look_again_s)
            for claimed in claims.jobs:
                await self._begin(claimed)
            for job_id in claims.malformed:
                log.error("job %s does not decode: given up", job_id)
                await self.queue.cancel(job_id, "job_failed")
        except AWAY as error:
            log.warning("claim: Redis is away (%s)", type(error).__name__)
            await asyncio.sleep(connection.RECONNECT_S)
            return                                      # the same sequence returns the same jobs
        self._claim_sequence += 1
        self._alone = next((claimed.job.id for claimed in claims.jobs if claimed.alone), "")

    async def _begin(self, claimed: Claimed) -> None:
        if known := self._answers.get(claimed.job.id):
            if known.epoch == claimed.epoch:
                return                                  # a repeated claim
            self._drop(claimed.job.id)                  # lost with a lease, and claimed again before a publish told us
        try:
            entries = await self.queue.read(claimed.job.id) if claimed.position else []
        except StreamLost:
            return                                      # it ended, or is gone
        answer = Answer(claimed, self._tokenizer, entries, self.card.weights_id)
        answer.is_exact &= self.engine.is_exact and all(
            self.engine.replays_exactly(len(choice.token_ids)) for choice in answer.choices)
        self._answers[claimed.job.id] = answer
        if claimed.position:
            log.info("continues %r", answer)
        grammar, request = answer.job.sampling.grammar, partial(answer.request, self._grammars)
        if answer.ended:
            return
        if grammar and (claimed.position or grammar not in self._grammars):
            self._compiling[claimed.job.id] = asyncio.get_running_loop().run_in_executor(
                self._compiler, request)                # other answers are computed meanwhile
        else:
            await self._compute(answer, request)

    async def _compute(self, answer: Answer, request: Callable[[], Request]) -> None:
        """Hands a request to the engine, or ends a job that it refuses."""
        try:
            self.engine.add(request())
        except (ValueError, InvalidGrammar) as error:
            log.error("job %s is refused by the engine: %s", answer.job.id, error)
            self._drop(answer.job.id)
            self._unwatch()                             # Redis may take its time
            with contextlib.suppress(*AWAY):            # the next claim hands it back
                await self.queue.cancel(answer.job.id, "job_failed", worker=self.name)

    # ── publish ──

    def _collect(self, outputs: Sequence[Output]) -> list[Write]:
        """The log entries for the tokens drawn in this step."""
        self._num_tokens += sum(len(output.token_ids) for output in outputs)
        for output in outputs:
            answer = self._answers.get(output.request_id)
            if answer and output.finish_reason not in FAILURES and answer.take(output):
                self.engine.abort(output.request_id, output.index)
        now_s = time.monotonic()
        flush_s = self.settings.flush_s
        return [write for answer in self._answers.values() if answer.ended or answer.is_due(now_s, flush_s)
                for write in answer.flush(now_s)]

    def _holds(self, said: Collection[str]) -> list[Write]:
        """Asks of answers that have nothing to say whether they are still ours, and renews the lease in any case."""
        return [Write(answer.job.id, answer.epoch, 0, 0, "hold", "") for answer in self._answers.values()
                if answer.job.id not in said]

    async def _give_up(self, failures: Sequence[Output]) -> None:
        """Releases jobs that failed here to other workers, or ends those that would fail there too. A worker whose
        logits are NaN stops, and hands over all that it holds."""
        await self._settle()
        self._unwatch()                                 # Redis may be slow
        job_ids = {output.request_id: output.finish_reason for output in failures
                   if output.request_id in self._answers}
        for job_id, why in job_ids.items():
            log.error("job %s fails here: %s", job_id, why)
            self._grammars.forget(self._answers[job_id].job.sampling.grammar)
            self._drop(job_id)
        if NOT_A_NUMBER in job_ids.values():
            log.error("logits that are not numbers: weights or device are broken, or a request breaks them. "
                      "%s ends, its jobs go to others", self.name)
            self.is_broken = True
            self.stop()
        while job_ids:
            try:
                for job_id in [job_id for job_id, why in job_ids.items() if why == NO_WAY_ON]:
                    await self.queue.cancel(job_id, "form_too_complex", worker=self.name)
                    del job_ids[job_id]
                if job_ids:
                    await self.queue.release(self.name, list(job_ids), has_failed=True)
                return
            except AWAY as error:
                log.warning("release: Redis is away (%s)", type(error).__name__)
                if time.monotonic() >= self._leaves_at_s:
                    raise
                await asyncio.sleep(connection.RECONNECT_S)

    async def _settle(self) -> None:
        """Waits for the outcome of the last publish."""
        if self._publishing:
            _, pending = await asyncio.wait([self._publishing], timeout=self._slack_s)
            if pending:
                self._unwatch()                         # Redis may be slow
            await self._publishing
            self._publishing = None

    def _unwatch(self) -> None:
        if self._watched_s > float("-inf"):
            faulthandler.cancel_dump_traceback_later()
            self._watched_s = float("-inf")

    async def _publish(self, writes: list[Write]) -> None:
        """Publishes entries and renews the lease; repeats the call until Redis replies."""
        now_s, has_lost = time.monotonic(), False
        while True:
            try:
                if has_lost:                            # then answers have new epochs
                    await self._put_back()
                    writes = [write._replace(epoch=self._answers[write.job_id].epoch)
                              for write in writes if write.job_id in self._answers]
                has_lost = False
                outcomes = await self.queue.publish(self.name, writes, self._publish_sequence)
                self._publish_sequence += 1
                writes = self._note(writes, outcomes)
                if not writes:
                    break
                has_lost = True
            except Behind:
                has_lost = True
            except AWAY as error:
                log.warning("publish: Redis is away (%s)", type(error).__name__)
                if time.monotonic() >= self._leaves_at_s:
                    raise
                await asyncio.sleep(connection.RECONNECT_S)
        self._renewed_s = now_s

    def _note(self, writes: list[Write], outcomes: list[Outcome]) -> list[Write]:
        """Handles the entries' outcomes; returns those whose log is gone. Drops jobs that ended or are not ours."""
        for write, outcome in zip(writes, outcomes, strict=True):
            answer = self._answers.get(write.job_id)
            if answer is None or answer.epoch != write.epoch:
                continue
            if outcome == "ok" and write.kind != "hold":
                if write.job_id == self._alone:         # it has a new token: it did not cost the worker this time
                    self._alone = ""
                    self._wake.set()
                answer.log.append(write.entry)
            elif outcome == "refused":
                self._drop(write.job_id)
            if outcome == "ok" and write.kind == "end":
                del self._answers[write.job_id]
        return [write for write, outcome in zip(writes, outcomes, strict=True) if outcome == "gone"]

    async def _put_back(self) -> None:
        """Restores what Redis has lost, and drops answers that are no longer ours. May be repeated."""
        log.warning("Redis does not know what it has acknowledged: %d answers are put back", len(self._answers))
        # After a silence longer than ended logs are kept, we cannot distinguish lost from ended jobs.
        may_restore = time.monotonic() - self._renewed_s < self.settings.retain_s * MIN_RETAINED
        for job_id, answer in list(self._answers.items()):
            epoch = may_restore and await self.queue.restore(
                answer.job, answer.header, answer.log, epoch=answer.epoch, worker=self.name,
                weights_id=self.card.weights_id, numerics_id=self.card.numerics_id)
            if epoch:
                answer.epoch = epoch
            elif job_id in self._answers:               # it may have been refused meanwhile
                self._drop(job_id)
        self._publish_sequence = 1

    def _drop(self, job_id: str) -> None:
        log.info("job %s is not ours any more", job_id)
        self._sees_line = True                          # where it may be
        del self._answers[job_id]
        if compiling := self._compiling.pop(job_id, None):
            compiling.cancel()
        self.engine.abort(job_id)

    # ── what others see ──

    async def _listen(self) -> None:
        async for _ in connection.listen(self.settings.redis_url, [self.queue.shard.key("wake")]):
            self._wake.set()

    def _announce(self) -> None:
        """Called by the loop, so that a worker that hangs is no longer announced."""
        now_s = time.monotonic()
        passed_s = now_s - self._announced_s
        if passed_s < self.settings.announce_s or (self._announcing and not self._announcing.done()):
            return
        tokens_per_s, self._num_tokens, self._announced_s = self._num_tokens / passed_s, 0, now_s
        self._announcing = asyncio.create_task(self._say(tokens_per_s))

    async def _say(self, tokens_per_s: float) -> None:
        redis, key, ttl_ms = self.queue.redis, self.queue.shard.key, round(self.settings.announce_ttl_s * 1000)
        try:
            seconds, micros = await redis.time()
            now_ms = seconds * 1000 + micros // 1000
            word = Announcement(self.queue.shard.id, self._names, self._card_hash, now_ms + ttl_ms,
                                (self.card.max_model_len, self.card.max_num_seqs))
            raw: Any = await redis.hget(DIRECTORY, word.shard)
            async with redis.pipeline(transaction=False) as pipe:
                pipe.hset(key(f"worker:{self.name}"), mapping=self._portrait(tokens_per_s))
                pipe.pexpire(key(f"worker:{self.name}"), ttl_ms)
                pipe.set(key(f"card:{self._card_hash}"), self._card_bytes, px=ttl_ms)
                if not ((heard := _heard(raw)) and word.yields_to(heard, now_ms)):
                    pipe.hset(DIRECTORY, word.shard, word.encode())
                pipe.hgetall(DIRECTORY)
                *_, fields = await pipe.execute()
            stale = [field for field, raw in fields.items() if _is_forgotten(raw, now_ms)]
            if stale:
                await redis.hdel(DIRECTORY, *stale)
        except connection.TROUBLE as error:
            log.warning("announce: Redis is away (%s)", type(error).__name__)

    def _portrait(self, tokens_per_s: float) -> dict[Any, Any]:
        step_ms = sorted(1000 * step_s for step_s in self._step_s) or [0.0]
        return {"name": self.name, "model": self._names[0], "host": socket.gethostname(), "pid": os.getpid(),
                "num_running": self.engine.num_running, "num_waiting": self.engine.num_waiting,
                "num_preempted": self.engine.num_preempted, "num_draft_tokens": self.engine.num_draft_tokens,
                "num_accepted_tokens": self.engine.num_accepted_tokens, "num_jobs": len(self._answers),
                "tokens_per_s": round(tokens_per_s, 1),
                "step_p50_ms": round(step_ms[len(step_ms) // 2], 2),
                "step_p99_ms": round(step_ms[int(len(step_ms) * 0.99)], 2),
                "card": self._card_hash, "weights_id": self.card.weights_id, "numerics_id": self.card.numerics_id,
                "engine": repr(self.engine), "leaving": "yes" if self._stopping.is_set() else ""}


def _heard(announcement: bytes | None) -> Announcement | None:
    """None also for one of another version."""
    with contextlib.suppress(ValueError):
        return Announcement.decode(announcement) if announcement else None
    return None


def _is_forgotten(announcement: bytes, now_ms: int) -> bool:
    """Whether no worker has served its model for `FORGET_MODEL_S`. Those of another version are left to its workers."""
    heard = _heard(announcement)
    return heard is not None and heard.expires_ms < now_ms - FORGET_MODEL_S * 1000
