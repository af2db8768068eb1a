"""An error as an HTTP response: in the shape of the address' API, with the time after which to retry, and a request
id."""

from __future__ import annotations

import secrets
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from api.wire.message_fold import error_body
from shared.errors import APIError

REQUEST_ID = "x-request-id"
MESSAGES = "/v1/messages"                               # addresses under it speak Anthropic's API, all others OpenAI's


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


def request_id_headers(scope: Scope, request_id: str) -> dict[str, str]:
    """The request id in every header that clients know."""
    return {REQUEST_ID: request_id} | ({"request-id": request_id} if _is_messages(scope) else {})


def answer(error: APIError, scope: Scope) -> JSONResponse:
    """The response to a request of this scope, to which app.py has given an id."""
    return _answer(error, error_body(error, scope["request_id"]) if _is_messages(scope) else error.body())


def _is_messages(scope: Scope) -> bool:
    path: str = scope["path"]
    return path == MESSAGES or path.startswith(MESSAGES + "/")


def _answer(error: APIError, body: dict[str, Any]) -> JSONResponse:
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    if error.retry_after_s is not None:
        headers |= {"retry-after": str(max(1, round(error.retry_after_s))),
                    "retry-after-ms": str(round(error.retry_after_s * 1000))}
    return JSONResponse(body, error.status, headers)


def last_answer(error: APIError) -> bytes:
    """A complete response as bytes, for a connection that ends with it: the API that it speaks is unknown."""
    response = _answer(error, error.body())
    response.headers.update({REQUEST_ID: new_request_id(), "connection": "close"})
    head = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 %d \r\n%b\r\n%b" % (error.status, head, bytes(response.body))
