"""A worker process: load the model, look at Redis, work until SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time

import torch

from shared import connection
from shared.job import Sampling
from shared.settings import Settings
from worker import tiny
from worker.announce import make_card
from worker.engine.engine import Engine, Request
from worker.model.loading import load
from worker.worker import Worker

log = logging.getLogger(__name__)

BUILT_IN = "baton-tiny"
MIN_CHUNK_TOKENS = 16


def served_names(settings: Settings) -> tuple[str, ...]:
    """The names that clients may use; the first is the canonical one."""
    return settings.served_model_name or (settings.model or BUILT_IN,)


async def serve(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Raises ModelRefused, or BrokenEnvironment when Redis is none that we can use."""
    redis = connection.connect(settings.redis_url)
    await connection.check(redis, allow_no_aof=settings.allow_no_aof)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    names = served_names(settings)
    engine = await asyncio.to_thread(_load_engine, settings)
    worker = Worker(settings, redis, engine, make_card(names[0], engine), names)
    stop = asyncio.create_task(_stop_when(stopping, worker))
    gc.collect()
    gc.freeze()                                         # a full collection over torch's objects would stall a step
    await worker.run()
    stop.cancel()
    await redis.aclose()


async def _stop_when(stopping: asyncio.Event, worker: Worker) -> None:
    await stopping.wait()
    worker.stop()


def _load_engine(settings: Settings) -> Engine:
    # The API, Redis and this loop want a core too; two busy teams of threads on the same cores collapse.
    torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) - 1))
    source, began_s = settings.model or str(tiny.MODEL_FOLDER), time.monotonic()
    log.info("loading %s", source)
    model = load(source, dtype=settings.dtype, max_model_len=settings.max_model_len, revision=settings.revision)
    engine = Engine(model, max_num_seqs=settings.max_num_seqs, max_model_len=settings.max_model_len,
                    prefill_chunk=settings.prefill_chunk_tokens, kv_cache_bytes=settings.kv_cache_bytes,
                    enable_prefix_caching=settings.enable_prefix_caching,
                    exact_replay_max_tokens=settings.exact_replay_max_tokens)
    engine.prefill_chunk = fit_chunk(settings.prefill_chunk_tokens, _time_chunk(engine), settings.lease_s / 4)
    log.info("loaded in %.1f s: %r, prefill in chunks of %d", time.monotonic() - began_s, engine, engine.prefill_chunk)
    return engine


def _time_chunk(engine: Engine) -> float:
    """Seconds that one full prefill chunk takes here; the second of two, for the first one warms up."""
    num_tokens = min(engine.prefill_chunk, engine.max_model_len - 1)
    took_s = 0.0
    for name in ("warm", "timed"):
        engine.add(Request(name, (0,) * num_tokens, Sampling(max_tokens=1)))
        began_s = time.perf_counter()
        while engine.has_work:
            engine.step()
        took_s = time.perf_counter() - began_s
    return took_s


def fit_chunk(num_tokens: int, took_s: float, most_s: float) -> int:
    """The chunk halved until a step keeps the lease alive. Powers of two, so that like machines agree on the grid."""
    while took_s > most_s and num_tokens > MIN_CHUNK_TOKENS:
        num_tokens, took_s = num_tokens // 2, took_s / 2
    return num_tokens
