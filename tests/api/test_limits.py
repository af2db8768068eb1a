"""When to come back, and how long a finished log is kept: pure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.limits import (
    MAX_RETRY_S,
    MIN_RETRY_S,
    PRESSED_FRACTION,
    measured_rate,
    retain_under_pressure_s,
    retry_after_s,
)

counts = st.integers(0, 10**6)
rates = st.floats(0, 10**6)
fractions = st.floats(0, 2)


def test_who_is_refused_comes_back_when_the_line_has_moved_on() -> None:
    assert retry_after_s(100, 10.0) == 10.0


def test_without_a_measured_rate_he_comes_back_soon() -> None:
    assert retry_after_s(4096, 0.0) == MIN_RETRY_S


@given(num_queued=counts, jobs_per_s=rates)
def test_the_wait_is_bounded(num_queued: int, jobs_per_s: float) -> None:
    assert MIN_RETRY_S <= retry_after_s(num_queued, jobs_per_s) <= MAX_RETRY_S


@given(num_queued=counts, more=counts, jobs_per_s=rates)
def test_a_longer_line_is_a_longer_wait(num_queued: int, more: int, jobs_per_s: float) -> None:
    assert retry_after_s(num_queued, jobs_per_s) <= retry_after_s(num_queued + more, jobs_per_s)


def test_after_a_quiet_hour_the_line_is_as_fast_as_before() -> None:
    """Who comes with a crowd is not sent away for a minute because nobody came before."""
    rate = 4.0
    for _ in range(3600):
        rate = measured_rate(rate, num_ended=0, num_live=0)
    assert retry_after_s(8, rate) == 2.0


def test_a_line_that_stands_is_seen_to_stand() -> None:
    assert measured_rate(4.0, num_ended=0, num_live=8) < 4.0 < measured_rate(4.0, num_ended=9, num_live=0)


def test_logs_are_kept_in_full_until_memory_is_short() -> None:
    assert retain_under_pressure_s(600, 0.8 * PRESSED_FRACTION, 0.8) == pytest.approx(600)
    assert retain_under_pressure_s(600, 0.0, 0.8) == 600


def test_at_the_limit_a_tenth_remains() -> None:
    assert retain_under_pressure_s(600, 0.8, 0.8) == pytest.approx(60)
    assert retain_under_pressure_s(600, 1.0, 0.8) == pytest.approx(60)


@given(fraction=fractions, more=fractions)
def test_more_pressure_never_keeps_longer(fraction: float, more: float) -> None:
    assert retain_under_pressure_s(600, fraction + more, 0.8) <= retain_under_pressure_s(600, fraction, 0.8)
