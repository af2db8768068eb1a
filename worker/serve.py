"""A worker process: load the model, look at Redis, work until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time

import torch

from shared import connection
from shared.settings import Settings
from worker import tiny
from worker.announce import make_card
from worker.engine.engine import Engine
from worker.model.loading import load
from worker.worker import Worker

log = logging.getLogger(__name__)

BUILT_IN = "baton-tiny"


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
                    prefill_chunk=settings.prefill_chunk_tokens, kv_cache_bytes=settings.kv_cache_bytes)
    log.info("loaded in %.1f s: %r", time.monotonic() - began_s, engine)
    return engine
