"""The loop on a real Redis with the built-in model: what it does with bad jobs, with a Redis that dies, at its end."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis
from redis.exceptions import RedisError

from deploy.redis import RedisServer
from shared import connection
from shared.card import Announcement, Card
from shared.errors import StreamLost
from shared.grammar import of_regex, of_schema
from shared.job import Delta, Entry, Finish, Header, Job, Sampling, Usage, encode_deltas
from shared.keys import DIRECTORY, new_completion_id
from shared.queue import Claims, Write
from shared.settings import Settings
from tests.system import eventually
from tests.worker.engine.driver import alone
from worker import tiny
from worker.announce import make_card
from worker.engine.engine import Engine, Request
from worker.model.loading import load
from worker.worker import Worker

HEADER = Header(model="m", created_s=1, fingerprint="fp", seed=1, n=1, num_prompt_tokens=3)
WAIT_S = 60.0                                           # other tests and other tenants want the cores too
NUM_TOKENS = 120
NUM_SLOW_KEYS = 20_000                                  # that a Redis loads one by one; between some it says so
PROMPT = (72, 105)
SAMPLED = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True, seed=3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load(str(tiny.MODEL_FOLDER)), max_num_seqs=4)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[int]:
    """What a sampled job says when nothing happens to it."""
    return alone(engine, Request("uninterrupted", PROMPT, SAMPLED))[0]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "r").start()
    yield server
    server.stop()


def settings_of(server: RedisServer) -> Settings:
    return Settings(redis_url=server.url, lease_s=1.0, idle_poll_s=0.1, announce_s=0.1, flush_s=0.0)


@pytest.fixture
async def worker(engine: Engine, server: RedisServer) -> AsyncIterator[Worker]:
    redis = connection.connect(server.url)
    worker = Worker(settings_of(server), redis, engine, make_card("m", engine), ("m",))
    running = asyncio.create_task(worker.run())
    yield worker
    worker.stop()
    await running
    for job_id in list(worker._answers):                # handed over; the engine outlives its worker here alone
        engine.abort(job_id)
    engine.check()
    assert not engine.has_work
    await redis.aclose()


def make_job(worker: Worker, **changes: Any) -> Job:
    job = Job(id=new_completion_id(worker.queue.shard), tenant="t", pod="p", prompt_token_ids=PROMPT,
              sampling=Sampling(max_tokens=40, ignore_eos=True), tokenizer_id=worker.card.tokenizer_id,
              weights_id=worker.card.weights_id)
    return replace(job, **changes)


async def ask(worker: Worker, job: Job) -> None:
    await worker.queue.submit(job, HEADER)


async def read_until(worker: Worker, job: Job, enough: Callable[[list[Entry]], bool]) -> list[Entry]:
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(StreamLost, connection.NotNow):    # until it is put back, and Redis reads again
                if enough(entries := await worker.queue.read(job.id)):
                    return entries
            await asyncio.sleep(0.01)


def has_grown(num_entries: int, entries: list[Entry]) -> bool:
    return len(entries) >= num_entries


def has_reached(epoch: int, entries: list[Entry]) -> bool:
    return entries[-1].epoch == epoch


def ended(entries: list[Entry]) -> bool:
    return entries[-1].kind == "end"


def token_ids(entries: list[Entry]) -> list[int]:
    return [token_id for e in entries if e.kind == "delta" for delta in e.deltas for token_id in delta.token_ids]


@pytest.mark.parametrize("wrong", [
    {"prompt_token_ids": (10**6,)},
    {"prompt_token_ids": ()},
    {"prompt_token_ids": (1,) * 5000},
    {"sampling": Sampling(max_tokens=4, logit_bias=((10**6, 1.0),))},
    {"sampling": Sampling(max_tokens=4, stop_token_ids=(10**6,))},
    {"n": 5},
], ids=["id outside the vocabulary", "empty prompt", "too long", "bias outside", "stop outside", "too many choices"])
async def test_a_job_that_could_harm_the_batch_ends_alone(worker: Worker, wrong: dict[str, Any]) -> None:
    """The API refuses these; the worker checks again, and the healthy job beside it does not notice."""
    healthy, poison = make_job(worker), make_job(worker, **wrong)
    await ask(worker, healthy)
    await ask(worker, poison)
    if "n" in wrong or len(poison.prompt_token_ids) > worker.card.max_model_len:
        # No worker of this size ever claims it: its deadline ends it, or a larger worker takes it.
        assert len(token_ids(await read_until(worker, healthy, ended))) == 40
        assert (await worker.queue.describe(poison.id))["state"] == "queued"
        await worker.queue.cancel(poison.id)
        return
    assert (await read_until(worker, poison, ended))[-1].finish.error == "job_failed"
    assert len(token_ids(await read_until(worker, healthy, ended))) == 40


async def test_a_job_of_another_version_is_given_up(worker: Worker) -> None:
    job = make_job(worker, version=99)
    await ask(worker, job)
    assert (await read_until(worker, job, ended))[-1].finish.error == "job_failed"


async def test_an_answer_that_lacks_only_its_terminal_gets_it(engine: Engine, server: RedisServer) -> None:
    """A worker died between the last token and the end: its heir computes nothing and ends the stream."""
    redis = connection.connect(server.url)
    heir = Worker(Settings(redis_url=server.url), redis, engine, make_card("m", engine), ("m",))
    job, card = make_job(heir), heir.card
    await ask(heir, job)
    (claimed,) = (await heir.queue.claim("dead", 1, 1, tokenizer_id=card.tokenizer_id, weights_id=card.weights_id,
                                         numerics_id=card.numerics_id)).jobs
    last = encode_deltas([Delta(0, (72, 105), "Hi", "stop")])
    await heir.queue.publish("dead", [Write(job.id, claimed.epoch, 1, 2, "delta", last)])
    await heir.queue.release("dead")
    running = asyncio.create_task(heir.run())
    entries = await read_until(heir, job, ended)
    assert entries[-1].finish == Finish(Usage(2, 2))
    heir.stop()
    await running
    await redis.aclose()


async def test_a_worker_without_numbers_hands_its_jobs_over(
        engine: Engine, server: RedisServer, expected: list[int]) -> None:
    """Only the one that met them has used up an attempt; with whole weights both are what they would have been."""
    model = load(str(tiny.MODEL_FOLDER))
    poison = next(i for i in range(model.vocab_size) if i not in (*expected, *PROMPT))
    with torch.no_grad():
        model.module.get_input_embeddings().weight[poison] = float("nan")
    spoilt, redis, settings = Engine(model, max_num_seqs=4), connection.connect(server.url), settings_of(server)
    broken = Worker(settings, redis, spoilt, make_card("m", spoilt), ("m",))
    healthy, sick = make_job(broken, sampling=SAMPLED), make_job(broken, prompt_token_ids=(72, poison))
    running = asyncio.create_task(broken.run())
    await ask(broken, healthy)
    await read_until(broken, healthy, partial(has_grown, 4))
    await ask(broken, sick)
    async with asyncio.timeout(WAIT_S):
        await running
    assert broken.is_broken
    states = [await broken.queue.describe(job.id) for job in (healthy, sick)]
    assert [(state["state"], state["attempts"]) for state in states] == [("queued", "0"), ("queued", "1")]
    heir = Worker(settings, redis, engine, make_card("m", engine), ("m",))
    running = asyncio.create_task(heir.run())
    assert token_ids(await read_until(heir, healthy, ended)) == expected
    assert len(token_ids(await read_until(heir, sick, ended))) == 40
    heir.stop()
    await running
    await redis.aclose()


async def test_a_redis_that_restarts_costs_no_token(
        worker: Worker, server: RedisServer, expected: list[int]) -> None:
    """Killed and started again on its AOF in mid-stream: the log goes on where it was, with the same tokens."""
    job = make_job(worker, sampling=SAMPLED)
    await ask(worker, job)
    await read_until(worker, job, lambda entries: len(entries) > 3)
    server.kill()
    server.start()
    entries = await read_until(worker, job, ended)
    assert token_ids(entries) == expected
    assert [entry.position for entry in entries] == list(range(len(entries)))


def comes_back_slowly(server: RedisServer) -> float:
    """Killed, and back, answering LOADING for the seconds that are returned."""
    with Redis.from_url(server.url) as redis:
        pipe = redis.pipeline(transaction=False)
        for number in range(NUM_SLOW_KEYS):
            pipe.set(f"slow:{number}", "")
        pipe.execute()
    server.kill()
    server.options = ("--key-load-delay", str(2_000_000 // NUM_SLOW_KEYS))
    server.start()
    loaded = re.findall(r"loaded from append only file: ([\d.]+) seconds", (server.folder / "redis.log").read_text())
    return float(loaded[-1])


async def test_a_redis_that_loads_is_waited_for(worker: Worker, server: RedisServer, expected: list[int]) -> None:
    job = make_job(worker, sampling=SAMPLED)
    await ask(worker, job)
    await read_until(worker, job, partial(has_grown, 4))
    assert await asyncio.to_thread(comes_back_slowly, server) > 1
    assert token_ids(await read_until(worker, job, ended)) == expected


def forgets(server: RedisServer) -> None:
    server.kill()
    for path in server.folder.glob("appendonly*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    server.start()


def flushes(server: RedisServer) -> None:
    with Redis.from_url(server.url) as redis:
        redis.flushall()


def drops_the_log(server: RedisServer) -> None:
    with Redis.from_url(server.url) as redis:
        redis.delete(*redis.keys("*:out:*"))


def drops_the_group(server: RedisServer) -> None:
    with Redis.from_url(server.url) as redis:
        redis.delete("", *redis.keys("*:jobs"))


def flushes_scripts(server: RedisServer) -> None:
    with Redis.from_url(server.url) as redis:
        redis.script_flush()


@pytest.mark.parametrize("loses", [forgets, flushes, drops_the_log, drops_the_group, flushes_scripts])
async def test_what_redis_loses_its_worker_puts_back(worker: Worker, server: RedisServer, expected: list[int],
                                                     loses: Callable[[RedisServer], None]) -> None:
    """In mid-stream, twice: the log is whole again, with the same tokens, and another job is served as well."""
    job, after = (make_job(worker, sampling=SAMPLED, created_s=int(time.time())) for _ in range(2))
    await ask(worker, job)
    for num_entries in (4, 9):
        await read_until(worker, job, partial(has_grown, num_entries))
        await asyncio.to_thread(loses, server)
    entries = await read_until(worker, job, ended)
    assert token_ids(entries) == expected
    assert [entry.position for entry in entries] == list(range(len(entries)))
    await ask(worker, after)
    assert token_ids(await read_until(worker, after, ended)) == expected


@pytest.mark.parametrize("loses", [flushes, drops_the_log])
async def test_a_redis_that_flickers_while_it_is_put_back_costs_nothing(
        worker: Worker, server: RedisServer, expected: list[int], loses: Callable[[RedisServer], None],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers the first of several answers, and is away for the second: no log has a hole, and the worker stays."""
    jobs = [make_job(worker, sampling=SAMPLED, created_s=int(time.time())) for _ in range(3)]
    for job in jobs:
        await ask(worker, job)
    for job in jobs:
        await read_until(worker, job, partial(has_grown, 4))
    restore, num_asked = worker.queue.restore, 0

    async def flickers(*args: Any, **options: Any) -> int | None:
        nonlocal num_asked
        num_asked += 1
        if num_asked in (2, 4):
            raise connection.NotNow("LOADING")
        return await restore(*args, **options)

    monkeypatch.setattr(worker.queue, "restore", flickers)
    await asyncio.to_thread(loses, server)
    for job in jobs:
        entries = await read_until(worker, job, ended)
        assert token_ids(entries) == expected
        assert [entry.position for entry in entries] == list(range(len(entries)))
    assert num_asked > 4


