"""How many threads a forward gets: two busy teams of threads on the same cores collapse."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping

from shared import container

LARGE_BYTES = 128 << 20     # of weights: from here on a step takes tens of milliseconds
LARGE_FOR_KERNELS_BYTES = 16 << 20      # for our own kernels: they share their work more evenly, and need less of it
SPINS = 2000                # some 30 µs
STACK_BYTES = 8 << 20       # of threads that we start, whatever the system's default


def num_cores() -> int:
    """Cores that this process may use: more threads than a container's share of them would wait for each other."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(found, container.num_cores())))


def most_threads() -> int:
    """The most threads of a forward: one for each core, but no more than OMP_NUM_THREADS where that is set."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(num_cores(), int(wanted)) if wanted.isdecimal() and int(wanted) else num_cores()


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets OpenMP threads that wait at a barrier sleep soon, so that a thread whose core another process took can
    continue on one of theirs. OpenMP reads the variable once, when torch is loaded."""
    if environment.keys().isdisjoint({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def default_threads(num_cores: int, num_bytes: int, large_bytes: int = LARGE_BYTES) -> int:
    """A small model leaves one core to Redis, the API and the worker's loop, which run every few milliseconds then.

    Beside the long steps of a large one they hardly matter. Chosen by the size of the weights and not by measured time,
    so that like machines have the same numerics.
    """
    return num_cores if num_bytes >= large_bytes else max(1, num_cores - 1)


def threads_of_each(num_cores: int, num_workers: int) -> int:
    """Threads of each of several workers on one machine."""
    return max(1, (num_cores - 1) // num_workers)
