"""A worker by script: it announces a model of bytes, claims jobs on a real Redis, and says what a test tells it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from redis.asyncio import Redis
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shared.byte_level import BYTE_OF_CHARACTER
from shared.card import Announcement, Card
from shared.job import Delta, Finish, Kind, Usage, encode_deltas
from shared.keys import DIRECTORY, Shard
from shared.queue import Claimed, Queue, Write
from shared.settings import Settings

WAIT_S = 20.0
ANNOUNCED_S = 600                                       # longer than any test
MAX_MODEL_LEN = 512
MAX_NUM_SEQS = 8
CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

T = TypeVar("T")


def byte_tokenizer(*special: str) -> Tokenizer:
    """One token per byte, and the special ones behind them."""
    alphabet = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.__getitem__)
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def byte_card(model: str, template: str = CHATML) -> Card:
    return Card(model=model, tokenizer_json=byte_tokenizer("<|im_start|>", "<|im_end|>").to_str(),
                chat_templates={"default": template}, special_tokens={"eos_token": "<|im_end|>"}, sampling_defaults={},
                eos_token_ids=(257,), vocab_size=258, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS,
                prefill_chunk_tokens=256, weights_id="0123456789abcdef", numerics_id="n", created_s=1_700_000_000)


def say(text: str, index: int = 0, *, end: bool = False) -> Delta:
    """What one choice gains: a token per byte."""
    return Delta(index, tuple(text.encode()), text, "stop" if end else None)


class ScriptedWorker:
    """One worker of a model of its own. Nothing is claimed or said unless a test asks for it."""

    def __init__(self, redis: Redis, card: Card | None = None) -> None:
        self.card = card or byte_card(f"scripted/{secrets.token_hex(4)}")
        self.queue = Queue(redis, Shard.of(self.model), Settings(lease_s=ANNOUNCED_S))
        self._sequence = 0
        self._claimed: list[Claimed] = []

    @property
    def model(self) -> str:
        return self.card.model

    async def announce(self, ttl_s: float = ANNOUNCED_S) -> None:
        card_hash, packed = self.card.pack()
        redis, shard = self.queue.redis, self.queue.shard
        await redis.set(shard.key(f"card:{card_hash}"), packed, ex=ANNOUNCED_S)
        said = Announcement(shard.id, (self.model,), card_hash, round((time.time() + ttl_s) * 1000))
        await redis.hset(DIRECTORY, shard.id, said.encode())

    async def claim(self) -> Script:
        """The next job, once somebody has asked for one."""
        async with asyncio.timeout(WAIT_S):
            while not self._claimed:
                self._sequence += 1
                claims = await self.queue.claim(
                    "scripted-1", self._sequence, MAX_NUM_SEQS, tokenizer_id=self.card.tokenizer_id,
                    weights_id=self.card.weights_id, numerics_id=self.card.numerics_id)
                self._claimed += claims.jobs
                await asyncio.sleep(0.0 if claims.jobs else 0.01)
        return Script(self, self._claimed.pop(0))

    async def leave(self) -> None:
        await self.queue.redis.hdel(DIRECTORY, self.queue.shard.id)
        await self.queue.release("scripted-1")


class Script:
    """One claimed job, and what is said in it."""

    def __init__(self, worker: ScriptedWorker, claimed: Claimed) -> None:
        self.worker = worker
        self.claimed = claimed
        self.job = claimed.job
        self._epoch = claimed.epoch
        self._position = claimed.position
        self._num_tokens = claimed.num_tokens

    async def say(self, *deltas: Delta) -> None:
        """One entry of the log. Asserts that it was taken."""
        self._num_tokens += sum(len(delta.token_ids) for delta in deltas)
        await self._write("delta", encode_deltas(list(deltas)))

    async def end(self, error: str | None = None) -> None:
        usage = Usage(len(self.job.prompt_token_ids), self._num_tokens, num_cached_tokens=3)
        await self._write("end", Finish(usage, error).encode())

    async def answer(self, text: str) -> None:
        """Every choice says the text, a character per entry, and ends."""
        for char in text:
            await self.say(*(say(char, index) for index in range(self.job.n)))
        await self.say(*(say("", index, end=True) for index in range(self.job.n)))
        await self.end()

    async def _write(self, kind: Kind, data: str) -> None:
        self._position += 1
        write = Write(self.job.id, self._epoch, self._position, self._num_tokens, kind, data)
        [outcome] = await self.worker.queue.publish("scripted-1", [write])
        assert outcome == "ok", outcome

    async def outcome(self) -> str:
        """How the job ended, once it has."""
        async def ended() -> str | None:
            state = (await self.worker.queue.describe(self.job.id)).get("state", "gone")
            return None if state in ("queued", "running") else state

        async with asyncio.timeout(WAIT_S):
            while not (state := await ended()):
                await asyncio.sleep(0.01)
        return state


async def until(what: str, condition: Callable[[], T | None]) -> T:
    """The first true value of `condition`, looked at between other tasks."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not (value := condition()):
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_S:.0f} s: {what}") from None
    return value


def ask(model: str, content: str = "Hi", **fields: object) -> dict[str, object]:
    """The body of a request."""
    return {"model": model, "messages": [{"role": "user", "content": content}]} | fields


def error_of(response: httpx.Response, status: int) -> dict[str, str | None]:
    """The error of an answer, which has OpenAI's shape and an id."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    error: dict[str, str | None] = body["error"]
    return error


async def until_known(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    """Until the pod knows the model: it refuses an endless answer of it, and not the name."""
    async with asyncio.timeout(WAIT_S):
        while (await http.post("/v1/chat/completions", json=ask(worker.model, max_tokens=10**6))).status_code != 400:
            await asyncio.sleep(0.05)