async def pretend(worker: Worker, *weights_ids: str, leaves: bool = False) -> None:
    """That other workers serve the model, with these weights; the first of them may be leaving."""
    redis, key = worker.queue.redis, worker.queue.shard.key
    for number, weights_id in enumerate(weights_ids):
        await redis.zadd(key("leases"), {f"other{number}": 2 ** 45})
        await redis.hset(key(f"worker:other{number}"), mapping={
            "name": f"other{number}", "weights_id": weights_id, "leaving": "yes" if leaves and not number else ""})


async def until_queued(worker: Worker, job: Job) -> None:
    async with asyncio.timeout(WAIT_S):
        while (await worker.queue.describe(job.id))["state"] != "queued":
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("drain_s", "others", "leaves", "stays"), [
    (30.0, ["new"], False, True), (0.0, ["new"], False, False), (30.0, ["same"], False, False),
    (30.0, ["same", "new"], True, True), (30.0, ["same"], True, False)],
    ids=["last", "no time", "not the last", "both last", "everybody leaves"])
async def test_the_last_worker_with_its_weights_ends_what_it_has_begun(
        worker: Worker, expected: list[int], drain_s: float, others: list[str], leaves: bool, stays: bool) -> None:
    """In a rolling change of weights, for a while; what waits is left to others. One that has its weights goes on."""
    worker.settings = worker.settings.model_copy(update={"drain_s": drain_s})
    begun = make_job(worker, sampling=SAMPLED)
    await ask(worker, begun)
    await read_until(worker, begun, partial(has_grown, 4))
    await pretend(worker, *(worker.card.weights_id if each == "same" else each for each in others), leaves=leaves)
    worker.stop()
    await ask(worker, late := make_job(worker))
    if stays:
        assert token_ids(entries := await read_until(worker, begun, ended)) == expected and entries[-1].epoch == 1
    else:
        await until_queued(worker, begun)
        assert not ended(await worker.queue.read(begun.id))
    assert (await worker.queue.describe(late.id))["state"] == "queued"


