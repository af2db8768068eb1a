"""The lines of a batch, and what comes next for one: pure, so tried in every order."""

from __future__ import annotations

import json
import random
from codecs import BOM_UTF8
from dataclasses import replace
from typing import Any, get_args

import pytest

from api.wire.batches import OVER, TIMES, Batch, Status, Step, can_be_cancelled, digits_of, next_step, parse_batch
from api.wire.fold import dump, usage_body
from api.wire.lines import (
    MAX_CUSTOM_ID_CHARS,
    MAX_ERRORS,
    MAX_LINE_BYTES,
    MAX_LINES,
    Checker,
    Line,
    Raw,
    Splitter,
    answered,
    given_up,
    refused,
)
from shared.errors import BadRequest, LineTooLong, ModelNotFound
from shared.job import Usage

CHAT = "/v1/chat/completions"
NOW_S = 1000.0


def line(custom_id: str = "a", **changes: Any) -> bytes:
    fields = {"custom_id": custom_id, "method": "POST", "url": CHAT,
              "body": {"model": "m", "messages": [{"role": "user", "content": "é\n"}]}} | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None}, ensure_ascii=False).encode()


def check(*lines: bytes, endpoint: str = CHAT) -> Checker:
    checker = Checker(endpoint)
    checker.feed(b"\n".join(lines))
    checker.end()
    return checker


def test_lines_are_the_same_wherever_pieces_are_cut() -> None:
    """As bytes.split would cut the whole, with Windows' mark and newlines, without a last one, blank lines between."""
    text = b"\n".join([line("é"), b"", b"  ", line("b") + b"\r", line("c")])
    wanted = [Raw(number, each.strip()) for number, each in enumerate(text.split(b"\n"), 1) if each.strip()]
    whole = BOM_UTF8 + text
    rng = random.Random(1)
    for size in (1, 2, 7, len(whole)):
        splitter, found, begin = Splitter(), list[Raw](), 0
        while begin < len(whole):
            end = begin + rng.randint(1, size)
            found += splitter.feed(whole[begin:end])
            begin = end
        assert found + splitter.end() == wanted
        assert splitter.num_lines == 5


def test_a_line_that_does_not_end_is_held_up_to_a_bound() -> None:
    splitter = Splitter()
    splitter.feed(b"x" * MAX_LINE_BYTES)
    with pytest.raises(LineTooLong):
        splitter.feed(b"x")


@pytest.mark.parametrize(("wrong", "code", "param"), [
    (b"{", "invalid_json_line", None), (b"[]", "invalid_json_line", None), (b"\xff{}", "invalid_json_line", None),
    (b'{"a": NaN}', "invalid_json_line", None), (b"[" * 5000, "invalid_json_line", None),
    (line(custom_id=""), "invalid_value", "custom_id"),
    (line(custom_id="x" * (MAX_CUSTOM_ID_CHARS + 1)), "invalid_value", "custom_id"),
    (line(custom_id=7), "invalid_value", "custom_id"),  # type: ignore[arg-type]
    (line(custom_id=None), "missing_required_parameter", "custom_id"),  # type: ignore[arg-type]
    (line(method="GET"), "invalid_value", "method"), (line(method=None), "missing_required_parameter", "method"),
    (line(url="/v1/completions"), "mismatched_endpoint", "url"), (line(url=None), "missing_required_parameter", "url"),
    (line(body="x"), "invalid_type", "body"), (line(body=None), "missing_required_parameter", "body"),
    (line(body={"stream": True}), "unsupported_parameter", "body.stream"),
    (line("same"), "duplicate_custom_id", "custom_id")])
def test_a_wrong_line_is_named_by_its_number(wrong: bytes, code: str, param: str | None) -> None:
    checker = check(line("same"), b"", wrong, line("good"))
    [error] = checker.errors
    assert (error["code"], error["line"], error["param"]) == (code, 3, param)
    assert checker.num_requests == 3


def test_what_is_wrong_with_a_body_is_its_own_answer() -> None:
    """It is no fault of the batch."""
    checker = check(line("a", body={"model": "m", "temperature": "hot"}), line("b", body={"stream": False}))
    assert (checker.errors, checker.num_requests, checker.models) == ([], 2, {"m"})


def test_a_file_is_looked_at_as_far_as_it_makes_sense() -> None:
    assert [error["code"] for error in check(b"", b" ").errors] == ["empty_file"]
    assert len(check(*[b"{"] * (2 * MAX_ERRORS)).errors) == MAX_ERRORS
    too_many = check(*[b"x" if number == MAX_LINES else b"" for number in range(MAX_LINES + 2)])
    assert [error["code"] for error in too_many.errors] == ["invalid_json_line", "too_many_tasks"]
    endless = check(line("a"), b"x" * (MAX_LINE_BYTES + 1))
    assert [(error["code"], error["line"]) for error in endless.errors] == [("line_too_long", 2)]
    assert endless.is_done


