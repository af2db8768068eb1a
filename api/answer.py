"""An error as an HTTP answer: OpenAI's shape, the time at which to come back, and an id to ask about."""

from __future__ import annotations

import secrets

from starlette.responses import JSONResponse

from shared.errors import APIError

REQUEST_ID = "x-request-id"


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


def answer(error: APIError) -> JSONResponse:
    headers = {}
    if error.retry_after_s is not None:
        headers = {"retry-after": str(max(1, round(error.retry_after_s))),
                   "retry-after-ms": str(round(error.retry_after_s * 1000))}
    return JSONResponse(error.body(), error.status, headers)


def last_answer(error: APIError) -> bytes:
    """The whole answer as it stands on the wire, for a connection that ends with it."""
    response = answer(error)
    response.headers.update({REQUEST_ID: new_request_id(), "connection": "close"})
    head = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 %d \r\n%b\r\n%b" % (error.status, head, bytes(response.body))
