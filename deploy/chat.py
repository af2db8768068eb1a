"""`baton chat`: a conversation in the terminal, streamed. A plain client of the API; it knows nothing else of Baton."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console

from shared.errors import BrokenEnvironment

CONNECT_S, READ_S = 5.0, 120.0
HELP = "Enter sends. /clear forgets the conversation, /quit or Ctrl-D leaves."


def chat(url: str, model: str | None, api_key: str) -> None:
    """Chats until the user leaves; `url` may be that of SDKs too, with /v1. Raises BrokenEnvironment when no API
    answers."""
    console = Console(highlight=False)
    headers = {"authorization": f"Bearer {api_key}"}
    timeout, base_url = httpx.Timeout(READ_S, connect=CONNECT_S), url.rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=base_url, headers=headers, timeout=timeout,
                      trust_env=not _is_this_machine(url)) as client:
        model = model or _first_model(client)
        console.print(f"[bold]{model}[/] at {url}. {HELP}", style="dim")
        messages: list[dict[str, str]] = []
        while True:
            try:
                line = console.input("[bold cyan]you ›[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if line == "/quit":
                return
            if line == "/clear":
                messages.clear()
            elif line:
                _turn(console, client, model, messages, line)


def _is_this_machine(url: str) -> bool:
    """Whether no proxy leads there."""
    try:
        host = httpx.URL(url).host
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except httpx.InvalidURL as error:
        raise BrokenEnvironment(f"{url} is no address ({error}): give another --url") from None
    except ValueError:                                  # a name
        return False


def _turn(console: Console, client: httpx.Client, model: str, messages: list[dict[str, str]], line: str) -> None:
    """One question and its answer. Ctrl-C stops the answer; its text so far stays in the conversation."""
    messages.append({"role": "user", "content": line})
    console.print("[bold green]it  ›[/] ", end="")
    said: list[str] = []
    try:
        for text in _stream(client, {"model": model, "messages": messages, "stream": True}):
            said.append(text)
            console.print(text, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" …", end="", style="dim")
    except (httpx.HTTPError, RuntimeError) as error:
        console.print(f"\n{error}", style="red", markup=False)
    console.print()
    messages.append({"role": "assistant", "content": "".join(said)})


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    """Pieces of text. Raises RuntimeError with the server's own words when it refuses."""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            response.read()
            raise RuntimeError(_refusal(response))
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


def _refusal(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):        # another web server's, or a proxy's
        return f"HTTP {response.status_code}"


def _first_model(client: httpx.Client) -> str:
    try:
        answer = client.get("/v1/models")
    except httpx.HTTPError:
        raise BrokenEnvironment(f"no API answers at {client.base_url}: run `baton serve`, or give --url") from None
    if answer.status_code == 401:
        raise BrokenEnvironment("the API wants a key: give --api-key, or set OPENAI_API_KEY")
    try:
        models = [str(model["id"]) for model in answer.json()["data"]]
    except (ValueError, LookupError, TypeError):
        why = _refusal(answer)
        raise BrokenEnvironment(f"no list of models at {client.base_url} ({why}): is --url right?") from None
    if not models:
        raise BrokenEnvironment("the API serves no model at the moment: start a worker with `baton worker`")
    return models[0]
