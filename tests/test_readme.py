"""The README is true: its tables match the code, its program runs, its folders exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from api import client as resuming
from api.wire import messages
from api.wire.completions import CompletionRequest
from api.wire.format import Constrained
from api.wire.request import REFUSED, ChatRequest
from api.wire.responses import ResponseRequest
from api.wire.sampled import Drawn
from shared.keys import SHARD_KEYS, TENANT_KEYS
from shared.settings import Settings
from tests.system import System

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def rows(first_cell: str) -> list[list[str]]:
    lines = [line for line in README.splitlines() if re.match(rf"\| `{first_cell}", line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [[name.strip("`"), *rest] for name, *rest in cells]


def test_every_field_of_a_request_is_listed() -> None:
    """Once, with its treatment: known fields are acted on or refused; fields without effect are unknown to the code."""
    rows = re.findall(r"^\| (`.*) \| (acted on|accepted without effect|refused) \|$", README, re.MULTILINE)
    listed = {what: [name for fields, found in rows if found == what
                     for name in re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", fields))]
              for what in ("acted on", "accepted without effect", "refused")}
    known = set(ChatRequest.model_fields)
    assert sorted(listed["acted on"] + listed["refused"]) == sorted(known - {"user"})
    assert set(listed["refused"]) == set(REFUSED)
    assert not (set(listed["accepted without effect"]) - {"user"}) & known


@pytest.mark.parametrize(("address", "model", "common"), [
    ("/v1/completions", CompletionRequest, {*Drawn.model_fields, *Constrained.model_fields}),
    ("/v1/responses", ResponseRequest, {*Drawn.model_fields})])
def test_every_field_of_other_languages_is_listed(address: str, model: type[BaseModel], common: set[str]) -> None:
    [[_, fields]] = rows(f"{address}` ")
    assert set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", fields))) == set(model.model_fields) - common


def test_every_field_of_anthropics_request_is_listed() -> None:
    """As it is made use of or refused; what has no effect is no field."""
    paragraph = README.partition("**In Anthropic's language.**")[2].partition("\n\n")[0]
    listed = [set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", sentence)))
              for sentence in re.split(r"Acted on are|Refused are|All else", paragraph)[1:]]
    acted_on, refused, without_effect = listed[0], listed[1], listed[2] - {"thinking"}
    assert acted_on | refused == set(messages.MessageRequest.model_fields)
    assert refused == set(messages.REFUSED) and not without_effect & (acted_on | refused)


def test_the_settings_are_listed_as_they_are() -> None:
    listed = {name: (default.strip("`"), text) for name, default, text in rows("BATON_")}
    expected = {}
    for name, setting in Settings.model_fields.items():
        default = setting.default
        shown = ",".join(default) if isinstance(default, tuple) else "" if default is None else str(default)
        expected[f"BATON_{name.upper()}"] = (shown, setting.description)
    assert listed == expected


def test_the_keys_are_listed_as_they_are() -> None:
    keys = SHARD_KEYS | TENANT_KEYS
    assert {row[0]: tuple(row[1:]) for row in rows("") if row[0] in keys} == keys


def test_the_rooms_of_the_picture_exist() -> None:
    picture = README.partition("## The rooms")[2].partition("```\n")[2].partition("```")[0]
    for room, text in re.findall(r"^(\w+)/ +(.*(?:\n {11}.*)*)", picture, re.MULTILINE):
        for part in re.findall(r"\b(\w+)(?:/|\.py)", text):
            assert (ROOT / room / part).exists() or (ROOT / room / f"{part}.py").exists(), f"{room}/{part}"


def test_the_program_runs(system: System, capsys: pytest.CaptureFixture[str]) -> None:
    program = README.partition("```python\n")[2].partition("```")[0]
    exec(program.replace("http://localhost:30000", system.url), {})
    answer, tokens = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert answer == ", ".join(map(str, range(1, 41)))
    assert re.fullmatch(r"Tokens: \d+ \+ \d+", tokens)


def test_the_program_with_our_transport_runs(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    program = README.partition("**With the SDK**")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.setitem(sys.modules, "resuming", resuming)
    names: dict[str, Any] = {}
    exec(program.replace("http://localhost:30000", system.url), names)
    answer = names["client"].chat.completions.create(
        model="baton-tiny", messages=[{"role": "user", "content": "Count from 1 to 40."}], max_tokens=256)
    assert answer.choices[0].message.content == ", ".join(map(str, range(1, 41)))


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
