"""Metadata: short strings that a client stores with a request, and finds it by."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from api.wire.body import Fields, read_object, validate

MAX_PAIRS = 16
MAX_NAME_CHARS = 64
MAX_VALUE_CHARS = 512


def _bounded(metadata: dict[str, str]) -> dict[str, str]:
    if len(metadata) > MAX_PAIRS or any(len(name) > MAX_NAME_CHARS or len(value) > MAX_VALUE_CHARS
                                        for name, value in metadata.items()):
        raise ValueError(f"at most {MAX_PAIRS} pairs, of {MAX_NAME_CHARS} and {MAX_VALUE_CHARS} characters at most")
    return metadata


Metadata = Annotated[dict[str, str], AfterValidator(_bounded), WithJsonSchema({
    "type": "object", "maxProperties": MAX_PAIRS, "propertyNames": {"maxLength": MAX_NAME_CHARS},
    "additionalProperties": {"type": "string", "maxLength": MAX_VALUE_CHARS}})]


class MetadataRequest(Fields):
    """`POST /v1/chat/completions/{id}`: replaces the metadata."""

    metadata: Metadata | None = Field(description="instead of what was kept; null: nothing")


def parse_metadata(body: bytes) -> dict[str, str]:
    """Raises BadRequest."""
    return validate(MetadataRequest, read_object(body), MetadataRequest.model_fields).metadata or {}
