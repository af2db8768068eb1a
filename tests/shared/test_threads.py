"""Who gets how many threads."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest

from shared import container
from shared.threads import (
    LARGE_BYTES,
    SPINS,
    default_threads,
    most_threads,
    num_cores,
    spin_briefly,
    threads_of_each,
)


def test_a_large_model_has_all_cores_and_a_small_one_leaves_one() -> None:
    assert [default_threads(cores, LARGE_BYTES) for cores in (1, 2, 8)] == [1, 2, 8]
    assert [default_threads(cores, LARGE_BYTES - 1) for cores in (1, 2, 8)] == [1, 1, 7]


def test_several_workers_share_the_cores() -> None:
    assert [threads_of_each(8, workers) for workers in (1, 2, 3, 20)] == [7, 3, 2, 1]


def test_cores_are_known_where_affinity_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "num_cores", lambda: math.inf)
    assert num_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert num_cores() == os.cpu_count()


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1), (2.0, 2), (2.5, 3), (9.0, 8), (math.inf, 8)])
def test_a_container_has_as_many_cores_as_its_share(share: float, expected: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker run --cpus 2` shows all cores of the machine, and takes them away for most of the time."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(container, "num_cores", lambda: share)
    assert num_cores() == expected


@pytest.mark.parametrize(("wanted", "expected"), [("1", 1), ("", 8), ("0", 8), ("4,2", 8), ("99", 8)])
def test_openmp_bounds_them(wanted: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.threads.num_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert most_threads() == expected


@pytest.mark.parametrize(("environment", "spins"), [
    ({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_threads_that_wait_sleep_soon_unless_told_otherwise(environment: dict[str, str], spins: str | None) -> None:
    spin_briefly(environment)
    assert environment.get("GOMP_SPINCOUNT") == spins


def test_openmp_is_told_before_it_is_there() -> None:
    code = "import sys, deploy.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
