"""Tokens of a text or of a chat, and the text of tokens: `/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from api.wire.body import Fields, names_of, read_object, validate
from api.wire.request import (
    MAX_TOOLS,
    NAMES,
    Effort,
    Message,
    TemplateVariables,
    require_few_messages,
    template_variables,
)
from api.wire.sampled import TokenId
from api.wire.tools import ChatTool
from shared.errors import InvalidValue

MAX_TOKENS = 1 << 20


class TokenizeRequest(Fields):
    """`POST /tokenize`: a text, or messages as the model's template renders them."""

    model: str | None = Field(None, min_length=1, description="a name of GET /v1/models; else the only one")
    prompt: str | None = Field(None, description="a text; special tokens in it are text")
    messages: list[Message] | None = Field(None, min_length=1, description="a chat, instead of a prompt")
    tools: list[ChatTool] | None = Field(
        None, max_length=MAX_TOOLS, description="functions that the chat's template is shown")
    add_generation_prompt: bool | None = Field(
        None, description="false: without the words that begin an answer to the chat; else true")
    reasoning_effort: Effort | None = Field(None, description="as in a chat")
    chat_template_kwargs: TemplateVariables | None = Field(None, description="as in a chat")
    add_special_tokens: bool | None = Field(None, description="those that the tokenizer puts around a text; else true")
    return_token_strs: bool | None = Field(None, description="true: each token as the vocabulary writes it, too")

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidValue("Either prompt or messages is given.", param="prompt")
        return self

    @property
    def template_variables(self) -> dict[str, Any]:
        variables = template_variables(self.reasoning_effort, self.chat_template_kwargs)
        return variables | ({} if self.add_generation_prompt is not False else {"add_generation_prompt": False})


class DetokenizeRequest(Fields):
    """`POST /detokenize`."""

    model: str | None = Field(None, min_length=1, description="a name of GET /v1/models; else the only one")
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS, description="token ids")


def parse_tokenize(body: bytes, max_messages: int) -> TokenizeRequest:
    """Raises BadRequest."""
    raw = read_object(body)
    require_few_messages(raw, max_messages)
    return validate(TokenizeRequest, raw, NAMES | names_of(TokenizeRequest))


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises BadRequest."""
    return validate(DetokenizeRequest, read_object(body), names_of(DetokenizeRequest))
