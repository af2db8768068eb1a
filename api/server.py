"""Serving: uvicorn with a shutdown that lets streams end: not ready, then a wait, then error events, then exit."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Generator

import uvicorn

from api.app import make_app
from api.heads import BoundedProtocol
from api.pod import Pod
from api.pump import pump
from shared import connection
from shared.settings import Settings

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.1
KEEP_ALIVE_S = 75
CLOSE_S = 5                                             # for the last events to be sent, after the streams were ended


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield                                           # we handle signals ourselves


async def serve(settings: Settings, listening: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT. Raises BrokenEnvironment when Redis cannot be used."""
    pod = Pod(settings)
    await connection.check(pod.redis, allow_no_aof=settings.allow_no_aof)
    config = uvicorn.Config(make_app(pod), log_config=None, access_log=False, http=BoundedProtocol, ws="none",
                            lifespan="off", timeout_keep_alive=KEEP_ALIVE_S,
                            timeout_graceful_shutdown=CLOSE_S, server_header=False)
    server = _Server(config)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    gc.freeze()                                         # objects from start-up are not collected again
    async with pod.running(pump(pod)):
        log.info("listening on %s", address(listening))
        serving = asyncio.create_task(server.serve([listening]))
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait([serving, stop], return_when=asyncio.FIRST_COMPLETED)
        if stopping.is_set():
            await drain(pod)
            server.should_exit = True
        stop.cancel()
        await serving


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def drain(pod: Pod) -> None:
    """New requests go elsewhere; running streams may end within `drain_s`, the rest get an error event."""
    pod.draining = True
    log.info("draining: %d streams", pod.relay.num_streams)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + pod.settings.drain_s
    while pod.relay.num_streams and loop.time() < deadline:  # noqa: ASYNC110 - polling a count beats an event per stream
        await asyncio.sleep(DRAIN_POLL_S)
    pod.relay.leave_all()
