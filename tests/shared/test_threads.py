"""Who gets how many threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.threads import LARGE_BYTES, default_threads, most_threads, num_cores, threads_of_each, weight_bytes


def test_a_large_model_has_all_cores_and_a_small_one_leaves_one() -> None:
    assert [default_threads(cores, LARGE_BYTES) for cores in (1, 2, 8)] == [1, 2, 8]
    assert [default_threads(cores, LARGE_BYTES - 1) for cores in (1, 2, 8)] == [1, 1, 7]


def test_several_workers_share_the_cores() -> None:
    assert [threads_of_each(8, workers) for workers in (1, 2, 3, 20)] == [7, 3, 2, 1]


def test_cores_are_known_where_affinity_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert num_cores() == os.cpu_count()


@pytest.mark.parametrize(("wanted", "expected"), [("1", 1), ("", 8), ("0", 8), ("4,2", 8), ("99", 8)])
def test_openmp_bounds_them(wanted: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.threads.num_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert most_threads() == expected


def test_weights_are_weighed(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"123")
    assert weight_bytes(tmp_path) == 6
