"""What /docs adds to FastAPI's description of the routes: requests, answers, keys, and the shape of errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from api.wire.batches import BatchRequest
from api.wire.completions import CompletionRequest
from api.wire.message_objects import MESSAGE_OBJECTS
from api.wire.messages import CountRequest, MessageRequest
from api.wire.metadata import MetadataRequest
from api.wire.objects import OBJECTS
from api.wire.request import ChatRequest
from api.wire.response_objects import RESPONSE_OBJECTS
from api.wire.responses import ResponseRequest
from api.wire.tokens import DetokenizeRequest, TokenizeRequest
from api.wire.uploads import MIN_EXPIRES_S, PURPOSES

COMPONENTS = "#/components/schemas/"
REQUESTS: tuple[Any, ...] = (ChatRequest, CompletionRequest, ResponseRequest, MessageRequest, CountRequest,
                             BatchRequest, MetadataRequest, TokenizeRequest, DetokenizeRequest)

ANSWERS = (*OBJECTS, *RESPONSE_OBJECTS, *MESSAGE_OBJECTS)

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"], "description": "what went wrong",
        "properties": {"message": {"type": "string", "description": "for people"},
                       "type": {"type": "string", "description": "of a few kinds"},
                       "param": {"type": ["string", "null"], "description": "the field that it is about"},
                       "code": {"type": ["string", "null"], "description": "for programs"}}}}}
MESSAGE_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["type", "error"], "properties": {
        "type": {"const": "error", "description": "error, always"},
        "request_id": {"type": "string", "description": "of the request; the header request-id says it too"},
        "error": {"type": "object", "description": "what went wrong", "properties": {
            "type": {"type": "string", "description": "of a few kinds"},
            "message": {"type": "string", "description": "for people"}}}}}
_ERROR: dict[str, Any] = {"content": {"application/json": {"schema": {"$ref": COMPONENTS + "Error"}}}}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"description": "The request is refused.", **_ERROR},
                                           "5XX": {"description": "The service failed, or is full.", **_ERROR}}


def says(*, takes: str = "", gives: str, events: str = "") -> dict[str, Any]:
    """For a route: the model of its body, the object that it returns, and its events when `stream` is true."""
    content = {"application/json": _of(gives)}
    if events:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    text = f"The whole; with `stream`, {events}." if events else "As it is."
    body = {"requestBody": {"required": True, "content": {"application/json": _of(takes)}}} if takes else {}
    return body | {"responses": {"200": {"description": text, "content": content}}}


def _of(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": COMPONENTS + name}}


def in_messages(route: dict[str, Any]) -> dict[str, Any]:
    """For a route whose errors have Anthropic's shape."""
    error = {"content": {"application/json": _of("MessageError")}}
    return route | {"responses": route["responses"] | {"4XX": error, "5XX": error}}


CHUNKS = "chunks of it and [DONE]"
BEHIND = "the events behind `starting_after`"


UPLOAD: dict[str, Any] = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["file", "purpose"], "properties": {
        "file": {"type": "string", "format": "binary", "description": "its bytes"},
        "purpose": {"type": "string", "enum": list(PURPOSES), "description": "what for"},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"], "description": "with the seconds"},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_EXPIRES_S,
                                   "description": "how long it is kept; else `file_s`"}}}}}}}


def complete(app: FastAPI) -> None:
    """Makes /openapi.json, once, at the first request for it."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            schema.setdefault("components", {})["schemas"] = {
                "Error": ERROR_SCHEMA, "MessageError": MESSAGE_ERROR_SCHEMA, **_schemas()}
            schema["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}
            schema["security"] = [{"key": []}, {"x-api-key": []}, {}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for kind in (*REQUESTS, *ANSWERS):
        mode: Any = "validation" if kind in REQUESTS else "serialization"
        one = TypeAdapter(kind).json_schema(ref_template=COMPONENTS + "{model}", mode=mode)
        parts = one.pop("$defs", {}) | {kind.__name__: one}
        assert all(schemas.get(name, part) == part for name, part in parts.items()), "two schemas have one name"
        schemas |= parts
    return schemas
