"""/openapi.json is true: every field says what it means, and whatever is asked is answered as the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from api.app import make_app
from api.pod import Pod
from api.wire.batches import OVER
from shared.settings import Settings
from tests.nursery import Nursery
from tests.system import MODEL, System, eventually

NUM_EXAMPLES = 12                                       # of each address, valid and invalid ones
MAX_TOKENS = 4
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
CHECKED = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
           "response_schema_conformance", "negative_data_rejection", "unsupported_method")


@pytest.fixture(scope="module")
def served(redis_url: str, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    system = System(tmp_path_factory.mktemp("docs"), redis_url, allow_no_aof=True, disconnect_grace_s=0,
                    served_model_name=f"{MODEL}-docs", start=nursery.start)
    system.start_all(1)
    yield system
    system.stop()


@pytest.fixture(scope="module")
def stored(served: System) -> dict[str, str]:
    """Of what the addresses name in their paths, something that exists."""
    ask = {"model": served.model, "store": True, "max_tokens": MAX_TOKENS}
    messages = [{"role": "user", "content": "Hi"}]
    chat = httpx.post(f"{served.url}/v1/chat/completions", json=ask | {"messages": messages}, timeout=60).json()
    response = httpx.post(f"{served.url}/v1/responses", json={"model": served.model, "input": "Hi"}, timeout=60).json()
    return {"completion_id": chat["id"], "response_id": response["id"], "model": served.model}


PAGE = schemathesis.openapi.from_dict(make_app(Pod(Settings())).openapi())
OPERATIONS: list[Any] = [found.ok() for found in PAGE.get_all_operations() if isinstance(found, Ok)]
load_all_checks()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_whatever_is_asked_is_answered_as_the_page_says(operation: Any, mode: GenerationMode, served: System,
                                                        stored: dict[str, str]) -> None:
    """Of a model that exists, with short answers, so that many a request becomes one."""
    @settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = served.model
            case.body |= {name: min(case.body[name], MAX_TOKENS) for name in LIMITS
                          if isinstance(case.body.get(name), int)}
        if case.method != "DELETE":
            case.path_parameters = {name: stored.get(name, value)
                                    for name, value in (case.path_parameters or {}).items()}
        case.call_and_validate(base_url=served.url, timeout=60, checks=CHECKS.get_by_names(CHECKED))

    try:
        ask()
    except Unsatisfiable:
        pytest.skip("it takes nothing that could be wrong")


def test_every_field_says_what_it_means(served: System) -> None:
    schemas = httpx.get(f"{served.url}/openapi.json").json()["components"]["schemas"]
    assert {"Error", "MessageError", "ChatRequest", "ChatCompletion"} <= schemas.keys()
    assert [name for kind, schema in schemas.items() for name in _unsaid(kind, schema)] == []


TOOL = {"name": "get_weather", "description": "Weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}}
HI = [{"role": "user", "content": "Weather in Rome?"}]
ASKED: dict[str, tuple[str, str, dict[str, Any]]] = {        # where, the schema of what is answered, and what is asked
    "chat": ("/v1/chat/completions", "ChatCompletion", {"messages": HI, "logprobs": True, "top_logprobs": 2, "n": 2}),
    "call": ("/v1/chat/completions", "ChatCompletion", {
        "messages": HI, "tools": [{"type": "function", "function": TOOL}], "tool_choice": "required", "store": True}),
    "function": ("/v1/chat/completions", "ChatCompletion", {
        "messages": HI, "functions": [TOOL], "function_call": {"name": "get_weather"}}),
    "text": ("/v1/completions", "TextCompletion", {"prompt": ["a", "b"]}),
    "response": ("/v1/responses", "ResponseObject", {
        "input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1, "user": "u",
        "max_output_tokens": 3}),
    "response that calls": ("/v1/responses", "ResponseObject", {
        "input": "Weather in Rome?", "tools": [{"type": "function", **TOOL}], "tool_choice": "required"}),
    "background": ("/v1/responses", "ResponseObject", {"input": "Hi", "background": True, "metadata": {"a": "b"}}),
    "response's tokens": ("/v1/responses/input_tokens", "ResponseInputTokens", {"input": "Hi"}),
    "message": ("/v1/messages", "MessageObject", {"messages": HI, "max_tokens": 40}),
    "message that calls": ("/v1/messages", "MessageObject", {
        "messages": HI, "max_tokens": 60, "tool_choice": {"type": "any"},
        "tools": [{"name": "get_weather", "input_schema": TOOL["parameters"]}]}),
    "message's tokens": ("/v1/messages/count_tokens", "InputTokens", {"messages": HI}),
    "tokens": ("/tokenize", "Tokens", {"prompt": "Hi", "return_token_strs": True}),
}


@pytest.fixture(scope="module")
def closed(served: System) -> dict[str, Any]:
    """The page's schemas, of which what is answered has no member that is not described."""
    schemas: dict[str, Any] = httpx.get(f"{served.url}/openapi.json").json()["components"]["schemas"]
    for schema in schemas.values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    return {"components": {"schemas": schemas}}


