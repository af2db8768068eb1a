"""An application as anyone has it; of all that stands here, `http_client` alone is there for streams that are cut.

test_clients_return.py runs it, under other versions of the SDK too. It asks once for each line that it reads, and says
what it was told. `resuming` is a copy of api/client.py.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import openai


def make_client(url: str) -> openai.OpenAI:
    httpx = importlib.import_module("httpx2" if openai.__version__ > "3" else "httpx")
    resuming = importlib.import_module("resuming")
    return openai.OpenAI(base_url=url, api_key="EMPTY",
                         http_client=httpx.Client(transport=resuming.ResumingTransport()))


def ask(client: openai.OpenAI, options: dict[str, Any]) -> dict[str, Any]:
    texts, usages, ids = [""] * options["n"], [], set()
    reasons: list[list[str]] = [[] for _ in texts]
    for chunk in client.chat.completions.create(**options):
        ids.add(chunk.id)
        usages += [chunk.usage.to_dict()] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert len(ids) == 1, "one answer has one id"
    return {"texts": texts, "reasons": reasons, "usages": usages}


if __name__ == "__main__":
    client = make_client(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(ask(client, json.loads(line))), flush=True)