async def test_the_last_worker_ends_what_others_with_its_weights_had_begun(
        worker: Worker, engine: Engine, expected: list[int]) -> None:
    """They were handed over, and nobody had room; what waits and has not begun is left to others."""
    begun = make_job(worker, sampling=SAMPLED)
    await ask(worker, begun)
    await read_until(worker, begun, partial(has_grown, 4))
    await pretend(worker, worker.card.weights_id)
    worker.stop()
    await until_queued(worker, begun)
    engine.abort(begun.id)
    await pretend(worker, "new")
    await ask(worker, late := make_job(worker))
    last = Worker(worker.settings, worker.queue.redis, engine, worker.card, ("m",))
    last.stop()
    await last.run()
    assert token_ids(entries := await worker.queue.read(begun.id)) == expected and entries[-1].epoch > 1
    assert (await worker.queue.describe(late.id))["state"] == "queued"


@pytest.mark.parametrize("is_hurried", [False, True])
async def test_the_last_worker_waits_for_redis_unless_it_is_asked_again(
        worker: Worker, engine: Engine, expected: list[int], server: RedisServer, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture, is_hurried: bool) -> None:
    step = engine.step

    def slowly() -> Any:
        time.sleep(0.01)
        return step()

    monkeypatch.setattr(engine, "step", slowly)
    await ask(worker, begun := make_job(worker, sampling=SAMPLED))
    await read_until(worker, begun, partial(has_grown, 4))
    await pretend(worker, "new")
    worker.stop()
    async with asyncio.timeout(WAIT_S):
        while not worker._is_draining:
            await asyncio.sleep(0.01)
    if is_hurried:
        worker.stop()
        await until_queued(worker, begun)
        assert not ended(await worker.queue.read(begun.id))
    else:
        server.kill()
        async with asyncio.timeout(WAIT_S):
            while "publish: Redis is away" not in caplog.text:
                await asyncio.sleep(0.01)
        server.start()
        assert token_ids(await read_until(worker, begun, ended)) == expected


