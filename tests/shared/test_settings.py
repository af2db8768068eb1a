"""Settings are read once, and a wrong one stops the start with a line that says which."""

from __future__ import annotations

import pytest

from shared import settings
from shared.errors import BrokenEnvironment
from shared.settings import API_ONLY, SERVE_ONLY, WORKER_ONLY, Settings


def test_a_misspelt_variable_is_named_with_the_right_one() -> None:
    with pytest.raises(BrokenEnvironment, match="SEQ is not a setting; did you mean BATON_MAX_NUM_SEQS"):
        settings.load({}, {"BATON_MAX_NUM_SEQ": "3"})


def test_variables_of_the_tests_are_let_through() -> None:
    settings.load({}, {"BATON_TEST_REQUIRE": "all", "PATH": "/bin"})


@pytest.mark.parametrize(("name", "value"), [
    ("port", "70000"), ("port", "http"), ("lease_s", "-1"), ("dtype", "int4"), ("max_num_seqs", "0"),
    ("max_model_len", "1"), ("threads", "100000"),
    *((name, value) for name in Settings.model_fields if name.endswith("_s") for value in ("inf", "nan", "1e12"))])
def test_a_wrong_value_is_named_in_one_line(name: str, value: str) -> None:
    with pytest.raises(BrokenEnvironment, match=f"BATON_{name.upper()}") as error:
        settings.load({name: value}, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"idle_poll_s": 2.0, "lease_s": 3.0}, {"announce_s": 5.0, "announce_ttl_s": 10.0}])
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BrokenEnvironment, match=r"at (most|least)"):
        settings.load(wrong, {})


def test_flags_beat_variables_and_variables_beat_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_PORT", "8001")
    monkeypatch.setenv("BATON_MAX_NUM_SEQS", "7")
    read = settings.load({"port": "8002"})
    assert (read.port, read.max_num_seqs, read.host) == (8002, 7, "127.0.0.1")


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_SERVED_MODEL_NAME", "a/b, c")
    assert settings.load({}).served_model_name == ("a/b", "c")
    assert settings.load({"served_model_name": ["d, e", "f"]}).served_model_name == ("d", "e", "f")


def test_a_child_reads_what_its_parent_read(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = settings.load({"served_model_name": ["a/b", "c"], "lease_s": "2.5", "allow_no_aof": True, "apis": 3}, {})
    for name, value in parent.environment().items():
        monkeypatch.setenv(name, value)
    child = settings.load({})
    assert (child.served_model_name, child.lease_s, child.allow_no_aof) == (("a/b", "c"), 2.5, True)
    assert child.apis == 1                              # a matter of the parent alone


def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_API_KEY", "sk-canary")
    with pytest.raises(BrokenEnvironment) as error:
        settings.load({"port": "sk-canary"})
    assert "canary" not in str(error.value)
    assert "canary" not in repr(settings.load({}))


def test_every_setting_belongs_to_a_room_and_has_a_description() -> None:
    assert set(Settings.model_fields) >= API_ONLY | WORKER_ONLY | SERVE_ONLY
    assert all(field.description for field in Settings.model_fields.values())
