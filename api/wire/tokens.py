"""Tokens of a text or of a chat, and the text of tokens: `/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from api.wire.body import Fields, names_of, read_object, validate
from api.wire.request import NAMES, Message, require_few_messages
from api.wire.sampled import TokenId
from shared.errors import InvalidValue

MAX_TOKENS = 1 << 20


class TokenizeRequest(Fields):
    """`POST /tokenize`: of a text, or of messages as the model's template renders them."""

    model: str = Field(min_length=1, description="a name of GET /v1/models")
    prompt: str | None = Field(None, description="a text; special tokens in it are text")
    messages: list[Message] | None = Field(None, min_length=1, description="a chat, instead of a prompt")
    tools: list[dict[str, Any]] | None = Field(None, description="functions that the chat's template is shown")
    add_special_tokens: bool = Field(True, description="those that the tokenizer puts around a text")
    return_token_strs: bool | None = Field(None, description="true: each token as the vocabulary writes it, too")

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidValue("Either prompt or messages is given.", param="prompt")
        return self


class DetokenizeRequest(Fields):
    """`POST /detokenize`."""

    model: str = Field(min_length=1, description="a name of GET /v1/models")
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS, description="token ids")


def parse_tokenize(body: bytes, max_messages: int) -> TokenizeRequest:
    """Raises BadRequest."""
    raw = read_object(body)
    require_few_messages(raw, max_messages)
    return validate(TokenizeRequest, raw, NAMES | names_of(TokenizeRequest))


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises BadRequest."""
    return validate(DetokenizeRequest, read_object(body), names_of(DetokenizeRequest))
