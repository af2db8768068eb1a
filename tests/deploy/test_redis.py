"""A Redis of our own: one server per folder, and none that nobody knows of."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from deploy import redis
from deploy.redis import RedisServer
from shared.errors import BrokenEnvironment


def refused(folder: Path) -> bool:
    with pytest.raises(BrokenEnvironment, match=f"another Baton uses {folder}: give another --data-dir"):
        RedisServer(folder).start()
    return True


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    try:
        assert refused(tmp_path)
        server.kill()
        server.start()
        assert refused(tmp_path)
    finally:
        server.stop()
    RedisServer(tmp_path).start().stop()


def test_a_server_that_outlives_its_supervisor_keeps_its_folder(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    assert server.process and server.lock_fd is not None
    os.close(server.lock_fd)                            # as the supervisor's end does
    server.lock_fd = None
    try:
        assert refused(tmp_path)
    finally:
        server.stop()
    RedisServer(tmp_path).start().stop()


def test_a_server_that_crashed_starts_again_in_its_folder(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    try:
        assert server.process
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        assert refused(tmp_path)                        # its supervisor is about to start it
        server.start()
    finally:
        server.stop()


def test_a_signal_while_it_starts_leaves_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_interrupted(_: RedisServer) -> bool:
        raise KeyboardInterrupt

    server = RedisServer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RedisServer, "_answers", is_interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.start()
    assert server.process and server.process.poll() is not None
    RedisServer(tmp_path).start().stop()


def test_a_server_that_does_not_start_lets_go_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis, "LOCK_TIMEOUT_S", 0.0)
    with pytest.raises(BrokenEnvironment, match="Redis did not start"):
        RedisServer(tmp_path, options=("--nonsense", "1")).start()
    RedisServer(tmp_path).start().stop()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BrokenEnvironment, match=f"cannot keep data in {folder} .*--data-dir"):
            RedisServer(folder).start()
