"""`baton chat` finds the API, or says in one line why it does not."""

from __future__ import annotations

import pytest

from deploy.chat import chat
from shared.errors import BrokenEnvironment
from tests.deploy.web import PROXIES, serving


def test_no_proxy_is_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving({"/v1/models": b'{"data": []}'}) as port:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(BrokenEnvironment, match="serves no model at the moment"):
                chat(f"http://{host}:{port}", None, "EMPTY")
