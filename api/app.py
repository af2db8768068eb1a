"""The ASGI application: routes, and the one border where an error becomes an answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from fastapi import Depends, FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from redis.exceptions import RedisClusterException, RedisError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import docs
from api.auth import Door
from api.error_response import REQUEST_ID, answer, new_request_id, request_id_headers
from api.pod import Pod
from api.routes import batches, chat, completions, files, health, messages, models, responses, stored, tokens
from api.sse import COMPLETION_ID
from shared.errors import APIError, BadRequest, MethodNotAllowed, NotFound, Unavailable

log = logging.getLogger(__name__)

METHODS = ("DELETE", "GET", "HEAD", "POST")
LEFT = 499                                              # the status that proxies count for a client that has left

EXPOSED_HEADERS = [REQUEST_ID, "request-id", "retry-after", "retry-after-ms", COMPLETION_ID]


def make_app(pod: Pod) -> FastAPI:
    """The application of a pod; the pod's chores run elsewhere."""
    settings = pod.settings
    door = Door(settings.api_key)
    app = FastAPIOffline(title="Baton", description="Chat completions whose streams cannot be lost.",
                         redoc_url=None,                # its script takes a picture from another host
                         static_url="/docs/static", redirect_slashes=False, responses=docs.ERRORS)
    app.include_router(chat.router(pod, door))
    app.include_router(stored.router(pod, door))
    app.include_router(completions.router(pod, door))
    app.include_router(responses.router(pod, door))
    app.include_router(messages.router(pod, door))
    app.include_router(files.router(pod, door))
    app.include_router(batches.router(pod, door))
    app.include_router(models.router(pod), dependencies=[Depends(door)])
    app.include_router(tokens.router(pod), dependencies=[Depends(door)])
    app.include_router(health.router(pod))
    docs.complete(app)
    app.add_exception_handler(APIError, _answer)
    app.add_exception_handler(RedisError, _redis_away)
    app.add_exception_handler(RedisClusterException, _redis_away)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _left)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origins),
                           allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"], expose_headers=EXPOSED_HEADERS)
    app.add_middleware(_Outermost, pod=pod)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return answer(error, request.scope)


async def _redis_away(request: Request, error: Exception) -> Response:
    log.warning("Redis failed a request: %s", type(error).__name__)
    return answer(Unavailable(retry_after_s=1.0), request.scope)


async def _left(_: Request, __: Exception) -> Response:
    # Nobody receives it, but it is counted.
    return Response(status_code=LEFT)


async def _http_error(request: Request, error: Exception) -> Response:
    """Errors raised by the framework: an unknown address, a method that is not allowed."""
    assert isinstance(error, HTTPException)
    known: dict[int, type[APIError]] = {404: NotFound, 405: MethodNotAllowed}
    response = answer(known.get(error.status_code, BadRequest)(), request.scope)
    response.headers.update(error.headers or {})
    if error.status_code == MethodNotAllowed.status:    # the framework names those of the first matching route only
        response.headers["allow"] = ", ".join(_methods(request))
    return response


def _methods(request: Request) -> Iterator[str]:
    """The methods that the address allows."""
    for method in METHODS:
        scope = dict(request.scope) | {"method": method}
        if any(route.matches(scope)[0] == Match.FULL for route in request.app.routes):
            yield method


class _Outermost:
    """`x-request-id` on every answer, errors included; a bug becomes a 500. Streams pass untouched."""

    def __init__(self, app: ASGIApp, pod: Pod) -> None:
        self.app = app
        self.pod = pod

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope["request_id"] = new_request_id()
        scope["began_s"] = time.monotonic()
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(request_id_headers(scope, request_id))
                if self.pod.draining:
                    headers["connection"] = "close"     # the client's next request goes to another pod
                self.pod.metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise
            await answer(APIError(), scope)(scope, receive, send_named)