async def test_what_it_puts_down_is_claimed_again(worker: Worker, expected: list[int]) -> None:
    """Silent for too long to put anything back, it drops its jobs, but still renews the lease that holds them."""
    worker.settings = worker.settings.model_copy(update={"retain_s": 0.0})
    job = make_job(worker, sampling=SAMPLED)
    await ask(worker, job)
    await read_until(worker, job, partial(has_grown, 4))
    await worker.queue.redis.delete(worker.queue.shard.key(f"sequence:{worker.name}"))
    entries = await read_until(worker, job, ended)
    assert token_ids(entries) == expected and entries[-1].epoch > 1


async def test_who_compiles_a_form_holds_nobody_up(worker: Worker) -> None:
    """Seconds for this one, which no trial would let pass."""
    form = of_schema({"type": "integer", "multipleOf": 300_007})
    slow = make_job(worker, sampling=Sampling(max_tokens=4, grammar=form))
    await ask(worker, slow)
    async with asyncio.timeout(WAIT_S):
        while slow.id not in worker._compiling:
            await asyncio.sleep(0.001)
    quick = make_job(worker)
    await ask(worker, quick)
    await read_until(worker, quick, ended)
    assert slow.id in worker._compiling
    assert (await read_until(worker, slow, ended))[-1].epoch == 1


