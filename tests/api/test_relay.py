"""One stream's view of its log on a real Redis: whatever the pushes do, every entry once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from api import delivered as delivered_module
from api.delivered import MAX_PUT_BACKS, Delivered
from api.relay import READ_LIMIT, Relay, Stream
from shared import connection
from shared.errors import Cancelled, DeadlineExceeded, StreamLost
from shared.job import Entry, Header, Job, Sampling
from shared.keys import new_completion_id
from shared.queue import Queue
from shared.settings import Settings
from tests.api.scripted import WAIT_S, Script, ScriptedWorker, say, until

SETTINGS = Settings(max_pending_entries=3, sweep_s=0.5, heartbeat_s=1.0)
HEADER = Header(model="m", created_s=1, fingerprint="fp", seed=1, n=1, num_prompt_tokens=1)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    redis = connection.connect(redis_url)
    yield redis
    await redis.aclose()


async def make_script(redis: Redis) -> Script:
    worker = ScriptedWorker(redis)
    job = Job(id=new_completion_id(worker.queue.shard), tenant="t", pod="p", prompt_token_ids=(1,),
              sampling=Sampling(max_tokens=10), tokenizer_id=worker.card.tokenizer_id,
              weights_id=worker.card.weights_id)
    await worker.queue.submit(job, HEADER)
    return await worker.claim()


async def log_of(script: Script) -> list[Entry]:
    return await script.worker.queue.read(script.job.id)


class Reader:
    """Takes what a stream gives, as a client's response does."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.entries: list[Entry] = []
        self.num_heartbeats = 0
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for entries in self.stream.batches():
            self.entries += entries
            self.num_heartbeats += not entries
            if entries and entries[-1].kind == "end":
                return

    async def end(self) -> list[int]:
        """The positions that came, without the header's, once the stream has ended."""
        await asyncio.wait_for(self.task, WAIT_S)
        return self.positions

    @property
    def positions(self) -> list[int]:
        return [entry.position for entry in self.entries if entry.position]


NUM_ENTRIES = 8
mishaps = st.lists(st.lists(st.integers(1, NUM_ENTRIES), max_size=6), max_size=6)


@given(bursts=mishaps)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lost_repeated_and_reordered_pushes_give_each_entry_once(redis_url: str, bursts: list[list[int]]) -> None:
    """Any pushes in any order, in any bursts, then silence: the log has what they left out."""
    asyncio.run(give_each_once(redis_url, bursts))


async def give_each_once(redis_url: str, bursts: list[list[int]]) -> None:
    async with connection.connect(redis_url) as redis:
        script = await make_script(redis)
        await script.answer("x" * (NUM_ENTRIES - 2))
        log = await log_of(script)
        reader = Reader(Stream(script.job.id, script.worker.queue, SETTINGS, Delivered()))
        for burst in bursts:
            for position in burst:
                reader.stream.push(log[position])
            await asyncio.sleep(0)                      # the reader may take what has come, or be in the middle of it
        reader.stream.tick(SETTINGS.sweep_s)
        assert await reader.end() == list(range(1, NUM_ENTRIES + 1))
        await redis.delete(script.worker.queue.shard.key(f"out:{script.job.id}"))


async def test_pushes_in_order_need_no_look_into_the_log(redis: Redis) -> None:
    """The log is gone, and nobody notices."""
    script = await make_script(redis)
    await script.answer("Hello")
    log = await log_of(script)
    await redis.delete(script.worker.queue.shard.key(f"out:{script.job.id}"))
    reader = Reader(Stream(script.job.id, script.worker.queue, SETTINGS, Delivered()))
    for entry in log:
        reader.stream.push(entry)
        await asyncio.sleep(0)
    assert await reader.end() == list(range(1, len(log)))


async def test_what_a_slow_reader_leaves_waiting_is_bounded(redis: Redis) -> None:
    """More than `max_pending_entries` are not kept: they are read from the log when the reader comes back."""
    script = await make_script(redis)
    await script.answer("a longer answer")
    log = await log_of(script)
    stream = Stream(script.job.id, script.worker.queue, SETTINGS, Delivered())
    for entry in log:
        stream.push(entry)
    assert len(stream._pending) == SETTINGS.max_pending_entries
    assert await Reader(stream).end() == list(range(1, len(log)))


