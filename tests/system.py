"""A whole Baton as real processes, for tests that kill, freeze and cut: Redis, API pods, workers, each by itself.

It starts what `baton api` and `baton worker` are, and waits for conditions; it decides nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
from redis import Redis, RedisCluster

from shared.connection import CLUSTER, is_cluster
from shared.keys import Shard

REPOSITORY = Path(__file__).parent.parent
BATON = [sys.executable, "-m", "deploy.cli"]
START_S = 60.0
MODEL = "baton-tiny"


T = TypeVar("T")


def eventually(what: str, condition: Callable[[], T | None], timeout_s: float = 20.0) -> T:
    """The first true value of `condition`. If it stays false, the failure names what was waited for."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.01)


class Running(Protocol):
    """The interface of a started process: subprocess' own, or what a test puts in its place."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | Any: ...

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


Start = Callable[[list[str], dict[str, str], Path], Running]
"""Starts a process, given its arguments, environment variables besides ours, and the file for its output."""


def start(arguments: list[str], environment: dict[str, str], log: Path) -> Running:
    with log.open("wb") as output:
        return subprocess.Popen([*BATON, *arguments], cwd=REPOSITORY, env=os.environ | environment,
                                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


@dataclass
class Process:
    """One process of Baton, and its output."""

    arguments: list[str]
    environment: dict[str, str]
    log: Path
    start: Start = start
    popen: Running = field(init=False)

    def __post_init__(self) -> None:
        self.popen = self.start(self.arguments, self.environment, self.log)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        """Sends the signal and waits; returns the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise AssertionError(f"{self.arguments} did not end on {number.name}:\n{self.said}") from None


class System:
    """Pods on ports of their own, workers on one model, one Redis that may be given."""

    def __init__(self, folder: Path, redis_url: str, *, start: Start = start, **settings: Any) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.start = start
        self.redis: Any = (RedisCluster.from_url(redis_url.replace(CLUSTER, "")) if is_cluster(redis_url)
                           else Redis.from_url(redis_url))
        self.pods: dict[str, Process] = {}              # by base URL
        self.workers: list[Process] = []
        self.environment = {"BATON_REDIS_URL": redis_url}
        self.environment |= {f"BATON_{name.upper()}": str(value) for name, value in settings.items()}
        self._num_processes = 0

    @property
    def url(self) -> str:
        return next(iter(self.pods))

    @property
    def shard(self) -> Shard:
        return Shard.of(self.model)

    @property
    def model(self) -> str:
        """The canonical name: tests that share a Redis tell their models apart by it."""
        return self.environment.get("BATON_SERVED_MODEL_NAME", MODEL).split(",")[0]

    def start_all(self, num_workers: int) -> str:
        """Starts so many workers and a pod that knows their model; returns its URL."""
        for _ in range(num_workers):
            self.start_worker()
        url = self.start_pod()
        self.await_workers(num_workers)
        return url

    def start_pod(self, **settings: Any) -> str:
        """Starts a pod; returns its URL once it is ready."""
        url = f"http://127.0.0.1:{free_port()}"
        pod = self.begin_pod(url, **settings)
        eventually("the pod is ready", lambda: alive(pod) and answers(f"{url}/ready"), START_S)
        return url

    def begin_pod(self, url: str, **settings: Any) -> Process:
        """Starts a pod at a URL of this machine, even one used before, without waiting for it."""
        self.pods[url] = self._start(["api", "--port", url.rpartition(":")[2]], settings)
        return self.pods[url]

    def start_worker(self, *arguments: str, **settings: Any) -> Process:
        worker = self._start(["worker", *arguments], settings)
        self.workers.append(worker)
        return worker

    def await_workers(self, number: int) -> None:
        """Waits until so many workers hold a lease, and every pod knows the model."""
        leases = self.shard.key("leases")
        eventually(f"{number} workers have a lease",
                   lambda: all(map(alive, self.workers)) and self.redis.zcard(leases) == number, START_S)
        for url in self.pods:
            eventually("the pod knows the model", partial(serves, url, self.model), START_S)

    def worker_of(self, completion_id: str) -> Process:
        """The worker process that holds a job."""
        def holder() -> Process | None:
            name: Any = self.redis.hget(self.shard.key(f"job:{completion_id}"), "worker")
            return next((w for w in self.workers if name and f"-{w.popen.pid}-" in name.decode()), None)

        return eventually("the job is held by one of our workers", holder)

    def log_entries(self, completion_id: str) -> list[tuple[str, dict[str, str]]]:
        rows: Any = self.redis.xrange(self.shard.key(f"out:{completion_id}"))
        return [(i.decode(), {k.decode(): v.decode() for k, v in fields.items()}) for i, fields in rows]

    def num_live_jobs(self) -> int:
        return int(self.redis.xlen(self.shard.key("jobs")))

    def _start(self, arguments: list[str], settings: dict[str, Any]) -> Process:
        self._num_processes += 1
        environment = self.environment | {f"BATON_{name.upper()}": str(value) for name, value in settings.items()}
        log = self.folder / f"{self._num_processes}-{arguments[0]}.log"
        return Process(arguments, environment, log, self.start)

    def stop(self) -> None:
        for process in (*self.pods.values(), *self.workers):
            if process.popen.poll() is None:
                process.send(signal.SIGCONT)
                process.popen.terminate()
        for process in (*self.pods.values(), *self.workers):
            process.end()
        self.redis.close()


_named_ports: set[int] = set()


def free_port() -> int:
    """One that this process has not named before: it may be free still, and be meant for another server."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _named_ports:
            _named_ports.add(port)
            return port


def alive(process: Process) -> bool:
    assert process.popen.poll() is None, f"{process.arguments} ended with {process.popen.returncode}:\n{process.said}"
    return True


def serves(url: str, model: str) -> bool:
    """Whether a pod reports that it serves the model."""
    return model in httpx.get(f"{url}/ready").json().get("models", [])


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).is_success
    except httpx.HTTPError:
        return False
