"""Two names that decide which workers may continue each other's answers.

`weights_id` identifies the model, `numerics_id` the way its bits are computed. Neither depends on where files are.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from worker.model.folder import weight_files

ARITHMETIC = 13             # of this code: increased when the same tokens may get other bits than before
BLOCK_WORDS = 1 << 17       # of 8 bytes: one sum for each MiB of a file, so fast as it is read
VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "_attn_implementation",
            "_experts_implementation", "use_cache"}
RELEVANT_FLAGS = ("avx2", "fma", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16", "i8mm")


def weights_id(folder: Path, config: dict[str, Any], quantization: str = "none") -> str:
    """Hashes the config and, of each safetensors file, name, size and sums of all that is in it: one changed weight is
    another model."""
    digest = hashlib.sha256(json.dumps(_lasting(config), sort_keys=True, default=str).encode())
    if quantization != "none":
        digest.update(quantization.encode())
    for path in weight_files(folder):
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        for sums in _sums(path):
            digest.update(sums.numpy().tobytes())
    return digest.hexdigest()[:32]


def _sums(path: Path) -> Iterator[Tensor]:
    """Of each block of a file, and of what is left, as words of 8 bytes and as bytes; sums wrap around."""
    with path.open("rb") as file:
        content = torch.from_numpy(np.memmap(file, np.uint8, "c"))
    words = content[:len(content) // 8 * 8].view(torch.int64)
    num_whole = len(words) // BLOCK_WORDS * BLOCK_WORDS
    yield words[:num_whole].view(-1, BLOCK_WORDS).sum(dim=1)
    yield words[num_whole:].sum()
    yield content[len(words) * 8:]


def numerics_id(parts: Iterable[object], device: torch.device) -> str:
    """`parts` are the model's and the mode's, beside libraries, and the instruction set, or the GPU."""
    of_device = _gpu(device) if device.type == "cuda" else [torch.backends.cpu.get_cpu_capability(), *_processor()]
    facts = [ARITHMETIC, *parts, torch.__version__, transformers.__version__, *of_device]
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:32]


def _lasting(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _lasting(value) for key, value in config.items() if key not in VOLATILE}
    return config


def _gpu(device: torch.device) -> list[object]:
    gpu = torch.cuda.get_device_properties(device)
    return [gpu.name, gpu.major, gpu.minor, gpu.multi_processor_count, torch.version.cuda]


def _processor() -> list[str]:
    """Kernels are chosen by vendor, family, cache sizes and flags; the model's name covers all but the flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    fields = dict(reversed([line.partition(":")[::2] for line in lines if ":" in line]))
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    relevant = sorted(flag for flag in flags if flag.startswith(RELEVANT_FLAGS))
    return [platform.machine(), fields.get("model name", ""), " ".join(relevant)]
