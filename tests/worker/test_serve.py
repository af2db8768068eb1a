"""What a worker decides at its start."""

from __future__ import annotations

import pytest

from shared.settings import Settings
from worker.build import MIN_CHUNK_TOKENS, fit_chunk
from worker.serve import served_names


@pytest.mark.parametrize(("took_s", "expected"), [
    (0.01, 256), (0.75, 256), (0.76, 128), (2.9, 64), (1e9, MIN_CHUNK_TOKENS)])
def test_a_slow_machine_takes_smaller_chunks(took_s: float, expected: int) -> None:
    """A step stays under a quarter of the lease, so that a long prompt never costs a worker its jobs."""
    assert fit_chunk(256, took_s, most_s=0.75) == expected


def test_names() -> None:
    assert served_names(Settings()) == ("baton-tiny",)
    assert served_names(Settings(model="org/m")) == ("org/m",)
    assert served_names(Settings(model="org/m", served_model_name=("a", "b"))) == ("a", "b")
