"""Two models, each with workers of its own, behind one pod."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.nursery import Nursery
from tests.system import START_S, System, eventually, serves
from worker import tiny

COUNT: Any = [{"role": "user", "content": "Count from 1 to 5."}]
SHARD_SIZE = "1MB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model's shape and tokenizer, other weights in several files, and defaults of its own."""
    folder = Path(shutil.copytree(tiny.MODEL_FOLDER, tmp_path_factory.mktemp("m") / "other"))
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    module = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny.MODEL_FOLDER).config)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    module.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.0, "repetition_penalty": 1.1}))
    return folder


@pytest.fixture(scope="module")
def system(redis_url: str, nursery: Nursery, folder: Path, tmp_path_factory: pytest.TempPathFactory
           ) -> Iterator[System]:
    system = System(tmp_path_factory.mktemp("several"), redis_url, allow_no_aof=True, idle_poll_s=0.2,
                    served_model_name="several-first", start=nursery.start)
    system.start_worker(str(folder), served_model_name="several-second")
    system.start_worker()
    system.start_pod()
    eventually("the pod knows both", lambda: all(map(partial(serves, system.url), ("several-first", "several-second"))),
               START_S)
    yield system
    system.stop()


def test_each_request_reaches_its_model(system: System) -> None:
    """Weights in several files are loaded, under a progress bar; what a request leaves open is as its folder says."""
    client = openai.Client(base_url=f"{system.url}/v1", api_key="EMPTY", max_retries=0, timeout=60)

    def ask(model: str, **fields: Any) -> Any:
        return client.chat.completions.create(model=model, messages=COUNT, max_tokens=24, **fields)

    assert {"several-first", "several-second"} <= {model.id for model in client.models.list()}
    first, second = ask("several-first", temperature=0), ask("several-second")
    assert first.choices[0].message.content == "1, 2, 3, 4, 5"
    assert second.choices[0].message.content not in ("", first.choices[0].message.content)
    assert first.system_fingerprint != second.system_fingerprint
    texts = {temperature: {ask("several-second", **fields).choices[0].message.content for _ in range(3)}
             for temperature, fields in (("its own", {}), ("hot", {"temperature": 2.0}))}
    assert texts["its own"] == {second.choices[0].message.content} and len(texts["hot"]) > 1
    with pytest.raises(openai.NotFoundError):
        ask("several-third")
    worker = system.workers[0]
    assert "Loading weights: 100%" in worker.said
    worker.end()
    assert ask("several-first", temperature=0).choices[0].message.content == "1, 2, 3, 4, 5"
