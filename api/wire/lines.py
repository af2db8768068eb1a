"""The lines of a batch's files: requests that are read and checked, results that are written.

Pure; it sees one piece of a file at a time, of any length, never the whole.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from api.wire.body import read_object
from api.wire.completions import CompletionRequest, parse_completion
from api.wire.fold import dump
from api.wire.items import is_reference
from api.wire.request import ChatRequest, parse
from api.wire.responses import parse_response
from shared.errors import (
    APIError,
    BadRequest,
    DuplicateCustomID,
    EmptyFile,
    InvalidLine,
    InvalidType,
    InvalidValue,
    LineTooLong,
    MismatchedURL,
    MissingField,
    NotJSON,
    TooManyLines,
    UnsupportedParameter,
)
from shared.job import Language, Usage

MAX_LINES = 50_000
MAX_LINE_BYTES = 1 << 20
MAX_CUSTOM_ID_CHARS = 512
MAX_ERRORS = 100                                        # reported for a batch; later ones are not searched for
MAX_MODELS = 64                                         # of a batch, remembered as served


class Raw(NamedTuple):
    """One line as it stands in the file."""

    number: int                                         # from 1, blank lines included
    text: bytes


class Splitter:
    """Cuts pieces of a file into lines; blank ones are counted and left out."""

    def __init__(self) -> None:
        self.num_lines = 0
        self._rest: list[bytes] = []                    # of an incomplete line
        self._num_rest_bytes = 0

    def feed(self, piece: bytes) -> list[Raw]:
        """The lines that end in this piece. Raises LineTooLong."""
        *ended, rest = piece.split(b"\n")
        lines = []
        for text in ended:
            lines += self._end(text)
        self._go_on(rest)
        return lines

    def end(self) -> list[Raw]:
        """The last line, where no newline ends it."""
        return self._end(b"") if self._num_rest_bytes else []

    def _go_on(self, text: bytes) -> None:
        self._rest.append(text)
        self._num_rest_bytes += len(text)
        if self._num_rest_bytes > MAX_LINE_BYTES:
            raise LineTooLong(f"A line of the input file has at most {MAX_LINE_BYTES} bytes.")

    def _end(self, text: bytes) -> list[Raw]:
        self._go_on(text)
        self.num_lines += 1
        line = b"".join(self._rest).removeprefix(BOM_UTF8 if self.num_lines == 1 else b"").strip()
        self._rest, self._num_rest_bytes = [], 0
        return [Raw(self.num_lines, line)] if line else []


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch."""

    number: int
    custom_id: str
    body: dict[str, Any]


class Wanted(NamedTuple):
    request: ChatRequest | CompletionRequest
    asked: dict[str, Any] | None = None                 # request fields that the answer repeats


class Endpoint(NamedTuple):
    language: Language
    parse: Callable[[bytes, int], Wanted]


def _chat(body: bytes, max_messages: int) -> Wanted:
    return Wanted(parse(body, max_messages))


def _text(body: bytes, _: int) -> Wanted:
    request = parse_completion(body)
    if len(request.prompts) > 1:
        raise UnsupportedParameter("A line of a batch has one prompt.", param="prompt")
    return Wanted(request)


def _response(body: bytes, max_items: int) -> Wanted:
    request = parse_response(body, max_items)
    for param in ("background", "previous_response_id"):
        if getattr(request, param):
            raise UnsupportedParameter(f"A line of a batch has no {param}.", param=param)
    if any(map(is_reference, request.items)):
        raise UnsupportedParameter("A line of a batch has items as they are, not references to them.", param="input")
    return Wanted(request.chat(request.items), request.asked | {"store": False})


ENDPOINTS: dict[str, Endpoint] = {"/v1/chat/completions": Endpoint("chat", _chat),
                                  "/v1/completions": Endpoint("completions", _text),
                                  "/v1/responses": Endpoint("responses", _response)}


