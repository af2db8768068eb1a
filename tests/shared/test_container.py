"""What control groups leave to a container, as files of both versions say it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from shared import container

GIB = 2**30


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(container, "CGROUPS", tmp_path)
    monkeypatch.setattr(container, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:       33554432 kB\nMemAvailable:   16777216 kB\n")
    return tmp_path


def write(files: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text(text + "\n")


@pytest.mark.parametrize(("contents", "expected"), [
    ({}, math.inf), ({"cpu.max": "max 100000"}, math.inf), ({"cpu.max": "200000 100000"}, 2.0),
    ({"cpu.max": "50000 100000"}, 0.5), ({"cpu.max": ""}, math.inf),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0)])
def test_cores(contents: dict[str, str], expected: float, files: Path) -> None:
    write(files, contents)
    assert container.num_cores() == expected


@pytest.mark.parametrize(("contents", "expected"), [
    ({}, 16 * GIB), ({"memory.max": "max", "memory.current": "1000"}, 16 * GIB),
    ({"memory.max": str(4 * GIB), "memory.current": str(GIB)}, 3 * GIB),
    ({"memory.max": str(4 * GIB), "memory.current": str(3 * GIB), "memory.stat": f"anon 5\ninactive_file {2 * GIB}"},
     3 * GIB),
    ({"memory/memory.limit_in_bytes": str(8 * GIB), "memory/memory.usage_in_bytes": str(GIB),
      "memory/memory.stat": "cache 7\ntotal_inactive_file 0"}, 7 * GIB),
    ({"memory.max": str(64 * GIB), "memory.current": "0"}, 16 * GIB)])
def test_bytes(contents: dict[str, str], expected: float, files: Path) -> None:
    """The machine's, unless the container has fewer; what only caches files is free."""
    write(files, contents)
    assert container.num_free_bytes() == expected


def test_where_nothing_is_known_nothing_is_limited(files: Path) -> None:
    (files / "meminfo").unlink()
    assert container.num_free_bytes() == math.inf
