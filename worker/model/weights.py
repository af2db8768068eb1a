"""Weights from a model's files into a module of transformers: all that it has, or none.

It knows names and shapes of tensors. It knows nothing of attention, lengths or identity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from shared import container
from worker.model import experts
from worker.model.folder import ModelRefused, one_line, weight_bytes, weight_files

GIB = 2**30
SAVED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DRAFT_PARTS = frozenset({"eh_proj", "enorm", "hnorm", "shared_head"})   # of layers that only predict further tokens


def load_module(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Raises ModelRefused, also for what transformers would fill with random numbers."""
    require_plain(folder)
    require_room(folder, dtype)
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            attn_implementation="eager", output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:          # of any kind: families compute with fields of the config, whatever they are
        raise ModelRefused(f"{folder} does not load: {one_line(error)}") from error
    wrong = wrong_weights(report, module.state_dict())
    if wrong:
        raise ModelRefused(f"{folder} does not load: {wrong}")
    module.set_experts_implementation(experts.NAME)
    try:
        return module.to(device).eval().requires_grad_(False)
    except torch.OutOfMemoryError:
        raise ModelRefused(f"{folder} has more weights than the device has memory") from None


def saved_dtype(folder: Path) -> torch.dtype:
    """Of the first weight in the files that is no integer, where a config does not say it. Raises ModelRefused."""
    found = next((SAVED[kind] for _, kind in _kinds(folder) if kind in SAVED), None)
    if found is None:
        raise ModelRefused(f"{folder} does not load: it has no weights in float32 or half precision")
    return found


def require_plain(folder: Path) -> None:
    """Raises ModelRefused for weights of eight bits or less, which need scales: not every config tells of them."""
    for name, kind in _kinds(folder):
        if name.endswith(".weight") and kind not in SAVED:
            raise ModelRefused(f"{folder} is quantized ({name} is {kind}): give float32 or bfloat16 weights")


def require_room(folder: Path, dtype: torch.dtype) -> None:
    """Raises ModelRefused for more weights than there is memory: the system would end the process in the midst."""
    num_bytes = weight_bytes(folder) * dtype.itemsize // saved_dtype(folder).itemsize
    num_free_bytes = container.num_free_bytes()
    if num_bytes > num_free_bytes:
        raise ModelRefused(f"{folder} does not fit: {num_bytes / GIB:.2f} GiB of weights as {dtype}, and "
                           f"{num_free_bytes / GIB:.2f} GiB of memory are free")


def _kinds(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and type of each tensor in the files, as safetensors says it. Raises ModelRefused."""
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                yield from [(name, file.get_slice(name).get_dtype()) for name in file.offset_keys()]
        except (OSError, SafetensorError) as error:
            raise ModelRefused(f"{path} cannot be read ({one_line(error)}): fetch it again") from error


def wrong_weights(report: Mapping[str, Any], own: Iterable[str]) -> str | None:
    """What the files lack, or have beyond the config, by transformers' report and the module's own names.

    The report knows what is tied to another weight or computed, and leaves it out.
    """
    for name, in_files, in_config in sorted(report["mismatched_keys"]):
        return f"{name} has shape {list(in_files)}, and config.json says {list(in_config)}"
    missing = sorted(report["missing_keys"])
    if missing:
        more = f", nor are {len(missing) - 1} others" if missing[1:] else ""
        return f"{missing[0]} is not among its weights{more}: fetch its *.safetensors again, or correct config.json"
    layer = unused_layer(own, report["unexpected_keys"])
    return f"config.json makes no use of layer {layer}: correct num_hidden_layers" if layer else None


def unused_layer(own: Iterable[str], unexpected: Iterable[str]) -> str | None:
    """The first layer in the files that continues a list of the module's own.

    Other names without use are no reason to refuse: towers of another modality, further heads, tables that are computed
    today. Nor are layers that predict further tokens, though some families number them after the decoder's.
    """
    known = {place for place in map(_layer, own) if place}
    lists = {name for name, _ in known}
    parts: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name in unexpected:
        place = _layer(name)
        if place and place[0] in lists and place not in known:
            parts[place].update(name.split("."))
    return next((f"{name}.{number}" for name, number in sorted(parts) if not parts[name, number] & DRAFT_PARTS), None)


def _layer(name: str) -> tuple[str, int] | None:
    """("model.layers", 3) for model.layers.3.mlp.up_proj.weight: of lists in lists, the outermost."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), 0)
    return (".".join(parts[:place]), int(parts[place])) if place else None
