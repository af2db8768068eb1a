"""Where a model's files lie: a folder, or a name on the hub, whose files are fetched first.

It imports no torch, so that a missing model is refused at once.
"""

from __future__ import annotations

from pathlib import Path

FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
         "special_tokens_map.json", "chat_template*"]


class ModelRefused(Exception):
    """This model cannot be served; the message says what to do."""


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


def download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except Exception as error:          # the hub's errors, its client's and the network's have no common parent
        reason = (str(error).splitlines() or [""])[0]
        raise ModelRefused(f"no folder and no reachable hub model named {name}: {reason}") from error
