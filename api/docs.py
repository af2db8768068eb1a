"""What /docs says beyond what FastAPI reads from the routes: the request's schema, keys, and the shape of errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.wire.batches import BatchRequest
from api.wire.completions import CompletionRequest
from api.wire.metadata import MetadataRequest
from api.wire.request import ChatRequest
from api.wire.tokens import DetokenizeRequest, TokenizeRequest
from api.wire.uploads import MIN_EXPIRES_S, PURPOSES

COMPONENTS = "#/components/schemas/"

ERROR_SCHEMA: dict[str, Any] = {"type": "object", "properties": {"error": {"type": "object", "properties": {
    "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
    "code": {"type": ["string", "null"]}}}}}
_ERROR: dict[str, Any] = {"content": {"application/json": {"schema": {"$ref": COMPONENTS + "Error"}}}}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"description": "The request is refused.", **_ERROR},
                                           "5XX": {"description": "The service failed, or is full.", **_ERROR}}



def request(name: str) -> dict[str, Any]:
    """The body that a route takes, by the name of its model."""
    schema = {"schema": {"$ref": COMPONENTS + name}}
    return {"requestBody": {"required": True, "content": {"application/json": schema}}}


def answers(name: str, whole: str, event: str) -> dict[str, Any]:
    """Of a route that takes such a request, and answers with one object or with events."""
    return request(name) | {"responses": {"200": {
        "description": f"A {whole}; with `stream`, {event}.",
        "content": {"application/json": {}, "text/event-stream": {}}}}}


CHAT = answers("ChatRequest", "chat.completion", "chat.completion.chunk events and [DONE]")
COMPLETIONS = answers("CompletionRequest", "text_completion", "text_completion events and [DONE]")
COMPLETION: dict[str, Any] = {
    "responses": {"200": {"description": "The chat.completion; with `stream`, the events behind `starting_after`.",
                          "content": {"application/json": {}, "text/event-stream": {}}}}}


UPLOAD: dict[str, Any] = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["file", "purpose"], "properties": {
        "file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_EXPIRES_S}}}}}}}


def complete(app: FastAPI) -> None:
    """Makes /openapi.json, once, when somebody asks."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            components = schema.setdefault("components", {})
            components["schemas"] = {"Error": ERROR_SCHEMA}
            for model in (BatchRequest, ChatRequest, CompletionRequest, MetadataRequest, TokenizeRequest,
                          DetokenizeRequest):
                one = model.model_json_schema(ref_template=COMPONENTS + "{model}")
                components["schemas"] |= one.pop("$defs", {}) | {model.__name__: one}
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}, {}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
