"""A step that hangs ends its worker, and the worker's streams go on with another."""

from __future__ import annotations

from pathlib import Path

from tests.nursery import Nursery
from tests.system import MODEL, System, eventually
from tests.tour.test_streams_survive import Reader

NAME, NUM_TOKENS = "hangs", 200
HANGING_STEP = 100
STEP_TIMEOUT_S = 2.0


def test_a_worker_whose_step_hangs_ends_and_hands_over(redis_url: str, nursery: Nursery, tmp_path: Path) -> None:
    """It says where it hung; its stream goes on elsewhere, with the same text."""
    system = System(tmp_path, redis_url, lease_s=1.0, idle_poll_s=0.2, allow_no_aof=True, step_timeout_s=STEP_TIMEOUT_S,
                    served_model_name=f"{NAME},{MODEL}-{NAME}", start=nursery.start)
    system.start_pod()
    hanging = system.start_worker(test_hang=HANGING_STEP)
    system.await_workers(1)
    reader = Reader(system, NAME, NUM_TOKENS)
    reader.read(50)
    # Alone until then: whoever is starved by the start of another loses its lease, and its job, and does not hang.
    eventually("the watchdog has ended the worker", lambda: hanging.popen.poll() is not None, 60.0)
    system.workers.remove(hanging)
    system.start_worker()
    reader.read()
    assert hanging.popen.returncode == 1
    assert "Timeout (0:00:02)!" in hanging.said and "in hanging" in hanging.said
    whole = Reader(system, NAME, NUM_TOKENS)
    whole.read()
    assert reader.answer == whole.answer
    system.stop()
