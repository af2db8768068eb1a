"""Sampling parameters and constraints, shared by all languages. It knows nothing of prompts.

Null is legal for every nullable field; fields on which the service does not act are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from api.wire.body import Fields
from api.wire.format import Constrained
from shared.errors import InvalidValue

REFUSED = ("allowed_token_ids", "bad_words", "include_stop_str_in_output", "prompt_logprobs", "return_token_ids")
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASES = 1024
MAX_STOP_TOKEN_IDS = 128

Count = Annotated[int, Field(lt=2**31)]                 # the model's own limits are checked in api/jobs.py
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Biases = Annotated[dict[str, float], WithJsonSchema({
    "type": "object", "maxProperties": MAX_BIASES, "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}})]


class StreamOptions(Fields):
    include_usage: bool | None = Field(None, description="true: a last chunk with the usage; else none")
    continuous_usage_stats: bool | None = Field(None, description="true: every chunk says the usage so far")


class Drawn(Fields):
    """How tokens are drawn."""

    temperature: float | None = Field(
        None, ge=0, le=2, description="0: the likeliest token, always; else the model's own, or 1")
    top_p: float | None = Field(
        None, ge=0, le=1, description="the likeliest tokens of this probability in all; else the model's own, or 1")
    top_k: Count | None = Field(
        None, ge=-1, description="so many of the likeliest tokens; 0 or -1: all; else the model's own, or all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="tokens at least so likely, by the likeliest; else the model's own, or 0")
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="taken from tokens that the answer holds; else 0")
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="taken from tokens for each time that the answer holds them; else 0")
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="divides tokens of the prompt and the answer; else the model's own, or 1")
    logit_bias: dict[str, float] | None = Field(
        None, max_length=MAX_BIASES, description="token id → -100 … 100, added to its logit")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**64, description="the same seed repeats the same answer; else any")
    stop: list[str] | None = Field(
        None, max_length=MAX_STOPS, description="texts that end it; left out")
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=MAX_STOP_TOKEN_IDS, description="tokens that end it, beside the model's own")
    min_tokens: Count | None = Field(
        None, ge=0, description="no end and no stop before so many tokens, no more than its limit; else 0")
    ignore_eos: bool | None = Field(None, description="true: the model's own end does not end it")
    speculative: bool | None = Field(None, description="false: draft no tokens; the answer is the same")
    user: str | None = Field(None, description="without effect")

    @field_validator("stop", mode="before", json_schema_input_type=(
        StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None))
    @classmethod
    def _stop_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _stop_lengths(cls, stop: list[str] | None) -> list[str] | None:
        if stop and not all(0 < len(text) <= MAX_STOP_CHARS for text in stop):
            raise ValueError(f"a stop string has 1 to {MAX_STOP_CHARS} characters")
        return stop

    @field_validator("logit_bias", mode="before", json_schema_input_type=Biases | None)
    @classmethod
    def _bias_entries(cls, biases: Any) -> Any:
        # Checked as a whole, so that no key from the client becomes part of an error's path.
        if isinstance(biases, dict) and not all(_is_bias(key, value) for key, value in biases.items()):
            raise ValueError("keys are token ids, values are numbers from -100 to 100")
        return biases


class Sampled(Constrained, Drawn):
    """Parameters of generation: the model, the length, and the form."""

    model: str = Field(min_length=1, description="a name of GET /v1/models")
    stream: bool | None = Field(None, description="answer with server-sent events")
    stream_options: StreamOptions | None = Field(None, description="with a stream alone")
    max_tokens: Count | None = Field(None, ge=1, description="most tokens of an answer; else what the context leaves")
    n: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="answers to one prompt, of which the model may allow fewer; else 1")

    allowed_token_ids: list[int] | None = Field(None, description="refused, unless empty")
    bad_words: list[str] | None = Field(None, description="refused, unless empty")
    include_stop_str_in_output: bool | None = Field(None, description="refused, if true")
    prompt_logprobs: int | None = Field(None, description="refused, but for 0")
    return_token_ids: bool | None = Field(None, description="refused, if true")

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampled:
        require_stream(self.stream, self.stream_options)
        return self

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported; None: no log probabilities."""
        return None


def require_stream(is_stream: bool | None, options: Any) -> None:
    """Raises InvalidValue."""
    if options is not None and not is_stream:
        raise InvalidValue("stream_options is only allowed when stream is true.", param="stream_options")


def _is_bias(key: Any, value: Any) -> bool:
    return (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10
            and isinstance(value, (int, float)) and not isinstance(value, bool) and -100 <= value <= 100)
