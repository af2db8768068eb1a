"""Chat templates, rendered as transformers renders them, in a sandbox, within bounds. It knows nothing of tokens.

The environment is equal to transformers' `apply_chat_template` (5.23): trim_blocks, loop controls, `tojson`,
`raise_exception`, `strftime_now`, generation blocks. A test compares the two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import TemplateRefused

MAX_RENDERED_CHARS = 16 << 20
MAX_RENDER_S = 2.0                                      # checked between the pieces that a template outputs


class ChatTemplate:
    """One compiled template. Raises ValueError when it does not compile."""

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error.message}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
               special_tokens: Mapping[str, str], **variables: Any) -> str:
        """The prompt's text. Raises TemplateRefused when the template rejects the messages or takes too long."""
        context = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
        pieces, num_chars, deadline = [], 0, time.monotonic() + MAX_RENDER_S
        try:
            for piece in self._template.generate(context | dict(special_tokens) | variables):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS or time.monotonic() > deadline:
                    raise TemplateRefused
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError,
                ArithmeticError, RecursionError):       # raised by expressions, on messages they were not written for
            raise TemplateRefused from None
        return "".join(pieces)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks an assistant's text, for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict(…)` and `dict.fromkeys(…)`, without the rest of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(…)`, from which no name gives access to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:    # a template may name an attribute `self`
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().replace(tzinfo=None).strftime(form)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
