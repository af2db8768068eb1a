"""Who is let in: keys as a client sends them, byte for byte."""

from __future__ import annotations

import hmac

import pytest
from starlette.requests import Request

from api import auth
from api.auth import ANONYMOUS, Door
from shared.errors import Unauthorized

KEYS = ("sk-first", "sk-zweiter-schlüssel-鍵")


def request(*authorizations: bytes) -> Request:
    return Request({"type": "http", "headers": [(b"authorization", value) for value in authorizations]})


async def test_without_keys_the_door_is_open() -> None:
    assert await Door(())(request()) == ANONYMOUS
    assert await Door(())(request(b"Bearer EMPTY")) == ANONYMOUS


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_a_known_key_opens(key: str, scheme: str) -> None:
    """Also one that is not ASCII, as UTF-8 on the wire."""
    await Door(KEYS)(request(f"{scheme} {key}".encode()))


WRONG = [(), (b"",), (b"Bearer",), (b"Bearer ",), (b"Bearer sk-firs",), (b"Bearer sk-firstt",), (b"Basic sk-first",),
         (b"sk-first",), (b"Bearer sk-first,sk-second",), ("Bearer schlüssel".encode("latin-1"),),
         (b"Bearer \xff\xfe",), (b"Bearer sk-wrong", b"Bearer sk-first")]


@pytest.mark.parametrize("headers", WRONG, ids=repr)
async def test_any_other_is_refused(headers: tuple[bytes, ...]) -> None:
    with pytest.raises(Unauthorized):
        await Door(KEYS)(request(*headers))


async def test_a_key_may_come_as_anthropics_clients_send_it() -> None:
    """The same tenant either way; a bearer's key is the one that counts, and an empty one is none."""
    def named(*headers: tuple[bytes, bytes]) -> Request:
        return Request({"type": "http", "headers": list(headers)})

    door, key = Door((*KEYS, "")), (b"x-api-key", KEYS[1].encode())
    assert await door(named(key)) == await door(request(f"Bearer {KEYS[1]}".encode()))
    assert await door(named(key, (b"authorization", b"Basic eA=="))) == await door(named(key))
    for headers in ((key, (b"authorization", b"Bearer sk-wrong")), ((b"x-api-key", b" "),), ()):
        with pytest.raises(Unauthorized):
            await door(named(*headers))


async def test_a_tenant_is_a_hash_that_tells_nothing_of_the_key() -> None:
    first, second = [await Door(KEYS)(request(f"Bearer {key}".encode())) for key in KEYS]
    assert first != second
    assert all(key not in first and first not in key for key in KEYS)
    assert first == await Door(KEYS[:1])(request(b"Bearer sk-first"))


async def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever fits: each digest is compared, by the function that does not stop early, and no key itself is."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(auth, "hmac", type("Spy", (), {"compare_digest": staticmethod(compare)}))
    await Door(KEYS)(request(b"Bearer sk-first"))
    assert len(compared) == len(KEYS)
    assert all(len(left) == len(right) == 32 for left, right in compared)
