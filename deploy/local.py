"""`baton serve`: Redis, API pods and workers of one machine, as child processes of one supervisor.

A child that dies is restarted; one that reports a broken environment ends them all. Ctrl-C ends every child, pods
first, so that running streams get their last events.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from deploy.listening import bind
from deploy.redis import RedisServer
from shared.errors import BrokenEnvironment
from shared.settings import Settings
from shared.threads import num_cores, threads_of_each

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)   # Ctrl-C, a service manager, a terminal that was closed
EXIT_BROKEN = 2
POLL_S = 0.1
RESTART_S = 1.0                                         # pause before a child that died is started again
START_TIMEOUT_S = 600.0                                 # until the first model is announced
STOP_TIMEOUT_S = 20.0                                   # beside `drain_s`: for the pods, then for the workers
DRAIN_S = 3.0                                           # one machine, one person: no need to wait for long streams


@dataclass
class Child:
    """One process that is kept running."""

    name: str
    command: list[str]
    environment: dict[str, str]
    pass_fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    restart_at_s: float = field(default=0.0)
    started_s: float = field(default=0.0)

    def start(self) -> None:
        self.started_s = time.monotonic()
        # A session of its own: Ctrl-C reaches the supervisor alone, which ends its children in order.
        self.process = subprocess.Popen(self.command, env=self.environment, pass_fds=self.pass_fds,
                                        start_new_session=True)

    @property
    def exit_code(self) -> int | None:
        return self.process.poll() if self.process else None

    def terminate(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()

    def wait(self, deadline_s: float) -> None:
        if not self.process:
            return
        try:
            self.process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Stopped(Exception):
    """One of STOPS has arrived."""


def serve(settings: Settings) -> int:
    """Runs until it is stopped. Raises BrokenEnvironment with the one thing to do."""
    for number in STOPS:
        signal.signal(number, _raise_stopped)
    redis: RedisServer | None = None
    children: list[Child] = []
    try:
        with bind(settings.host, settings.port) as listening:
            port = listening.getsockname()[1]
            url = _given_redis(settings)
            if not url:
                redis = _own_redis(settings, port)      # known before it starts, so that it is ended in any case
                url = redis.start().url
                print(f"baton: redis   {redis.binary} in {redis.folder}", flush=True)
            children += _children(settings, url, listening)
            for child in children:
                child.start()
            _await_model(children, redis, port, settings)
            _say_what_next(settings, port)
            while True:
                _keep_running(children, redis)
                time.sleep(POLL_S)
    except Stopped:
        print("baton: stopping", flush=True)
        return 0
    finally:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        _stop(children, _drain_s(settings))
        if redis:
            redis.stop()


def _raise_stopped(*_: object) -> None:
    raise Stopped


def _given_redis(settings: Settings) -> str | None:
    return settings.redis_url if "redis_url" in settings.model_fields_set else os.environ.get("REDIS_URL")


def _own_redis(settings: Settings, port: int) -> RedisServer:
    """Not started yet."""
    folder = Path(settings.data_dir or f"~/.local/state/baton/{port}")
    try:
        return RedisServer(folder.expanduser().absolute())
    except RuntimeError:
        raise BrokenEnvironment(f"{folder} is in no home that is known here: give another --data-dir") from None


def _children(settings: Settings, redis_url: str, listening: socket.socket) -> list[Child]:
    environment = os.environ | settings.environment() | {
        "BATON_DRAIN_S": str(_drain_s(settings)), "BATON_REDIS_URL": redis_url,
        "BATON_WORKERS": str(settings.workers)}         # which share the machine's memory
    if settings.workers > 1 and not settings.threads:   # each alone would take nearly all cores
        environment |= {"BATON_THREADS": str(threads_of_each(num_cores(), settings.workers))}
    baton = [sys.executable, "-m", "deploy.cli"]
    fd = listening.fileno()
    return [
        *(Child(f"api {i}", [*baton, "api", "--fd", str(fd)], environment, (fd,)) for i in range(settings.apis)),
        *(Child(f"worker {i}", [*baton, "worker"], environment) for i in range(settings.workers)),
    ]


def _await_model(children: list[Child], redis: RedisServer | None, port: int, settings: Settings) -> None:
    """Returns when the API serves a model; without workers of ours, when the API is ready."""
    print(f"baton: starting {settings.apis} API, {settings.workers} workers", flush=True)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(base_url=f"http://{_reachable(settings.host)}:{port}", timeout=2.0,
                      trust_env=False) as client:       # our own service is behind no proxy
        while time.monotonic() < deadline_s:
            _keep_running(children, redis)
            try:
                answer = client.get("/ready")
                if answer.is_success and (answer.json()["models"] or not settings.workers):
                    return
            except httpx.HTTPError:
                pass                                    # not up yet
            time.sleep(POLL_S)
    raise BrokenEnvironment(f"no model was announced within {START_TIMEOUT_S:.0f} s: see what the worker said above")


def _keep_running(children: list[Child], redis: RedisServer | None) -> None:
    if redis and redis.process and (code := redis.process.poll()) is not None:
        print(f"baton: redis ended ({code}), starting it again", flush=True)
        time.sleep(RESTART_S)
        redis.start()
    now_s = time.monotonic()
    for child in children:
        if child.exit_code is None:
            continue
        may_have_missed_redis = redis is not None and child.started_s < redis.started_s
        if child.exit_code == EXIT_BROKEN and not may_have_missed_redis:
            raise BrokenEnvironment(f"{child.name} cannot run here: see its line above")
        if not child.restart_at_s:
            print(f"baton: {child.name} ended ({child.exit_code}), starting it again", flush=True)
            child.restart_at_s = now_s + RESTART_S
        elif now_s >= child.restart_at_s:
            child.restart_at_s = 0.0
            child.start()


def _drain_s(settings: Settings) -> float:
    return settings.drain_s if "drain_s" in settings.model_fields_set else DRAIN_S


def _stop(children: list[Child], drain_s: float) -> None:
    for room in ("api", "worker"):
        deadline_s = time.monotonic() + drain_s + STOP_TIMEOUT_S
        members = [child for child in children if child.name.startswith(room)]
        for child in members:
            child.terminate()
        for child in members:
            child.wait(deadline_s)


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host


def _say_what_next(settings: Settings, port: int) -> None:
    url = f"http://{'localhost' if settings.host in ('127.0.0.1', '0.0.0.0') else _reachable(settings.host)}:{port}"
    key = "YOUR KEY" if settings.api_key else "EMPTY"
    model = settings.served_model_name[0] if settings.served_model_name else settings.model or "baton-tiny"
    baton = os.path.relpath(Path(sys.executable).with_name("baton"))
    chat = f"{baton} chat" if port == 30000 else f"{baton} chat --url {url}"
    print(f"""
Baton is ready at {url}  (docs: {url}/docs)

  curl -N {url}/v1/chat/completions -H 'Authorization: Bearer {key}' \\
    -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Count from 1 to 40."}}]}}'

  import openai                                   # pip install openai
  client = openai.Client(base_url="{url}/v1", api_key="{key}")
  stream = client.chat.completions.create(model="{model}", stream=True,
                                          messages=[{{"role": "user", "content": "Count from 1 to 40."}}])
  for chunk in stream:
      print(chunk.choices[0].delta.content or "", end="")

  {chat}                           # a chat in the terminal

Ctrl-C stops everything.
""", flush=True)
