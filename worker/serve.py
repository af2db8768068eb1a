"""A worker process: look at Redis, load the model, work until SIGTERM.

Slow imports come last, so that a broken environment is reported at once.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from shared import connection, threads
from shared.settings import Settings
from worker import tiny
from worker.model.folder import find_folder

if TYPE_CHECKING:
    from worker.worker import Worker

BUILT_IN = "baton-tiny"
YOUNG_OBJECTS = 20_000      # made since the last collection that start the next: some megabytes


def served_names(settings: Settings) -> tuple[str, ...]:
    """The names that clients may use; the first is the canonical one."""
    return settings.served_model_name or (settings.model or BUILT_IN,)


def model_folder(settings: Settings) -> Path:
    """Raises ModelRefused when there is none."""
    return find_folder(settings.model or str(tiny.MODEL_FOLDER), settings.revision)


async def serve(settings: Settings) -> int:
    """Runs until SIGTERM or SIGINT, or until the worker is broken; returns the exit code.

    Raises ModelRefused, or BrokenEnvironment when Redis cannot be used.
    """
    threading.stack_size(threads.STACK_BYTES)           # threads compile grammars, as deeply nested as in their trial
    redis = connection.connect(settings.redis_url)
    await connection.check(redis, allow_no_aof=settings.allow_no_aof)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    names, folder = served_names(settings), await asyncio.to_thread(model_folder, settings)

    from worker.announce import make_card
    from worker.build import build
    from worker.worker import Worker

    engine = build(settings, folder)                    # in the thread that steps: OpenMP has a thread count per thread
    worker = Worker(settings, redis, engine, make_card(names[0], engine), names)
    stop = asyncio.create_task(_stop_when(stopping, worker))
    spare_steps()
    await worker.run()
    stop.cancel()
    await redis.aclose()
    return int(worker.is_broken)


def spare_steps() -> None:
    """Keeps the garbage collector from stalling steps: it never looks at torch's objects again, and rarely at new ones,
    of which a step with forms makes hundreds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


async def _stop_when(stopping: asyncio.Event, worker: Worker) -> None:
    while await stopping.wait():
        stopping.clear()
        worker.stop()
