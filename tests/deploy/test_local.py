"""What the supervisor of one machine does with its children."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from deploy import local
from deploy.local import Child
from shared.settings import Settings
from shared.threads import num_cores, threads_of_each
from tests.deploy.web import PROXIES, serving
from tests.system import eventually

# Ends at SIGTERM, when it has finished what it does.
SLOW = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(float(sys.argv[2]))
    pathlib.Path(sys.argv[1], "ended").touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1], "begun").touch()
time.sleep(60)
"""


def test_pods_may_drain_and_workers_have_time_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "STOP_TIMEOUT_S", 1.0)
    children = []
    for name, takes_s in (("api 0", 1.5), ("worker 0", 0.3), ("worker 1", 30.0)):
        (tmp_path / name).mkdir()
        children.append(Child(name, [sys.executable, "-c", SLOW, str(tmp_path / name), str(takes_s)], dict(os.environ)))
        children[-1].start()
    eventually("all have begun", lambda: all((tmp_path / child.name / "begun").exists() for child in children))
    local._stop(children, 2.0)
    assert all(child.exit_code is not None for child in children)
    assert [(tmp_path / child.name / "ended").exists() for child in children] == [True, True, False]


def test_no_proxy_is_asked_for_our_own_service(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(local, "START_TIMEOUT_S", 5.0)
    with serving({"/ready": b'{"models": ["m"]}'}) as port:
        local._await_model([], None, port, Settings())


def test_the_workers_of_a_machine_share_its_cores_and_its_memory() -> None:
    with socket.socket() as listening:
        children = local._children(Settings(apis=1, workers=3), "redis://nowhere", listening)
    environments = [child.environment for child in children if child.name.startswith("worker")]
    assert [each["BATON_WORKERS"] for each in environments] == ["3"] * 3
    assert {each["BATON_THREADS"] for each in environments} == {str(threads_of_each(num_cores(), 3))}