async def test_a_log_longer_than_one_look_is_read_to_its_end(redis: Redis) -> None:
    """No push and no further sweep: fences, which make a look seem short, do not end it early."""
    script = await make_script(redis)
    await script.say(say("a"))
    await script.worker.queue.release("scripted-1")
    script = await script.worker.claim()
    await script.answer("b" * (READ_LIMIT + 20))
    reader = Reader(Stream(script.job.id, script.worker.queue, SETTINGS, Delivered()))
    reader.stream.look()
    assert await reader.end() == list(range(1, READ_LIMIT + 24))


async def test_a_log_that_is_gone_is_an_error(redis: Redis) -> None:
    reader = Reader(Stream("chatcmpl-none", ScriptedWorker(redis).queue, SETTINGS, Delivered()))
    reader.stream.look()
    with pytest.raises(StreamLost):
        await reader.end()


async def keys_of(script: Script) -> list[bytes]:
    tag = script.worker.queue.shard.tag
    return [key async for key in script.worker.queue.redis.scan_iter(f"{tag}:*")]


def reading(script: Script) -> Reader:
    """A reader of a pod that submitted the job."""
    reader = Reader(Stream(script.job.id, script.worker.queue, SETTINGS, Delivered(script.job, HEADER.encode())))
    reader.stream.look()
    return reader


async def delivered(reader: Reader, position: int) -> None:
    await until("it is delivered", lambda: reader.entries and reader.entries[-1].position == position)


async def test_what_redis_has_lost_is_put_back_and_goes_on(redis: Redis) -> None:
    """Everything of the shard is gone, twice: a worker finds the job in line, as far as it was delivered."""
    script = await make_script(redis)
    reader = reading(script)
    for number, text in enumerate("ab", start=1):
        await script.say(say(text))
        reader.stream.look()
        await delivered(reader, number)
        await redis.delete(*await keys_of(script))
        reader.stream.look()
        script = await script.worker.claim()
        assert script.claimed.position == number
    await script.answer("c")
    reader.stream.look()
    assert await reader.end() == [1, 2, 3, 4, 5]
    assert text_of(reader.entries) == text_of(await log_of(script)) == "abc"


async def test_a_redis_that_went_back_does_not_tell_another_story(redis: Redis) -> None:
    """Entries that were delivered are unknown to it, and a worker has gone on from before them in other pieces: what
    was delivered stands, and what is pushed under a new epoch is not taken before the log was asked."""
    script = await make_script(redis)
    reader = reading(script)
    older: dict[bytes, Any] = {key: await redis.dump(key) for key in await keys_of(script)}
    for text in ("He", "ll"):
        await script.say(say(text))
    reader.stream.look()
    await delivered(reader, 2)
    await redis.delete(*await keys_of(script))
    for key, value in older.items():
        await redis.restore(key, 0, value)
    await script.worker.queue.release("scripted-1")
    other = await script.worker.claim()
    for text in ("H", "e", "l"):
        await other.say(say(text))
    for entry in (await log_of(other))[1:]:
        reader.stream.push(entry)
    heir = await script.worker.claim()
    assert heir.claimed.position == 2, "as delivered, not as the other worker had it"
    await heir.say(say("o", end=True))
    await heir.end()
    reader.stream.look()
    assert await reader.end() == [1, 2, 3, 4]
    assert text_of(reader.entries) == "Hello"


async def test_only_the_weights_that_began_an_answer_go_on_with_what_is_put_back(redis: Redis) -> None:
    """They may be others than the job names: those of the card on which it was made, in a rolling change of weights."""
    script = await make_script(redis)
    reader = reading(script)
    await script.say(replace(say("a"), weights_id="new"))
    reader.stream.look()
    await delivered(reader, 1)
    await redis.delete(*await keys_of(script))
    reader.stream.look()
    queue = script.worker.queue
    like: dict[str, Any] = {"tokenizer_id": script.job.tokenizer_id, "numerics_id": "n"}
    await until_waiting(queue, script.job)
    assert not (await queue.claim("old", 1, 8, weights_id=script.job.weights_id, **like)).jobs
    assert [claimed.position for claimed in (await queue.claim("new", 1, 8, weights_id="new", **like)).jobs] == [1]
    reader.task.cancel()


async def until_waiting(queue: Queue, job: Job) -> None:
    async with asyncio.timeout(WAIT_S):
        while (await queue.describe(job.id)).get("state") != "queued":
            await asyncio.sleep(0.01)


