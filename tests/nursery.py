"""A process that has imported everything and loaded the built-in model, once. A fork of it starts in a moment.

Importing torch takes five seconds of CPU, loading and checking a model another, too much for a run that kills a worker
every few seconds. A fork is still a real process: its memory is its own, it opens its own connections, and it dies
alone. It knows nothing of what it runs."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
READY_S = 120.0
POLL_S = 0.01


class Nursery:
    """The near side: requests forks. As a context it ends what it has started."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "tests.nursery"], cwd=REPOSITORY,
                                         env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
        self._lock = threading.Lock()                   # stages start their processes from threads

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, arguments: list[str], environment: dict[str, str], log: Path) -> Fork:
        return Fork(self, self.ask({"arguments": arguments, "environment": environment, "log": str(log)}))

    def ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        with self._lock:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


class Fork:
    """A forked process, with the interface of subprocess.Popen."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        began_s = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() - began_s > timeout:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
            time.sleep(POLL_S)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def main() -> None:
    """The far side: forks, and reports how forks ended, until its socket is closed."""
    import api.server  # noqa: F401 - to have it loaded is what the nursery is for
    import worker.announce
    import worker.build
    import worker.worker
    from shared.settings import Settings
    from tests.chaos import launcher
    from worker.model.loading import load
    from worker.serve import model_folder

    vars(worker.build)["load"] = functools.cache(load)
    worker.build.build(settings := Settings(), model_folder(settings))
    gc.collect()
    gc.freeze()                                         # a fork's collector does not touch shared memory
    children: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if pid := question.get("poll"):
            ended, status = os.waitpid(pid, os.WNOHANG)
            children.discard(ended)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif answer := os.fork():
            children.add(answer)
        else:
            _become(question, launcher.main)
        print(json.dumps(answer), flush=True)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _become(question: dict[str, Any], run: Any) -> None:
    """In the fork: does what a new process with this command line would do."""
    code = 1
    try:
        for stream, path, mode in ((0, os.devnull, os.O_RDONLY), (1, question["log"], os.O_WRONLY | os.O_CREAT)):
            os.dup2(os.open(path, mode), stream)
        os.dup2(1, 2)
        os.environ.update(question["environment"])
        random.seed()                                   # otherwise all forks would have the same jitter
        code = run(question["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