async def test_it_puts_down_a_cancelled_job_that_has_said_nothing(worker: Worker) -> None:
    job, is_free = make_job(worker, sampling=Sampling(max_tokens=4, grammar=of_regex("[ab]{9}"))), threading.Event()
    worker._compiler.submit(is_free.wait)
    try:
        await ask(worker, job)
        async with asyncio.timeout(WAIT_S):
            while job.id not in worker._compiling:
                await asyncio.sleep(0.001)
            await worker.queue.cancel(job.id)
            while worker._answers or worker._compiling:
                await asyncio.sleep(0.001)
    finally:
        is_free.set()


async def test_a_form_that_is_compiled_waits_for_no_other(worker: Worker) -> None:
    form, is_free = Sampling(max_tokens=4, grammar=of_regex("[ab]{9}")), threading.Event()
    try:
        for _ in range(2):
            job = make_job(worker, sampling=form)
            await ask(worker, job)
            assert len(token_ids(await read_until(worker, job, ended))) == 4
            worker._compiler.submit(is_free.wait)
    finally:
        is_free.set()


@contextlib.contextmanager
def without_memory(server: RedisServer) -> Iterator[None]:
    with Redis.from_url(server.url) as redis:
        redis.config_set("maxmemory", 1)
        yield
        redis.config_set("maxmemory", 0)


@contextlib.contextmanager
def read_only(server: RedisServer) -> Iterator[None]:
    with Redis.from_url(server.url) as redis:
        redis.replicaof("127.0.0.1", 1)
        yield
        redis.replicaof("NO", "ONE")


@contextlib.contextmanager
def busy(server: RedisServer) -> Iterator[None]:
    """Somebody else's script does not end."""
    with Redis.from_url(server.url) as redis, Redis.from_url(server.url, retry=None, socket_timeout=0.2) as other:
        redis.config_set("lua-time-limit", 100)
        with contextlib.suppress(RedisError):
            other.eval("while true do end", 0)
        yield
        redis.script_kill()


@contextlib.contextmanager
def without_a_disk(server: RedisServer) -> Iterator[None]:
    """A snapshot failed, and Redis takes no writes until one succeeds."""
    with Redis.from_url(server.url) as redis:
        (server.folder / "dump.rdb").mkdir()
        redis.config_set("save", "3600 1")
        with contextlib.suppress(RedisError):
            redis.save()
        redis.bgsave()
        eventually("the snapshot has failed", lambda: redis.info("persistence")["rdb_last_bgsave_status"] == "err")
        yield
        (server.folder / "dump.rdb").rmdir()
        redis.config_set("save", "")