@pytest.mark.parametrize("name", ASKED)
def test_every_member_of_an_answer_is_described(name: str, served: System, closed: dict[str, Any]) -> None:
    path, schema, asked = ASKED[name]
    answer = httpx.post(f"{served.url}{path}", json={"model": served.model} | asked, timeout=60)
    assert answer.status_code == 200
    jsonschema.validate(answer.json(), closed | {"$ref": f"#/components/schemas/{schema}"})


def test_every_member_of_files_batches_and_models_is_described(served: System, closed: dict[str, Any]) -> None:
    """Of a batch that is completed, and of one that has failed."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": served.model, "messages": HI, "max_tokens": 3}}
    told: list[tuple[str, Any]] = []
    for lines in (line, line | {"method": "PUT"}):
        file = httpx.post(f"{served.url}/v1/files", files={"file": ("x.jsonl", json.dumps(lines).encode())},
                          data={"purpose": "batch"}).json()
        batch = httpx.post(f"{served.url}/v1/batches", json={
            "input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}).json()
        told += [("FileObject", file), ("BatchObject", batch)]
        told += [("BatchObject", each) for each in _told_until_over(f"{served.url}/v1/batches/{batch['id']}")]
    assert {each["status"] for _, each in told} >= {"completed", "failed"}
    assert any(each.get("errors") for _, each in told)
    told.append(("Models", httpx.get(f"{served.url}/v1/models").json()))
    for schema, each in told:
        jsonschema.validate(each, closed | {"$ref": f"#/components/schemas/{schema}"})


def _told_until_over(url: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []

    def is_over() -> bool:
        told.append(httpx.get(url).json())
        return told[-1]["status"] in OVER

    eventually("the batch is over", is_over)
    return told


def _unsaid(name: str, schema: dict[str, Any]) -> Iterator[str]:
    """The fields in it, at any depth, of which nothing is said."""
    for field, its in schema.get("properties", {}).items():
        if not its.get("description"):
            yield f"{name}.{field}"
        yield from _unsaid(f"{name}.{field}", its)


def test_the_page_needs_no_other_host(served: System) -> None:
    """It shows on a network of its own: scripts, styles and what they describe come from the pod. No page beside it."""
    page = httpx.get(f"{served.url}/docs").text
    assert "'/openapi.json'" in page and "://" not in page
    addresses = re.findall(r'<(?:script|link)\b[^>]* (?:src|href)="(.*?)"', page)
    assert {address.rpartition(".")[2] for address in addresses} == {"js", "css", "png"}
    for address in addresses:
        assert re.match("/[^/]", address) and httpx.get(served.url + address).status_code == 200, address
    assert httpx.get(f"{served.url}/redoc").status_code == 404


@pytest.mark.parametrize("method", ["get", "post", "delete"])
def test_every_address_is_described(served: System, method: str) -> None:
    paths: dict[str, Any] = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    for path, methods in paths.items():
        if method in methods:
            assert methods[method]["description"], path
