"""The queue against its model (queue_model.py, queue_losses.py), step by step, in orders that hypothesis chooses."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.shared.queue_losses import Losses
from tests.shared.queue_model import Verbs


@pytest.mark.parametrize("machine", [Verbs, Losses])
def test_the_verbs_hold_in_any_order(
        machine: type[Verbs], each_redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submit, claim, publish, lose a lease, hand over, cancel, be late, be unread; and lose data, and restore: a job is
    never lost, doubled or miscounted."""
    monkeypatch.setattr(machine, "redis_url", each_redis_url)
    run_state_machine_as_test(machine, settings=settings(
        max_examples=30, stateful_step_count=30, suppress_health_check=list(HealthCheck),
        derandomize=True, phases=[Phase.generate]))   # Phase.shrink finds fewer steps that fail, in minutes