@contextlib.contextmanager
def stopped(server: RedisServer) -> Iterator[None]:
    assert server.process
    server.process.send_signal(signal.SIGSTOP)
    yield
    server.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def cut(server: RedisServer) -> Iterator[None]:
    with Redis.from_url(server.url) as redis:
        for kind in ("normal", "pubsub"):
            redis.client_kill_filter(_type=kind, skipme=True)
        yield


@pytest.mark.parametrize("trouble", [without_memory, read_only, busy, without_a_disk, stopped, cut])
async def test_what_redis_refuses_for_a_while_costs_nothing(
        worker: Worker, server: RedisServer, caplog: pytest.LogCaptureFixture, expected: list[int],
        trouble: Callable[[RedisServer], contextlib.AbstractContextManager[None]]) -> None:
    """Longer than a lease, in mid-stream: afterwards the same worker goes on, with the same tokens."""
    job = make_job(worker, sampling=SAMPLED)
    await ask(worker, job)
    await read_until(worker, job, partial(has_grown, 4))
    with trouble(server):
        await asyncio.sleep(1.5 * worker.settings.lease_s)
    assert ("publish: Redis is away" in caplog.text) == (trouble not in (stopped, cut)), "redis-py waits or reconnects"
    entries = await read_until(worker, job, ended)
    assert token_ids(entries) == expected
    assert [entry.position for entry in entries] == list(range(len(entries)))


async def test_a_worker_that_gets_its_own_lost_job_back_goes_on_with_it(
        worker: Worker, expected: list[int]) -> None:
    """Taken from it in mid-stream and claimed by it again before a refusal has told it: nothing is lost or doubled."""
    job = make_job(worker, sampling=SAMPLED)
    await ask(worker, job)
    for epoch in (1, 3, 5):
        await read_until(worker, job, partial(has_reached, epoch))
        assert await worker.queue.release(worker.name, [job.id]) == 1
    entries = await read_until(worker, job, ended)
    assert token_ids(entries) == expected
    assert [entry.position for entry in entries] == list(range(len(entries)))