def read_line(raw: Raw, endpoint: str) -> Line:
    """Raises BadRequest for an invalid line; its body is validated when the request is made."""
    try:
        found = read_object(raw.text)
    except NotJSON:
        raise InvalidLine from None
    for name in ("custom_id", "method", "url", "body"):
        if found.get(name) is None:
            raise MissingField(f"{name} is required.", param=name)
    custom_id, body = found["custom_id"], found["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise InvalidValue(f"custom_id is a string of 1 to {MAX_CUSTOM_ID_CHARS} characters.", param="custom_id")
    if found["method"] != "POST":
        raise InvalidValue("method is POST.", param="method")
    if found["url"] != endpoint:
        raise MismatchedURL(param="url")
    if not isinstance(body, dict):
        raise InvalidType("body is a JSON object.", param="body")
    if body.get("stream"):
        raise UnsupportedParameter("A line of a batch cannot be streamed.", param="body.stream")
    return Line(raw.number, custom_id, body)


class Checker:
    """Checks all lines of a file, in order."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.errors: list[dict[str, Any]] = []
        self.num_requests = 0
        self.models: set[str] = set()
        self._is_lost = False
        self._splitter = Splitter()
        self._seen: set[int] = set()                    # hashes: 50,000 names may take megabytes

    @property
    def num_lines(self) -> int:
        return self._splitter.num_lines

    @property
    def is_done(self) -> bool:
        """Nothing more needs to be read."""
        return self._is_lost or len(self.errors) >= MAX_ERRORS

    def feed(self, piece: bytes) -> None:
        try:
            self._check(self._splitter.feed(piece))
        except LineTooLong as error:                    # later lines cannot be found
            self._refuse(error, self.num_lines + 1)
            self._is_lost = True
        if self.num_lines > MAX_LINES:
            self._refuse(TooManyLines(f"An input file has at most {MAX_LINES} lines."), None)
            self._is_lost = True

    def end(self) -> None:
        if self.is_done:
            return
        self._check(self._splitter.end())
        if not self.num_requests and not self.errors:
            self._refuse(EmptyFile(), None)

    def _check(self, lines: Sequence[Raw]) -> None:
        for raw in lines:
            if self.is_done:
                break
            self.num_requests += 1
            try:
                line = read_line(raw, self.endpoint)
                name = hash(line.custom_id)
                if name in self._seen:
                    raise DuplicateCustomID(param="custom_id")
            except BadRequest as error:
                self._refuse(error, raw.number)
                continue
            self._seen.add(name)
            model = line.body.get("model")
            if isinstance(model, str) and len(self.models) < MAX_MODELS:
                self.models.add(model)

    def _refuse(self, error: APIError, number: int | None) -> None:
        self.errors.append(refusal(error, number))


def refusal(error: APIError, number: int | None = None) -> dict[str, Any]:
    """An entry of a batch's `errors`."""
    return {"code": error.code, "line": number, "message": str(error), "param": error.param}


# ── results ──


GIVEN_UP = {"batch_expired": "This request could not be executed before the completion window expired.",
            "batch_cancelled": "This request was not executed: its batch was cancelled."}
GivenUp = Literal["batch_expired", "batch_cancelled"]


class Result(NamedTuple):
    """The result of a line, as it stands in the output file or in the error file."""

    text: bytes
    is_error: bool
    usage: Usage = Usage(0, 0)                          # of an answer


def answered(line: Line, digits: str, body: bytes) -> Result:
    """`digits` are those of the line's job; they name its result too."""
    return Result(_result(line, digits, _http(digits, 200, body), b"null"), is_error=False, usage=_usage(body))


def refused(line: Line, digits: str, error: APIError) -> Result:
    """The request was wrong, or its job has failed for good."""
    return Result(_result(line, digits, _http(digits, error.status, dump(error.body())), b"null"), is_error=True)


def given_up(line: Line, digits: str, code: GivenUp) -> Result:
    """No answer: the batch expired or was cancelled first."""
    return Result(_result(line, digits, b"null", dump({"code": code, "message": GIVEN_UP[code]})), is_error=True)


def _usage(body: bytes) -> Usage:
    """What an answer says of its tokens; responses name them otherwise."""
    said = json.loads(body)["usage"]
    prompt, answer = ("input", "output") if "input_tokens" in said else ("prompt", "completion")
    return Usage(said[f"{prompt}_tokens"], said[f"{answer}_tokens"], said[f"{prompt}_tokens_details"]["cached_tokens"],
                 said[f"{answer}_tokens_details"]["reasoning_tokens"])


def _http(digits: str, status: int, body: bytes) -> bytes:
    return b'{"status_code":%d,"request_id":"req_%b","body":%b}' % (status, digits[:24].encode(), body)


def _result(line: Line, digits: str, response: bytes, error: bytes) -> bytes:
    return b'{"id":"batch_req_%b","custom_id":%b,"response":%b,"error":%b}\n' % (
        digits.encode(), dump(line.custom_id), response, error)
