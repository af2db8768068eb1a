"""Every error that a client may see: a tree, in which each leaf defines how it looks on the wire.

Texts are fixed here: they never echo the input, a path, a trace, a Redis message or a key; they may contain numbers
that we computed. An error is raised where the fact is known and translated at one border (api/app.py).
"""

from __future__ import annotations

from typing import ClassVar

NOT_LISTED = "after is no id of this list."


class APIError(Exception):
    """The service failed. Retrying may help."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"
    text: ClassVar[str] = "The server had an error while processing your request."

    def __init__(self, text: str | None = None, *, param: str | None = None, retry_after_s: float | None = None):
        super().__init__(text or self.text)
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's shape, the only one that every client reads."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(APIError):
    """The request cannot be served as it is."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    text = "The request is not valid."


class NotJSON(BadRequest):
    code = "invalid_json"
    text = "We could not parse the JSON body of your request."


class InvalidValue(BadRequest):
    code = "invalid_value"
    text = "A field has a value that is not allowed."


class InvalidType(BadRequest):
    code = "invalid_type"
    text = "A field has a value of the wrong type."


class MissingField(BadRequest):
    code = "missing_required_parameter"
    text = "A required field is missing."


class UnsupportedContent(BadRequest):
    code = "unsupported_content"
    text = "This model takes text alone: image, audio and file parts are not supported."


class UnsupportedParameter(BadRequest):
    code = "unsupported_parameter"
    text = "This field asks for something that this server does not do."


class UnsupportedThread(UnsupportedParameter):
    """Anthropic's SDKs know this code: they send the whole conversation then, and no thread."""

    code = "thread_unsupported_request"
    text = "This server keeps no threads: send the whole conversation."


class PreviousResponseNotFound(BadRequest):
    """As ResponseNotFound, for the response that a request continues."""

    code = "previous_response_not_found"
    text = "The previous response does not exist, or is not kept any more."


class InvalidGrammar(BadRequest):
    """A schema, regular expression or grammar that is invalid, too large, or cannot be enforced in full."""

    code = "invalid_grammar"
    text = "What the answer must be cannot be enforced."


class TemplateRefused(BadRequest):
    code = "chat_template_refused"
    text = "The model's chat template does not accept this sequence of messages."


class ContextTooLong(BadRequest):
    """The prompt and the requested answer do not fit the model's context."""

    code = "context_length_exceeded"
    text = "The messages are longer than the model's context."

    def __init__(self, text: str | None = None, *, param: str | None = None, as_anthropic: str | None = None):
        super().__init__(text, param=param)
        self.as_anthropic = as_anthropic or str(self)   # clients look for its words, to shorten what they send


class StorageFull(BadRequest):
    """The files of a key exceed their limit, in bytes or in number, or its stored requests do."""

    code = "storage_limit_exceeded"
    text = "Your files take too much room with this one. Delete some, or wait until they expire."


class TooManyBatches(BadRequest):
    code = "too_many_batches"
    text = "You have too many batches. They are forgotten some time after their end."


class EmptyFile(BadRequest):
    code = "empty_file"
    text = "The input file has no lines."


class TooManyLines(BadRequest):
    code = "too_many_tasks"
    text = "The input file has too many lines."


class LineTooLong(BadRequest):
    code = "line_too_long"
    text = "A line of the input file is too long."


class InvalidLine(BadRequest):
    code = "invalid_json_line"
    text = "This line is not a JSON object."


class DuplicateCustomID(BadRequest):
    code = "duplicate_custom_id"
    text = "The custom_id of this line was used in a line before."


class MismatchedURL(BadRequest):
    code = "mismatched_endpoint"
    text = "The url of a line must be the endpoint of its batch."


