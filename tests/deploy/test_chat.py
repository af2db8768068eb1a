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


@pytest.mark.parametrize("page", [None, b"<h1>It works</h1>", b"[]", b'{"data": [1]}', b'{"models": []}'])
def test_another_web_server_is_one_line(page: bytes | None) -> None:
    says = r"no list of models at \S+ \(HTTP (200|404)\): is --url right"
    with serving({"/v1/models": page} if page else {}) as port, pytest.raises(BrokenEnvironment, match=says):
        chat(f"http://127.0.0.1:{port}", None, "EMPTY")


def test_the_address_of_an_sdk_will_do() -> None:
    with serving({"/v1/models": b'{"data": []}'}) as port:
        for path in ("", "/", "/v1", "/v1/"):
            with pytest.raises(BrokenEnvironment, match="serves no model at the moment"):
                chat(f"http://127.0.0.1:{port}{path}", None, "EMPTY")


def test_what_is_no_address_is_one_line() -> None:
    with pytest.raises(BrokenEnvironment, match="is no address"):
        chat("http://127.0.0.1:none", None, "EMPTY")
