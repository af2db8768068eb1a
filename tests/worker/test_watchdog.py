"""A step that hangs ends its worker, and the worker's streams go on with another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.system import MODEL, REPOSITORY, System, eventually
from tests.tour.test_streams_survive import Reader

NAME, NUM_TOKENS = "hangs", 300
STEP_TIMEOUT_S = 2.0
HANGS = """
import sys, time
from deploy.cli import main
from worker.worker import Worker

num_steps, step = 0, Worker._step

def hang(worker):
    global num_steps
    num_steps += 1
    if num_steps == 150:
        time.sleep(3600)
    return step(worker)

Worker._step = hang
sys.exit(main(sys.argv[1:]))
"""


def begin_hanging(arguments: list[str], environment: dict[str, str], log: Path) -> Any:
    command = [sys.executable, "-c", HANGS, *arguments]
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | environment, stdout=output,
                                stderr=subprocess.STDOUT)


def test_a_worker_whose_step_hangs_ends_and_hands_over(redis_url: str, tmp_path: Path) -> None:
    """It says where it hung; its stream goes on elsewhere, with the same text."""
    system = System(tmp_path, redis_url, lease_s=1.0, idle_poll_s=0.2, allow_no_aof=True, step_timeout_s=STEP_TIMEOUT_S,
                    served_model_name=f"{NAME},{MODEL}-{NAME}")
    system.start_pod()
    healthy, system.start = system.start, begin_hanging
    hanging = system.start_worker()
    system.await_workers(1)
    reader = Reader(system, NAME, NUM_TOKENS)
    reader.read(100)
    # Alone until then: whoever is starved by the start of another loses its lease, and its job, and does not hang.
    eventually("the watchdog has ended the worker", lambda: hanging.popen.poll() is not None, 60.0)
    system.start = healthy
    system.start_worker()
    reader.read()
    assert hanging.popen.returncode == 1
    assert "Timeout (0:00:02)!" in hanging.said and "in hang" in hanging.said
    system.workers.remove(hanging)
    system.await_workers(1)
    whole = Reader(system, NAME, NUM_TOKENS)
    whole.read()
    assert reader.answer == whole.answer
    system.stop()
