"""A worker that cannot go on ends, and its streams go on with another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nursery import Nursery
from tests.system import MODEL, System, eventually
from tests.tour.test_streams_survive import Reader

NUM_TOKENS = 200
BAD_STEP = 100
STEP_TIMEOUT_S = 2.0


@pytest.mark.parametrize(("how", "says"), [
    ("hang", ("Timeout (0:00:03)!", "in hang")),
    ("nan", ("fails here: not a number", "weights or device are broken")),
])
def test_a_worker_that_breaks_ends_and_its_streams_go_on(redis_url: str, nursery: Nursery, tmp_path: Path,
                                                         how: str, says: tuple[str, ...]) -> None:
    """A step hangs, or gives no numbers: it says so and ends; its stream goes on elsewhere, with the same text."""
    system = System(tmp_path, redis_url, lease_s=1.0, idle_poll_s=0.2, allow_no_aof=True, step_timeout_s=STEP_TIMEOUT_S,
                    served_model_name=f"{how},{MODEL}-{how}", start=nursery.start)
    system.start_pod()
    broken = system.start_worker(**{f"test_{how}": BAD_STEP})
    system.await_workers(1)
    reader = Reader(system, how, NUM_TOKENS)
    reader.read(50)
    # Alone until then: whoever is starved by the start of another loses its lease, and its job, and does not break.
    eventually("the worker has ended", lambda: broken.popen.poll() is not None, 60.0)
    system.workers.remove(broken)
    system.start_worker()
    reader.read()
    assert broken.popen.returncode == 1
    assert all(words in broken.said for words in says), broken.said
    assert "Traceback" not in broken.said
    whole = Reader(system, how, NUM_TOKENS)
    whole.read()
    assert reader.answer == whole.answer
    system.stop()
