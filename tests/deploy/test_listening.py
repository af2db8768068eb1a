"""A pod accepts as many connections as the machine lets it."""

from __future__ import annotations

import resource

import pytest

from deploy import listening


class Limits:
    """Of this process, as if."""

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def get(self, _: int) -> tuple[int, int]:
        return self.now

    def set(self, _: int, limits: tuple[int, int]) -> None:
        self.now = limits


@pytest.mark.parametrize(("soft", "hard", "raised", "warns"), [
    (1024, 1 << 20, 65_536, False), (1024, 8192, 8192, False), (1024, resource.RLIM_INFINITY, 65_536, False),
    (100_000, 1 << 20, 100_000, False), (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY, False),
    (1024, 2048, 2048, True)])
def test_the_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, soft: int,
                                           hard: int, raised: int, warns: bool) -> None:
    limits = Limits(soft, hard)
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", limits.set)
    listening.raise_file_limit()
    assert limits.now == (raised, hard)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warns