async def test_a_forgotten_worker_keeps_what_it_claims_while_a_late_reply_says_it_lost_it(
        worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease ends, all it holds is in line again and its own once more, and only then it hears of the loss."""
    job = make_job(worker, sampling=SAMPLED)
    restore, claim = worker.queue.restore, worker.queue.claim
    restored = asyncio.Event()

    async def restore_and_answer_late(*args: Any, **kwargs: Any) -> int | None:
        epoch = await restore(*args, **kwargs)
        restored.set()
        await asyncio.sleep(0.3)
        return epoch

    async def claim_after_it(*args: Any, **kwargs: Any) -> Claims:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(restored.wait(), 0.3)
        return await claim(*args, **kwargs)

    await ask(worker, job)
    await read_until(worker, job, partial(has_reached, 1))
    monkeypatch.setattr(worker.queue, "restore", restore_and_answer_late)
    monkeypatch.setattr(worker.queue, "claim", claim_after_it)
    for epoch in (1, 3, 5):
        await read_until(worker, job, partial(has_reached, epoch))
        restored.clear()
        assert await worker.queue.release(worker.name) == 1
        async with asyncio.timeout(WAIT_S):
            await restored.wait()                       # its publishes are not counted any more: it puts back
    await read_until(worker, job, ended)
    assert not await worker.queue.redis.exists(worker.queue.shard.key(f"held:{worker.name}"))


async def test_a_job_that_lost_its_worker_runs_alone_until_it_has_a_new_token(worker: Worker) -> None:
    """Then it is no poison, and others run beside it."""
    queue, suspect = worker.queue, make_job(worker, sampling=Sampling(max_tokens=1500, ignore_eos=True))
    await ask(worker, suspect)
    await read_until(worker, suspect, partial(has_reached, 1))
    # As when its worker had died before the first token of this claim.
    hash_key = queue.shard.key(f"job:{suspect.id}")
    await queue.redis.hset(hash_key, mapping={"claim_position": 10**6, "attempts": 1})
    await queue.release(worker.name, [suspect.id])
    await read_until(worker, suspect, partial(has_reached, 3))
    assert (await queue.describe(suspect.id))["attempts"] == "1"
    beside = make_job(worker, sampling=Sampling(max_tokens=4))
    await ask(worker, beside)
    await read_until(worker, beside, ended)
    assert (await queue.describe(suspect.id))["state"] == "running"
    await queue.cancel(suspect.id)


async def test_a_cancelled_job_leaves_the_engine_within_a_step(worker: Worker) -> None:
    job = make_job(worker, sampling=Sampling(max_tokens=1500, ignore_eos=True))
    await ask(worker, job)
    await read_until(worker, job, lambda entries: len(entries) > 2)
    assert await worker.queue.cancel(job.id)
    async with asyncio.timeout(WAIT_S):
        while worker.engine.num_running:
            await asyncio.sleep(0.01)


async def test_the_card_says_what_the_api_must_know(worker: Worker) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await worker.queue.redis.hget(DIRECTORY, worker.queue.shard.id):
            await asyncio.sleep(0.01)
    raw: Any = await worker.queue.redis.hget(DIRECTORY, worker.queue.shard.id)
    announcement = Announcement.decode(raw)
    packed: Any = await worker.queue.redis.get(worker.queue.shard.key(f"card:{announcement.card_hash}"))
    assert Card.unpack(announcement.card_hash, packed) == worker.card
    assert announcement.names == ("m",)
    (portrait,) = await worker.queue.workers()
    assert portrait["name"] == worker.name


async def test_it_reports_how_long_its_steps_take(worker: Worker) -> None:
    """And its weights, by which others know whether they could go on with its answers."""
    await ask(worker, job := make_job(worker))
    await read_until(worker, job, ended)
    async with asyncio.timeout(WAIT_S):
        while not float((portrait := (await worker.queue.workers())[0]).get("step_p50_ms", 0)):
            await asyncio.sleep(0.01)
    assert 0 < float(portrait["step_p50_ms"]) <= float(portrait["step_p99_ms"]) < WAIT_S * 1000
    assert portrait["weights_id"] == worker.card.weights_id


async def test_the_card_of_the_longest_context_counts(worker: Worker) -> None:
    """While its worker is there: what one of them can compute is no bad request."""
    redis, shard, ours = worker.queue.redis, worker.queue.shard.id, worker.card.max_model_len

    async def announcement() -> Announcement:
        raw: Any = await redis.hget(DIRECTORY, shard)
        return Announcement.decode(raw)

    async def announced(card_hash: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while not await redis.hexists(DIRECTORY, shard) or (await announcement()).card_hash != card_hash:
                await asyncio.sleep(0.01)

    card_hash, _ = worker.card.pack()
    await announced(card_hash)
    for length, lasts_ms in ((ours + 1, 1000), (ours - 1, 60_000)):
        now_ms = int(time.time() * 1000)
        other = Announcement(shard, ("m",), "other", now_ms + lasts_ms, (length, 1))
        await redis.hset(DIRECTORY, shard, other.encode())
        if length > ours:
            await redis.delete(portrait := worker.queue.shard.key(f"worker:{worker.name}"))
            async with asyncio.timeout(WAIT_S):
                while not await redis.exists(portrait):     # it has announced itself again
                    await asyncio.sleep(0.01)
            assert (await announcement()).card_hash == "other"
        await announced(card_hash)


def test_a_card_whose_bytes_were_changed_is_refused(engine: Engine) -> None:
    card_hash, packed = make_card("m", engine).pack()
    with pytest.raises(ValueError, match="hash"):
        Card.unpack("0" * 64, packed)
    assert Card.unpack(card_hash, packed).model == "m"
