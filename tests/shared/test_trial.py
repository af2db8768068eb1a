"""No grammar harms who asks about it: real processes, real limits."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from shared import trial
from shared.errors import InvalidGrammar, Unavailable
from shared.grammar import of_schema
from shared.trial import Trials
from worker import tiny

TOKENIZER_JSON = (Path(tiny.MODEL_FOLDER) / "tokenizer.json").read_text()
VOCAB_SIZE = Tokenizer.from_str(TOKENIZER_JSON).get_vocab_size()


@pytest.fixture
def trials() -> Trials:
    return Trials(TOKENIZER_JSON, VOCAB_SIZE, (256,))


def process_of(trials: Trials) -> psutil.Process:
    assert trials._server
    return psutil.Process(trials._server._process.pid)


def chain(length: int, rule: Callable[[int], str], last: str) -> str:
    return "\n".join([*map(rule, range(length)), f"r{length}: {last}", "start: r0"])


def refers(length: int) -> Any:
    """Each schema to the next, as a property that must be there."""
    one = {f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}, "required": ["x"]}
           for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": one | {f"a{length}": {"type": "integer"}}}


HOSTILE: dict[str, Callable[[], tuple[str, Any]]] = {
    "rules of rules": lambda: ("grammar", chain(18_000, lambda i: f"r{i}: r{i + 1}", '"b"')),
    "rules behind letters": lambda: ("grammar", chain(12_000, lambda i: f'r{i}: "a" r{i + 1}', '"b"')),
    "rules in another language": lambda: ("grammar", "\n".join([
        *(f'r{i} ::= "a" r{i + 1}' for i in range(9000)), 'r9000 ::= "b"', "root ::= r0"])),
    "what never ends": lambda: ("grammar", "start: A B\nA: /a+/\nB: /a/"),
    "schemas of schemas": lambda: ("schema", refers(2500)),
    "multiples of a large number": lambda: ("schema", {"type": "integer", "multipleOf": 9_999_991}),
    "multiples of several": lambda: ("schema", {"type": "integer", "allOf": [
        {"multipleOf": 101}, {"multipleOf": 103}, {"multipleOf": 107}]}),
    "one of many objects": lambda: ("schema", {"anyOf": [{"type": "object", "properties": {
        f"k{i}_{j}": {"type": "integer"} for j in range(10)}} for i in range(500)]}),
    "one of many words": lambda: ("grammar", "start: " + " | ".join(f'"w{i}"' for i in range(20_000))),
    "bounds in every way": lambda: ("schema", {"allOf": [{"minimum": i} for i in range(3000)],
                                               "anyOf": [{"minimum": 1}] * 10_000}),
    "a long way to go": lambda: ("schema", {"$defs": {"A": {"$ref": "#/" + "a/" * 50_000}},
                                            "anyOf": [{"$ref": "#/$defs/A"}] * 1000}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_end_a_process_or_never_end_is_refused(name: str, trials: Trials) -> None:
    """And the next one is tried as if nothing had been."""
    with pytest.raises(InvalidGrammar, match=r"too (much|large)|leads to nothing|at most"):
        trials.make(*HOSTILE[name]())
    server = process_of(trials)
    trials.make("choice", ["yes", "no"])
    assert process_of(trials) == server


def test_what_is_too_large_is_not_even_sent(trials: Trials) -> None:
    with pytest.raises(InvalidGrammar, match="at most"):
        trials.make("choice", ["x" * (1 << 20)] * 4)
    assert trials._server is None


def test_what_is_in_order_is_accepted_and_what_is_not_is_refused_in_words(trials: Trials) -> None:
    for _ in range(2):
        schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
        assert trials.make("schema", schema) == of_schema(schema) == trials.make("made", of_schema(schema))
        with pytest.raises(InvalidGrammar, match="not written right"):
            trials.make("regex", "((")


def test_what_was_tried_is_not_tried_again(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MAX_KNOWN", 2)
    asked: list[bytes] = []
    ask = trials._try

    def watched(form: bytes) -> trial.Verdict:
        asked.append(form)
        return ask(form)

    monkeypatch.setattr(trials, "_try", watched)
    forms: list[tuple[str, Any]] = [("choice", ["a"]), HOSTILE["schemas of schemas"](), ("choice", ["b"])]
    for place in (0, 0, 1, 0, 1, 2, 2, 1, 0):           # who is asked for last goes last
        with contextlib.nullcontext() if place != 1 else pytest.raises(InvalidGrammar, match="too much"):
            trials.make(*forms[place])
    assert [forms.index(tuple(json.loads(each))) for each in asked] == [0, 1, 2, 0]


def test_many_ask_at_once_and_a_slow_one_holds_up_none(trials: Trials) -> None:
    """As many as there may be are tried at a time; what is slow takes the place of one."""
    trials.make("choice", ["warm"])
    ended: list[str] = []

    def make(name: str, kind: str, value: Any) -> None:
        try:
            trials.make(kind, value)
        except InvalidGrammar:
            assert name == "slow"
        ended.append(name)

    with ThreadPoolExecutor(12) as pool:
        pool.submit(make, "slow", *HOSTILE["multiples of a large number"]())
        for number in range(10):
            pool.submit(make, "quick", "regex", f"[a-z]{{{number + 1}}}")
    assert ended == ["quick"] * 10 + ["slow"]


def test_a_server_that_is_killed_is_replaced(trials: Trials) -> None:
    trials.make("choice", ["a"])
    first = process_of(trials)
    first.send_signal(signal.SIGKILL)
    trials.make("choice", ["b"])
    assert process_of(trials) != first


def test_where_no_process_can_be_had_it_is_not_the_grammars_fault(trials: Trials, monkeypatch: pytest.MonkeyPatch,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(Unavailable):
        trials.make("choice", ["a"])
    assert "no grammar can be tried: its server does not start (exit code 1)" in caplog.text


def test_it_ends_with_who_has_started_it() -> None:
    """Whether that one lets it go or is killed."""
    trials = Trials(TOKENIZER_JSON, VOCAB_SIZE, (256,))
    trials.make("choice", ["a"])
    server = process_of(trials)
    del trials
    gc.collect()
    assert not server.is_running()
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            other = Trials(TOKENIZER_JSON, VOCAB_SIZE, (256,))
            other.make("choice", ["a"])
            os.write(writer, str(process_of(other).pid).encode())
            signal.pause()
        finally:
            os._exit(1)
    server = psutil.Process(int(os.read(reader, 20)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    server.wait(timeout=10)


UNDER_LIMITS = """
import resource, sys
from pathlib import Path
from shared.trial import Trials
resource.setrlimit(resource.RLIMIT_STACK, (2 << 20, 2 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
Trials(Path(sys.argv[1]).read_text(), int(sys.argv[2]), (256,)).make("choice", ["a"])
"""


def test_where_limits_are_lower_already_they_stay() -> None:
    """Nobody may raise them again, and grammars are tried all the same."""
    done = subprocess.run([sys.executable, "-c", UNDER_LIMITS, str(Path(tiny.MODEL_FOLDER) / "tokenizer.json"),
                           str(VOCAB_SIZE)], cwd=Path(__file__).parents[2], timeout=60, check=False)
    assert done.returncode == 0
