"""Constraints on an answer, as clients write them: OpenAI's `response_format`, the extensions of vLLM and SGLang.

It knows their names. What can be enforced is decided in shared/grammar.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from api.wire.body import Fields, refuse_wishes
from shared import grammar
from shared.errors import InvalidGrammar, InvalidValue

Choices = Annotated[list[str], Field(min_length=1, max_length=grammar.MAX_CHOICES)]
Text = Annotated[str, Field(min_length=1, max_length=grammar.MAX_GRAMMAR_CHARS)]


class JSONSchema(Fields):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="without effect")
    description: str | None = Field(None, description="without effect")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="a JSON schema; else any object")
    strict: bool | None = Field(None, description="it is enforced either way")


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"] = Field(description="text: anything")
    json_schema: JSONSchema | None = Field(None, description="with type json_schema")
    pattern: Text | None = Field(None, description="with type regex")
    grammar: Text | None = Field(None, description="with type grammar")


class StructuredOutputs(Fields):
    """vLLM's name for all of them; exactly one is given."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON schema")
    json_object: bool | None = Field(None, description="true: a JSON object")
    regex: Text | None = Field(None, description="a regular expression that the whole answer matches")
    choice: Choices | None = Field(None, description="texts, of which it is one")
    grammar: Text | None = Field(None, description="Lark's language or GBNF")
    structural_tag: str | None = Field(None, description="refused")

    @model_validator(mode="after")
    def _one_of_them(self) -> StructuredOutputs:
        refuse_wishes(self, ["structural_tag"])
        if sum(value not in (None, False) for _, value in self) > 1:
            raise ValueError("at most one of its fields is given")
        return self


class Constrained(Fields):
    """The fields of a request that constrain its answer; at most one may be given."""

    response_format: ResponseFormat | None = Field(
        None, description="the form of the answer, which at most one field says; else text")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's name for all forms")
    regex: Text | None = Field(None, description="the answer matches this regular expression")
    choice: Choices | None = Field(None, description="the answer is one of these")
    grammar: Text | None = Field(None, description="the answer is of this grammar: Lark's language or GBNF")
    ebnf: Text | None = Field(None, description="as grammar, by SGLang's name")
    json_schema: dict[str, Any] | str | None = Field(None, description="as guided_json, by SGLang's name")
    guided_json: dict[str, Any] | str | None = Field(None, description="the answer is JSON of this schema")
    guided_regex: Text | None = Field(None, description="as regex")
    guided_choice: Choices | None = Field(None, description="as choice")
    guided_grammar: Text | None = Field(None, description="as grammar")

    @property
    def is_constrained(self) -> bool:
        return any(wish for _, wish in self._wishes())

    def compile_grammar(self, make: Callable[[str, Any], str]) -> str:
        """The grammar that travels with a job; empty: no constraint. Raises BadRequest."""
        found = [(param, wish) for param, wish in self._wishes() if wish]
        if len(found) > 1:
            raise InvalidValue(f"{found[0][0]} and {found[1][0]} cannot both be given.", param=found[1][0])
        for param, (kind, value) in found:
            try:
                return make(kind, value)
            except InvalidGrammar as error:
                raise InvalidGrammar(str(error), param=param) from None
        return ""

    def _wishes(self) -> list[tuple[str, tuple[str, Any] | None]]:
        wishes: list[tuple[str, tuple[str, Any] | None]] = [("response_format", _of_format(self.response_format))]
        if outputs := self.structured_outputs:
            wishes += [("structured_outputs", _given(kind, value)) for kind, value in (
                ("schema", outputs.json_), ("schema", grammar.ANY_OBJECT if outputs.json_object else None),
                ("regex", outputs.regex), ("choice", outputs.choice), ("grammar", outputs.grammar))]
        return wishes + [(param, _given(kind, getattr(self, param))) for param, kind in (
            ("regex", "regex"), ("choice", "choice"), ("grammar", "grammar"), ("ebnf", "grammar"),
            ("json_schema", "schema"), ("guided_json", "schema"),
            ("guided_regex", "regex"), ("guided_choice", "choice"), ("guided_grammar", "grammar"))]


def _given(kind: str, value: Any) -> tuple[str, Any] | None:
    return None if value is None else (kind, value)


def _of_format(wanted: ResponseFormat | None) -> tuple[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return "schema", grammar.ANY_OBJECT
    kind, value = {"json_schema": ("schema", wanted.json_schema and (
                       grammar.ANY_OBJECT if wanted.json_schema.schema_ is None else wanted.json_schema.schema_)),
                   "regex": ("regex", wanted.pattern), "grammar": ("grammar", wanted.grammar)}[wanted.type]
    if value is None:
        name = "pattern" if kind == "regex" else wanted.type
        raise InvalidValue(f"response_format.{name} is required with type {wanted.type}.", param="response_format")
    return kind, value
