"""Batches in OpenAI's language: the request, the states of a batch, and its object.

Pure: the next step is decided here, from the state of a batch and the time; the caller, who knows Redis, does it. The
lines of the files are api/wire/lines.py's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pydantic import Field

from api.wire.body import Fields, names_of, read_object, validate
from api.wire.lines import ENDPOINTS
from api.wire.metadata import Metadata
from api.wire.uploads import require_lifetime
from shared.errors import InvalidValue
from shared.job import Usage

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]
Step = Literal["validate", "run", "finalize", "complete", "expire", "cancel"]

OVER: frozenset[Status] = frozenset({"completed", "failed", "expired", "cancelled"})
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
USED = tuple(field.name for field in fields(Usage))
COUNTS = ("num_lines", "num_requests", "num_completed", "num_failed", "output_bytes", "error_bytes", "output_s")
NOTHING_USED = Usage(0, 0)


class FileExpiry(Fields):
    anchor: Literal["created_at"] = Field(description="of the file")
    seconds: int = Field(description="how long it is kept")


class BatchRequest(Fields):
    """`POST /v1/batches`."""

    input_file_id: str = Field(min_length=1, max_length=256, description="of a file whose purpose is batch")
    endpoint: str = Field(description="what every line asks: " + " or ".join(ENDPOINTS))
    completion_window: Literal["24h"] = Field(description="as long as it may take: `batch_s`")
    metadata: Metadata | None = Field(None, description="kept beside it")
    output_expires_after: FileExpiry | None = Field(None, description="of its output files; else `file_s`")


def parse_batch(body: bytes, max_file_s: float) -> BatchRequest:
    """`max_file_s` is how long a file is kept at most. Raises BadRequest."""
    asked = validate(BatchRequest, read_object(body), names_of(BatchRequest, FileExpiry))
    if asked.endpoint not in ENDPOINTS:
        raise InvalidValue(f"endpoint is one of {', '.join(ENDPOINTS)}.", param="endpoint")
    if asked.output_expires_after:
        require_lifetime(asked.output_expires_after.seconds, max_file_s, "output_expires_after")
    return asked


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch, as far as it has come."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    created_ms: int
    expires_s: int
    metadata: dict[str, str] | None = None
    output_s: int = 0                                   # how long its output files are kept; 0: as all files
    status: Status = "validating"
    num_lines: int = 0                                  # of the input file, blank ones included
    num_requests: int = 0                               # in them
    num_completed: int = 0                              # have a line in the output file
    num_failed: int = 0                                 # have a line in the error file
    output_bytes: int = 0
    error_bytes: int = 0
    usage: Usage = NOTHING_USED                         # of all lines that were answered
    models: tuple[str, ...] = ()                        # of its lines, as far as served when it began
    errors: tuple[dict[str, Any], ...] = ()             # why it failed
    at: dict[str, int] = field(default_factory=dict)    # status → the second at which it was reached

    def __repr__(self) -> str:
        return f"<Batch {self.id} {self.status}, {self.num_done} of {self.num_requests}>"

    @property
    def num_done(self) -> int:
        return self.num_completed + self.num_failed

    @property
    def is_over(self) -> bool:
        return self.status in OVER

    @property
    def has_begun(self) -> bool:
        """Whether its lines were found valid."""
        return "in_progress" in self.at

    @property
    def output_file_id(self) -> str:
        return f"file-{digits_of(self.id, 'output')}"

    @property
    def error_file_id(self) -> str:
        return f"file-{digits_of(self.id, 'errors')}"

    def encode(self) -> dict[str, str]:
        """As a Redis hash; missing counts are 0."""
        what = {"id": self.id, "tenant": self.tenant, "endpoint": self.endpoint, "input_file_id": self.input_file_id,
                "created_ms": self.created_ms, "expires_s": self.expires_s, "metadata": self.metadata}
        return {"what": json.dumps(what), "status": self.status, "output_s": str(self.output_s)}

    @classmethod
    def decode(cls, fields: Mapping[bytes, bytes]) -> Batch:
        text = {name.decode(): value.decode() for name, value in fields.items()}
        known: dict[str, Any] = {name: int(text.get(name, 0)) for name in COUNTS} | {"status": text["status"]}
        usage = Usage(**{name: int(text.get(name, 0)) for name in USED})
        return cls(**json.loads(text["what"]), **known, usage=usage, models=tuple(json.loads(text.get("models", "[]"))),
                   errors=tuple(json.loads(text.get("errors", "[]"))),
                   at={name: int(text[f"{name}_at"]) for name in TIMES if f"{name}_at" in text})

    def body(self) -> dict[str, Any]:
        """The object that clients see."""
        has_files = self.is_over and self.has_begun
        return {"id": self.id, "object": "batch", "endpoint": self.endpoint,
                "errors": {"object": "list", "data": list(self.errors)} if self.errors else None,
                "input_file_id": self.input_file_id, "completion_window": "24h", "status": self.status,
                "output_file_id": self.output_file_id if has_files and self.num_completed else None,
                "error_file_id": self.error_file_id if has_files and self.num_failed else None,
                "created_at": self.created_ms // 1000, "expires_at": self.expires_s,
                **{f"{name}_at": self.at.get(name) for name in TIMES},
                "request_counts": {"total": self.num_requests, "completed": self.num_completed,
                                   "failed": self.num_failed},
                "usage": {"input_tokens": self.usage.num_prompt_tokens,
                          "input_tokens_details": {"cached_tokens": self.usage.num_cached_tokens},
                          "output_tokens": self.usage.num_completion_tokens,
                          "output_tokens_details": {"reasoning_tokens": self.usage.num_reasoning_tokens},
                          "total_tokens": self.usage.num_prompt_tokens + self.usage.num_completion_tokens},
                "metadata": self.metadata}


def next_step(batch: Batch, now_s: float) -> Step | None:
    """The next step of a batch; None when it is over. A step may be interrupted and repeated."""
    if batch.is_over:
        return None
    if batch.status == "cancelling":
        return "cancel"
    if batch.status == "finalizing":
        return "complete"
    if now_s >= batch.expires_s:
        return "expire"
    if batch.status == "validating":
        return "validate"
    return "run" if batch.num_done < batch.num_requests else "finalize"


def can_be_cancelled(batch: Batch) -> bool:
    """Not once its files are being made: then all its lines are done."""
    return batch.status in ("validating", "in_progress")


def digits_of(batch_id: str, what: str | int) -> str:
    """32 hex digits, the same on every pod."""
    return hashlib.sha256(f"{batch_id} {what}".encode()).hexdigest()[:32]