class Unauthorized(APIError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    missing = "No API key provided. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
    text = "Incorrect API key provided. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."


class NotFound(APIError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"
    text = "There is nothing at this address."


class NoEmbeddings(NotFound):
    """The address is OpenAI's, but is not served here."""

    code = "embeddings_not_served"
    text = "No worker of this service serves embeddings: it completes chats."


class ModelNotFound(NotFound):
    code = "model_not_found"
    text = "The model does not exist. GET /v1/models lists those that do."


class CompletionNotFound(NotFound):
    """Never begun, owned by another key, or expired: the client does not learn which."""

    code = "completion_not_found"
    text = "There is no such completion, or it is not kept any more."


class ResponseNotFound(NotFound):
    """As CompletionNotFound, for responses."""

    code = "response_not_found"
    text = "There is no such response, or it is not kept any more."


class ItemNotFound(NotFound):
    """As ResponseNotFound, for an item of a response to which another request refers."""

    code = "item_not_found"
    text = "There is no such item, or its response was not stored or is not kept any more."


class NoSuchFile(NotFound):
    """Never uploaded, owned by another key, deleted or expired: the client does not learn which."""

    code = "file_not_found"
    text = "There is no such file, or it is not kept any more."


class BatchNotFound(NotFound):
    """As NoSuchFile."""

    code = "batch_not_found"
    text = "There is no such batch, or it is not kept any more."


class MethodNotAllowed(APIError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"
    text = "This address does not take this method."


class TooSlow(APIError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    text = "The request did not arrive in time."


class Conflict(APIError):
    """The request conflicts with the present state, for now or for good."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"
    text = "The request does not fit the state of the completion."


class CompletionInProgress(Conflict):
    code = "completion_in_progress"
    text = "The completion is not finished. Read it with stream=true, or retry later."


class PositionNotReached(Conflict):
    code = "position_not_reached"
    text = "The completion has not come to this position. Please retry."


class IdempotencyKeyReused(Conflict):
    code = "idempotency_key_reused"
    text = "This Idempotency-Key was used with another body, or at another address."


class BatchOver(Conflict):
    code = "batch_over"
    text = "The batch has come to its end: there is nothing left to cancel."


class UnsupportedEncoding(APIError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_encoding"
    text = "The body of the request must not be compressed."


class BodyTooLarge(APIError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"
    text = "The body of the request is too large."


class FileTooLarge(BodyTooLarge):
    code = "file_too_large"
    text = "The file is too large."


class HeadTooLarge(APIError):
    status = 431
    type = "invalid_request_error"
    code = "request_headers_too_large"
    text = "The headers of the request are too large."


class Overloaded(APIError):
    """The queue is full, but it drains: retry after `retry_after_s`."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    text = "Too many requests are waiting. Please retry later."


class TenantOverloaded(Overloaded):
    text = "You have too many requests at once. Please retry when some have ended."


class Unavailable(APIError):
    """Cannot be served now, but probably soon."""

    status = 503
    type = "service_unavailable_error"
    code = "service_unavailable"
    text = "The service is not ready. Please retry."


class Draining(Unavailable):
    """In a stream it has no position: the client resumes on another pod, after its last event."""

    code = "draining"
    text = "This server is about to stop. Please retry: another one will answer."


class NoWorker(Unavailable):
    code = "no_worker"
    text = "No worker serves this model at the moment. Please retry."


class JobEnded(APIError):
    """An accepted job ended without an answer. Its code is in the terminal entry of the log."""

    status = 500


class JobFailed(JobEnded):
    code = "job_failed"
    text = "The request failed on several workers and was given up."


class FormTooComplex(JobEnded):
    """Limits of work and memory are the same on every worker: no other one would get further."""

    status = 400
    type = "invalid_request_error"
    code = "form_too_complex"
    text = "The form that the answer must keep takes too much work to go on with: ask for a smaller one."


class DeadlineExceeded(JobEnded):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    text = "The answer was not complete within the time that a request may take."


class Cancelled(JobEnded):
    status = 499
    type = "invalid_request_error"
    code = "cancelled"
    text = "The request was cancelled."


class StreamLost(JobEnded):
    code = "stream_lost"
    text = "The log of this answer is gone. Please send the request again."


JOB_ERRORS: dict[str, type[JobEnded]] = {
    error.code: error for error in (JobFailed, FormTooComplex, DeadlineExceeded, Cancelled, StreamLost) if error.code
}


def job_error(code: str) -> JobEnded:
    """The client's error for the error code of a terminal."""
    return JOB_ERRORS.get(code, JobFailed)()


class BrokenEnvironment(Exception):
    """The process cannot start here. Its text is one line that says what to do; no trace is shown."""
