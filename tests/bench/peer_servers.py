"""The servers that `make bench-peers` compares, Baton and its peers: how each is started, frozen and ended.

All run with their own defaults, except for the number type, the memory for keys and values, and what is noted here.
It knows processes. It knows nothing of requests and of time.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from deploy.redis import RedisServer
from shared.threads import num_cores
from tests.bench.peer_install import PeerFailed
from tests.system import MODEL, System, eventually, free_port, serves

CORES = num_cores()
START_S = 900.0                                         # vLLM compiles at its first start
STOP_S = 20.0
KV_GIB = 4                                              # of vLLM for keys and values: Baton's default
BLOCK_TOKENS = 256                                      # of transformers' cache, its default


@dataclass
class Server:
    """A running server. Its processes are `roots` and all their descendants."""

    name: str
    url: str
    model: str                                          # as requests name it
    roots: list[int]
    stop: Callable[[], None]
    is_ready: Callable[[], bool]
    fields: dict[str, Any] = field(default_factory=dict)        # of its requests, besides the common ones

    def processes(self) -> list[psutil.Process]:
        try:
            roots = [psutil.Process(pid) for pid in self.roots]
            return roots + [child for root in roots for child in root.children(recursive=True)]
        except psutil.NoSuchProcess:
            raise PeerFailed(f"{self.name} has ended") from None

    def freeze(self) -> None:
        """Idle servers poll and spin: those that are not measured are stopped."""
        for process in self.processes():
            process.suspend()

    def thaw(self) -> None:
        for process in self.processes():
            process.resume()
        eventually(f"{self.name} answers again", self.is_ready)


def start_ours(folder: Path, model: Path) -> Server:
    """The whole path: Redis, a pod, a worker. No drafts: random weights repeat themselves, which flatters them."""
    redis = RedisServer(folder / "redis").start()
    system = System(folder, redis.url, model=model, served_model_name=MODEL, num_speculative_tokens=0)
    assert redis.process
    redis_pid = redis.process.pid

    def stop() -> None:
        with suppress(ProcessLookupError):
            os.kill(redis_pid, signal.SIGCONT)
        try:
            system.stop()
        finally:
            redis.stop()

    try:
        url = system.start_all(1)
    except BaseException:
        stop()
        raise
    roots = [redis_pid, *(process.popen.pid for process in (*system.pods.values(), *system.workers))]
    return Server("baton", url, MODEL, roots, stop, lambda: serves(url, MODEL), {"ignore_eos": True})


@dataclass(frozen=True)
class Launch:
    """How a peer is started, and its requests."""

    arguments: list[str]
    variables: dict[str, str]                           # of its environment
    model: str
    fields: dict[str, Any]


def start_peer(name: str, folder: Path, environment: Path, model: Path, dtype: str, num_tokens: int) -> Server:
    """With room for at least `num_tokens` of keys and values. Returns when it answers. Raises PeerFailed."""
    port = free_port()
    launch = launch_vllm(environment, model) if name == "vllm" else launch_transformers(environment, model, num_tokens)
    hub = folder / "hub"
    hub.mkdir(exist_ok=True)                            # transformers lists what is in it, and it must be there
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [*launch.arguments, "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)], cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)} | launch.variables,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def is_ready() -> bool:
        if popen.poll() is not None:
            raise PeerFailed(f"{name} ended with {popen.returncode}: {last_line(log)}")
        with suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10).is_success
        return False

    try:
        eventually(f"{name} is ready", is_ready, START_S)
    except BaseException as error:
        end_group(popen)
        if isinstance(error, AssertionError):
            raise PeerFailed(f"{error}: {last_line(log)}") from None
        raise
    return Server(name, f"http://127.0.0.1:{port}", launch.model, [popen.pid], lambda: end_group(popen),
                  is_ready, launch.fields)


def launch_vllm(environment: Path, model: Path) -> Launch:
    return Launch(
        [str(environment / "bin" / "vllm"), "serve", str(model), "--served-model-name", model.name,
         "--disable-uvicorn-access-log"],
        {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0",           # otherwise it leaves a core unused, and is slower
         "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB), "VLLM_NO_USAGE_STATS": "1",
         "VLLM_CACHE_ROOT": str(environment.parent / "vllm-cache")},
        model.name, {"ignore_eos": True})


def launch_transformers(environment: Path, model: Path, num_tokens: int) -> Launch:
    num_blocks = -(-num_tokens // BLOCK_TOKENS)         # by default it takes nine tenths of the machine's memory
    return Launch(
        [str(environment / "bin" / "transformers"), "serve", str(model), "--continuous-batching", "--device", "cpu",
         "--cb-num-blocks", str(num_blocks)],
        {}, str(model), {})


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "it said nothing")


def end_group(popen: subprocess.Popen[bytes]) -> None:
    """Ends a peer and all that it started; a frozen one is continued first, so that it can receive the signal."""
    for number in (signal.SIGCONT, signal.SIGTERM):
        with suppress(ProcessLookupError):
            os.killpg(popen.pid, number)
    with suppress(subprocess.TimeoutExpired):
        popen.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGKILL)            # descendants that outlived it, too
    popen.wait()
