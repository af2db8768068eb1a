"""A request's body: one JSON object, checked against a pydantic model.

Refusals contain only names of ours and numbers, never input. It knows JSON, nothing of the request's meaning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from shared.errors import BadRequest, InvalidType, InvalidValue, MissingField, NotJSON, UnsupportedParameter


class Fields(BaseModel):
    """The base of every part of a request: strict JSON types, unknown fields without effect."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def names_of(*models: Any) -> frozenset[str]:
    """The names of their fields, as clients write them."""
    return frozenset(name for model in models for name in _names(model))


def shown_as(kind: Any) -> BeforeValidator:
    """What /docs shows for a field that is validated elsewhere."""
    return BeforeValidator(lambda value: value, json_schema_input_type=kind)


def refuse_wishes(request: BaseModel, params: Iterable[str], *, but: Collection[Any] = ()) -> None:
    """Refuses fields that would change the answer and are not supported. Raises UnsupportedParameter."""
    for param in params:
        if getattr(request, param) not in (None, False, "", [], *but):
            raise UnsupportedParameter(f"This server does not do what {param} asks for.", param=param)


def _names(model: Any) -> Iterable[str]:
    if not issubclass(model, BaseModel):                # a TypedDict
        return list(model.__annotations__)
    return [field.alias or name for name, field in model.model_fields.items()]


def validate(model: type[Model], raw: dict[str, Any], names: Collection[str]) -> Model:
    """Raises BadRequest, with what is wrong, in paths of these names."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _refusal(error, names) from None


def read_object(body: bytes) -> dict[str, Any]:
    """Raises NotJSON."""
    try:
        text = body.decode()                            # json.loads accepts other encodings, and invalid bytes
        raw = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:            # half a surrogate pair is valid JSON, but not valid text
            json.dumps(raw, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise NotJSON from None
    if not isinstance(raw, dict):
        raise NotJSON("The body of the request must be a JSON object.")
    return raw


def _refuse_constant(name: str) -> None:
    raise ValueError(name)                              # NaN and Infinity are not JSON


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(digits)                        # too large a number: it could not be written again
    return value


def _refusal(error: ValidationError, names: Collection[str]) -> BadRequest:
    """The first error."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
                   if isinstance(part, int) or part in names).lstrip(".")
    kind = first["type"]
    leaf = MissingField if kind == "missing" else InvalidType if kind.endswith("_type") else InvalidValue
    is_of_a_model = kind in ("model_type", "model_attributes_type", "dict_type")
    text = "Input should be an object" if is_of_a_model else first["msg"].removeprefix("Value error, ")
    return leaf(f"{path}: {text}" if path else text, param=path or None)
