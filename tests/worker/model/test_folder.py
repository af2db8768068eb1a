"""What is fetched from the hub: all that a worker reads, and nothing twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from worker.model.folder import find_folder, weight_bytes, weight_files

READ = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model",
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
NOT_READ = ["README.md", "pytorch_model.bin", "modeling_own.py", "consolidated.safetensors",
            "consolidated.safetensors.index.json", "original/consolidated.00.safetensors", "original/params.json",
            "onnx/model.safetensors", "original/tokenizer.model", "training_args.bin"]


def test_what_is_read_is_fetched_and_nothing_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched: list[str] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: Sequence[str],
                 ignore_patterns: Sequence[str] = ()) -> str:
        assert (name, revision) == ("org/name", "main")
        for file in filter_repo_objects([*READ, *NOT_READ], allow_patterns=list(allow_patterns),
                                        ignore_patterns=list(ignore_patterns)):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
            fetched.append(file)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find_folder("org/name", "main") == tmp_path
    assert fetched == READ


@pytest.mark.parametrize(("others", "loaded"), [
    (["model.safetensors"], ["model.safetensors"]),
    (["model-1.safetensors", "model-2.safetensors"], ["model-1.safetensors", "model-2.safetensors"]),
    (["weights.safetensors"], ["consolidated.safetensors", "weights.safetensors"])],
    ids=["whole", "shards", "whatever there is"])
def test_what_is_loaded_is_counted_and_nothing_twice(tmp_path: Path, others: list[str], loaded: list[str]) -> None:
    for name in ("consolidated.safetensors", *others):
        (tmp_path / name).write_bytes(b"123")
    if len(others) > 1:
        index = {"weight_map": {f"weight {number}": name for number, name in enumerate(others)}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(tmp_path)] == loaded
    assert weight_bytes(tmp_path) == 3 * len(loaded)
