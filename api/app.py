"""The ASGI application: routes, and the one border where an error becomes an answer."""

from __future__ import annotations

import logging
import secrets

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import Door
from api.pod import Pod
from api.routes import chat, health, models
from shared.errors import APIError, BadRequest, MethodNotAllowed, NotFound, Unavailable

log = logging.getLogger(__name__)


def make_app(pod: Pod) -> FastAPI:
    """The application of a pod, whose chores somebody else runs."""
    settings = pod.settings
    door = Door(settings.api_key)
    app = FastAPI(title="Baton", description="Chat completions whose streams cannot be lost.")
    app.include_router(chat.router(pod, door))
    app.include_router(models.router(pod), dependencies=[Depends(door)])
    app.include_router(health.router(pod))
    app.add_exception_handler(APIError, _answer)
    app.add_exception_handler(RedisError, _redis_away)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(_Outermost, pod=pod)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
                           allow_headers=["*"], expose_headers=["x-request-id"])
    return app


async def _answer(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, APIError)
    headers = {}
    if error.retry_after_s is not None:
        headers = {"retry-after": str(max(1, round(error.retry_after_s))),
                   "retry-after-ms": str(round(error.retry_after_s * 1000))}
    return JSONResponse(error.body(), error.status, headers)


async def _redis_away(request: Request, error: Exception) -> JSONResponse:
    log.warning("Redis failed a request: %s", type(error).__name__)
    return await _answer(request, Unavailable(retry_after_s=1.0))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework raises: an unknown address, a method that it does not take."""
    assert isinstance(error, HTTPException)
    known: dict[int, type[APIError]] = {404: NotFound, 405: MethodNotAllowed}
    response = await _answer(request, known.get(error.status_code, BadRequest)())
    response.headers.update(error.headers or {})
    return response


class _Outermost:
    """`x-request-id` on every answer, errors included; a bug becomes a 500. Streams pass untouched."""

    def __init__(self, app: ASGIApp, pod: Pod) -> None:
        self.app = app
        self.pod = pod

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self.pod.metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise
            await (await _answer(Request(scope), APIError()))(scope, receive, send_named)
