"""How many threads a forward gets: two busy teams of threads on the same cores collapse."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

LARGE_BYTES = 128 << 20     # of weights: a step takes tens of milliseconds
SPINS = 2000                # some 30 µs
STACK_BYTES = 8 << 20       # of a thread that we start, whatever the system would give it


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_threads() -> int:
    """Of a forward: as OpenMP has it, no more than OMP_NUM_THREADS where somebody has set that."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(num_cores(), int(wanted)) if wanted.isdecimal() and int(wanted) else num_cores()


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Who waits for the other threads of a forward sleeps soon, and leaves the core to whom they wait for: one whose
    core an API took goes on there. OpenMP reads it once, when torch is loaded."""
    if environment.keys().isdisjoint({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def default_threads(num_cores: int, num_bytes: int) -> int:
    """A core is left to Redis, the API and the worker's loop, which meet a small model every few milliseconds.

    Between the steps of a large one they are seldom seen. It goes by the size of the weights and not by time, so that
    like machines have like numerics.
    """
    return num_cores if num_bytes >= LARGE_BYTES else max(1, num_cores - 1)


def threads_of_each(num_cores: int, num_workers: int) -> int:
    """Of several workers on one machine."""
    return max(1, (num_cores - 1) // num_workers)


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
