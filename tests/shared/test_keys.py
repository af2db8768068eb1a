"""The map of Redis is the territory: every key that the scripts and the code touch stands in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared.keys import SHARD_KEYS, TENANT_KEYS, Shard, new_completion_id, shard_of, tenant_key

ROOT = Path(__file__).parent.parent.parent
MAPPED = {name.partition(":")[0] for name in SHARD_KEYS}


def test_the_scripts_touch_mapped_keys_alone() -> None:
    touched = set()
    for script in (ROOT / "shared" / "lua").glob("*.lua"):
        touched |= set(re.findall(r"key\('([a-z]+):?'", script.read_text()))
    assert touched <= MAPPED
    assert MAPPED - touched == {"card", "tokenizer"}    # written without a script


def test_the_code_touches_mapped_keys_alone() -> None:
    for room in ("shared", "api", "worker", "deploy"):
        for path in (ROOT / room).rglob("*.py"):
            for name in re.findall(r"\bkey\(f?\"([a-z]+)", path.read_text()):
                assert name in MAPPED, f"{path} touches {name}"


def test_every_key_of_a_shard_lies_in_one_slot() -> None:
    """A cluster hashes what stands in the first braces: names that hold braces themselves change nothing."""
    shard = Shard.of("org/{model}-{0}", 3)
    assert re.fullmatch(r"\{baton\.[0-9a-f]{10}-3\}", shard.tag)
    assert all(shard.key(name).startswith(shard.tag + ":") for name in SHARD_KEYS)


def test_what_spans_models_lies_in_a_slot_of_its_tenant() -> None:
    assert tenant_key("0123abcd", "idempotency:00") == "{t.0123abcd}:idempotency:00"
    for path in (ROOT / "api").rglob("*.py"):
        for name in re.findall(r'\btenant_key\(\w+, f?"([a-z]+)', path.read_text()):
            assert name in {mapped.partition(":")[0] for mapped in TENANT_KEYS}, f"{path} touches {name}"


def test_an_id_says_where_its_log_is_and_is_not_guessed() -> None:
    shard = Shard.of("m")
    ids = {new_completion_id(shard) for _ in range(100)}
    assert len(ids) == 100
    assert all(shard_of(i) == shard and len(i.split("-")[-1]) == 32 for i in ids)


@pytest.mark.parametrize("text", [
    "", "chatcmpl-", "chatcmpl-a-b", "x-1-2-3", "chatcmpl-{a}-0-1", "chatcmpl-a-0-é", "a" * 999])
def test_what_is_no_id_has_no_shard(text: str) -> None:
    assert shard_of(text) is None
