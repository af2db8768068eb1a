"""Where a model's files lie: a folder, or a name on the hub, whose files are fetched first.

It imports no torch, so that a missing model is refused at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
         "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model", "chat_template*",
         "additional_chat_templates/*.jinja"]
NO_FILES = ["*/*.safetensors*", "consolidated*"]        # the same weights again, for other programs
MAX_REASON_CHARS = 300          # of an error of a library, in a line of ours


class ModelRefused(Exception):
    """This model cannot be served; the message says what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelRefused if it holds anything but an object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{path} cannot be read ({one_line(error)}): fetch it again") from error
    if not isinstance(content, dict):
        raise ModelRefused(f"{path} holds a {type(content).__name__} and no object: fetch it again")
    return content


def generation_config(folder: Path) -> dict[str, Any]:
    """What the model's authors recommend; nothing where there is no such file."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:MAX_REASON_CHARS]}" if text else type(error).__name__


def find_folder(folder_or_name: str, revision: str | None) -> Path:
    folder = Path(folder_or_name)
    if not folder.is_dir():
        if folder_or_name.startswith((".", "/", "~")) or folder_or_name.count("/") > 1:
            raise ModelRefused(f"no folder {folder_or_name}: give a folder with config.json and *.safetensors, "
                               "or a hub name")
        folder = download(folder_or_name, revision)
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"{folder} has no config.json: give a folder as save_pretrained writes it")
    if not any(folder.glob("*.safetensors")):
        raise ModelRefused(f"{folder} has no *.safetensors: pickled weights can run code, convert them with "
                           "save_pretrained(safe_serialization=True)")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers loads weights: others may hold them once more, for other programs. Raises
    ModelRefused."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    there = sorted(folder.glob("*.safetensors"))
    named = read_json(index).get("weight_map") if index.is_file() else None
    return [path for path in there if path.name in named.values()] if isinstance(named, dict) else there


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))


def download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns=NO_FILES))
    except Exception as error:          # the hub's errors, its client's and the network's have no common parent
        reason = (str(error).splitlines() or [""])[0]
        raise ModelRefused(f"no folder and no reachable hub model named {name}: {reason}") from error