def test_a_result_is_a_line_of_json() -> None:
    asked, digits = Line(3, 'a"\n', {}), digits_of("batch_1", 3)
    usage = usage_body(Usage(9, 5, 4, 3))
    result = answered(asked, digits, dump({"id": "chatcmpl-1", "usage": usage}))
    assert result.usage == Usage(9, 5, 4, 3)
    assert result.text.endswith(b"}\n") and result.text.count(b"\n") == 1 and not result.is_error
    said = json.loads(result.text)
    assert said == {"id": f"batch_req_{digits}", "custom_id": 'a"\n', "error": None, "response": {
        "status_code": 200, "request_id": f"req_{digits[:24]}", "body": {"id": "chatcmpl-1", "usage": usage}}}
    failed = json.loads(refused(asked, digits, ModelNotFound(param="model")).text)
    assert failed["response"]["status_code"] == 404
    assert failed["response"]["body"]["error"]["code"] == "model_not_found"
    left = json.loads(given_up(asked, digits, "batch_expired").text)
    assert left["response"] is None and left["error"]["code"] == "batch_expired"


# ── a batch ──


def batch(status: Status = "in_progress", num_done: int = 0, num_requests: int = 2, **fields: Any) -> Batch:
    return Batch("batch_1", "t", CHAT, "file-1", 0, round(NOW_S) + 1, status=status, num_completed=num_done,
                 num_requests=num_requests, **fields)


@pytest.mark.parametrize(("status", "num_done", "in_time", "late"), [
    ("validating", 0, "validate", "expire"), ("in_progress", 0, "run", "expire"), ("in_progress", 1, "run", "expire"),
    ("in_progress", 2, "finalize", "expire"), ("finalizing", 2, "complete", "complete"),
    ("cancelling", 1, "cancel", "cancel"), *((over, 2, None, None) for over in sorted(OVER))])
def test_what_comes_next(status: Status, num_done: int, in_time: Step | None, late: Step | None) -> None:
    found = batch(status, num_done)
    assert next_step(found, NOW_S) == in_time
    assert next_step(found, NOW_S + 1) == late


def test_every_status_has_a_time_and_an_end() -> None:
    """Every step leads on: to another status, or to one line more that is done."""
    assert {*TIMES, "validating"} == set(get_args(Status))
    assert all((next_step(batch(status), NOW_S) is None) == (status in OVER) for status in get_args(Status))
    assert [status for status in get_args(Status) if can_be_cancelled(batch(status))] == ["validating", "in_progress"]


def test_a_batch_is_the_same_behind_redis() -> None:
    made = batch("validating", num_requests=0, metadata={"a": "é"})
    stored = {name.encode(): value.encode() for name, value in made.encode().items()}
    assert Batch.decode(stored) == made
    stored |= {b"status": b"failed", b"failed_at": b"7", b"num_requests": b"4", b"models": b'["m"]',
               b"errors": b'[{"code": "x"}]'}
    assert Batch.decode(stored) == replace(made, status="failed", at={"failed": 7}, num_requests=4, models=("m",),
                                           errors=({"code": "x"},))


def test_files_are_shown_once_nothing_is_added_to_them() -> None:
    running = batch(num_done=1, num_failed=1, at={"in_progress": 1})
    assert running.body()["output_file_id"] is None
    over = replace(running, status="completed").body()
    assert (over["output_file_id"], over["error_file_id"]) == (running.output_file_id, running.error_file_id)
    assert running.output_file_id != running.error_file_id
    assert replace(running, status="completed", num_failed=0).body()["error_file_id"] is None


@pytest.mark.parametrize(("wrong", "param"), [
    ({"endpoint": "/v1/embeddings"}, "endpoint"), ({"completion_window": "1h"}, "completion_window"),
    ({"input_file_id": None}, "input_file_id"), ({"metadata": {"a": 1}}, "metadata"),
    ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "output_expires_after"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 7201}}, "output_expires_after")])
def test_a_request_for_a_batch_is_checked(wrong: dict[str, Any], param: str) -> None:
    body = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"}
    assert parse_batch(json.dumps(body).encode(), 7200).metadata is None
    with pytest.raises(BadRequest) as refusal:
        parse_batch(json.dumps(body | wrong).encode(), 7200)
    assert refusal.value.param == param
