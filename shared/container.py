"""What the control groups of a container leave to its processes: cores and bytes, of both versions of such groups.

Inside, `/proc` shows the whole machine. Where no limit is set, or nothing is known of one, it is infinite.
"""

from __future__ import annotations

import math
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")        # a container's own, as it sees them
MEMINFO = Path("/proc/meminfo")


def num_cores() -> float:
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        numbers = " ".join(map(_read, names)).split()
        if len(numbers) == 2 and all(map(str.isdecimal, numbers)):
            return int(numbers[0]) / int(numbers[1])
    return math.inf


def num_free_bytes() -> float:
    """Of the machine's memory and of the container's share; files that are cached count as free."""
    return min(_of_machine(), _of_group("memory.max", "memory.current", "memory.stat", "inactive_file"),
               _of_group("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
                         "total_inactive_file"))


def _of_machine() -> float:
    available = _fields(MEMINFO).get("MemAvailable:", "")
    return 1024 * int(available) if available.isdecimal() else math.inf


def _of_group(limit_name: str, used_name: str, stat_name: str, cached_name: str) -> float:
    limit, used = _read(limit_name), _read(used_name)
    cached = _fields(CGROUPS / stat_name).get(cached_name, "0")
    return int(limit) - int(used) + int(cached) if limit.isdecimal() and used.isdecimal() else math.inf


def _read(name: str) -> str:
    try:
        return (CGROUPS / name).read_text().strip()
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, str]:
    """The first two words of each line."""
    try:
        return {words[0]: words[1] for line in path.read_text().splitlines() if len(words := line.split()) > 1}
    except OSError:
        return {}