async def test_a_cancelled_answer_whose_log_has_expired_is_not_put_back(redis: Redis) -> None:
    """Its terminal was pushed to a stream without room, whose client reads on after that."""
    script = await make_script(redis)
    for text in "abcd":
        await script.say(say(text))
    assert await script.worker.queue.cancel(script.job.id)
    log = await log_of(script)
    await redis.delete(*await keys_of(script))
    stream = Stream(script.job.id, script.worker.queue, SETTINGS, Delivered(script.job, HEADER.encode()))
    for entry in log:
        stream.push(entry)
    with pytest.raises(Cancelled):
        await Reader(stream).end()
    assert not await keys_of(script)


async def test_a_log_that_others_have_put_back_is_read_on(redis: Redis) -> None:
    """Its entries have new ids: they are known by what they say."""
    script = await make_script(redis)
    first, second = reading(script), reading(script)
    await script.say(say("a"))
    for reader in (first, second):
        reader.stream.look()
        await delivered(reader, 1)
    await redis.delete(*await keys_of(script))
    first.stream.look()
    await (await script.worker.claim()).answer("b")
    for reader in (first, second):
        reader.stream.look()
        assert await reader.end() == [1, 2, 3, 4]
        assert text_of(reader.entries) == "ab"


async def test_what_a_pod_does_not_know_it_cannot_put_back(redis: Redis) -> None:
    """An answer that had ended before, and one that is lost again and again: the client is told, and waits no more."""
    script = await make_script(redis)
    unknown = Delivered()
    with pytest.raises(StreamLost):
        await unknown.put_back(script.worker.queue)
    known = Delivered(script.job, HEADER.encode())
    for _ in range(MAX_PUT_BACKS):
        await known.put_back(script.worker.queue)
    with pytest.raises(StreamLost):
        await known.put_back(script.worker.queue)


async def test_what_the_streams_of_a_pod_keep_is_bounded(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who grows beyond it keeps nothing more; who ends leaves its room to others."""
    script, relay = await make_script(redis), Relay("pod", SETTINGS)
    await script.say(say("a" * 60))
    entries = await log_of(script)
    one, other = [relay.open(script.job.id, script.worker.queue, Delivered(script.job, HEADER.encode())) for _ in "12"]
    one.delivered.add(entries)
    size = relay.room.num_bytes
    assert size > 60
    monkeypatch.setattr(delivered_module, "MAX_POD_BYTES", 2 * size - 1)
    other.delivered.add(entries)
    with pytest.raises(StreamLost):
        await other.delivered.put_back(script.worker.queue)
    await one.delivered.put_back(script.worker.queue)
    assert relay.room.num_bytes == size
    for stream in (one, other):
        relay.close(stream)
    assert relay.room.num_bytes == 0


def text_of(entries: list[Entry]) -> str:
    return "".join(delta.text for entry in entries if entry.kind == "delta" for delta in entry.deltas)


async def test_silence_beats_and_looks_ever_less_often(redis: Redis) -> None:
    """At half a second, one, two, four: thousands that wait in line do not keep Redis busy."""
    script = await make_script(redis)
    stream = Stream(script.job.id, script.worker.queue, SETTINGS, Delivered())
    looks = []
    for _ in range(160):
        stream.tick(0.0625)
        if stream._behind:
            looks.append(stream.silent_s)
            stream._behind = False
    assert looks == [0.5, 1, 2, 4, 8]
    reader = Reader(stream)
    await until("a heartbeat", lambda: reader.num_heartbeats)
    stream.leave()
    assert await reader.end() == []


async def test_a_stream_that_is_left_ends(redis: Redis) -> None:
    script = await make_script(redis)
    reader = Reader(Stream(script.job.id, script.worker.queue, SETTINGS, Delivered()))
    reader.stream.leave()
    assert await reader.end() == []


async def test_a_redis_that_stays_away_ends_the_stream_at_last(redis: Redis) -> None:
    """Past its deadline a job has ended, even if nobody can read how."""
    queue = Queue(Redis.from_url("unix:///nowhere.sock"), ScriptedWorker(redis).queue.shard, SETTINGS)
    reader = Reader(Stream("chatcmpl-none", queue, SETTINGS, Delivered()))
    reader.stream.tick(SETTINGS.sweep_s)
    await until("the look has failed", lambda: not reader.stream._behind)
    reader.stream.tick(SETTINGS.request_deadline_s + 60)
    with pytest.raises(DeadlineExceeded):
        await reader.end()


async def test_after_the_end_of_the_pod_no_stream_begins(redis: Redis) -> None:
    relay = Relay("p", SETTINGS)
    script = await make_script(redis)
    before = Reader(relay.open(script.job.id, script.worker.queue, Delivered()))
    relay.leave_all()
    assert await before.end() == []
    assert relay.open("chatcmpl-late", script.worker.queue, Delivered()).left
