"""From a folder or a hub name to a checked model, or one clear line that says why not.

Safetensors only, no remote code: nothing in a model's files is ever executed.
"""

from __future__ import annotations

import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from worker.model import attention, check, cpu, identity, memory
from worker.model.attention import Recorder
from worker.model.experts import pack_mixtures
from worker.model.folder import ModelRefused, find_folder, generation_config, one_line, read_json
from worker.model.fused import hand_over
from worker.model.fusing import fuse_blocks
from worker.model.length import choose_max_model_len, require_windows
from worker.model.linear import pack_linears
from worker.model.model import LONG_PREFILL_BUDGET, PREFILL_BUDGET, Model
from worker.model.steady import steady_activations
from worker.model.weights import load_module, saved_dtype

if TYPE_CHECKING:
    from worker.model.cpu.forward import Forwards

log = logging.getLogger(__name__)

HALF_BYTES = 2              # of a number in half precision
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(folder_or_name: str, *, dtype: Literal["auto", "float32", "bfloat16"] = "auto",
         max_model_len: int | None = None, revision: str | None = None,
         device: Literal["auto", "cpu", "cuda"] = "cpu", max_num_seqs: int = 64,
         quantization: Literal["none", "int8"] = "none") -> Model:
    place = choose_device(device)
    folder = find_folder(folder_or_name, revision)
    config = read_config(folder)
    chosen = choose_dtype(config, folder, dtype, place)
    return prove(load_module(folder, config, chosen, place), config, folder, max_model_len, max_num_seqs, quantization)


def prove(module: Any, config: Any, folder: Path, max_model_len: int | None = None, max_num_seqs: int = 64,
          quantization: Literal["none", "int8"] = "none") -> Model:
    """Wraps a model of transformers, on its device, and compares the two. Raises ModelRefused."""
    text_config = config.get_text_config(decoder=True)
    token_ids = check.random_token_ids(text_config.vocab_size, check.NUM_TOKENS)
    expected, recorder = try_plain(module, token_ids)
    kv_shapes = tuple(recorder.shapes[layer] for layer in range(len(recorder.shapes)))
    max_model_len = choose_max_model_len(text_config, max_model_len)
    require_windows(module, text_config, recorder, max_model_len)
    fuse_blocks(module, token_ids, kv_shapes, recorder.scores, max_model_len)
    if memory.is_paged(module.device):
        hand_over(module)
    pack_linears(module)
    if not memory.is_paged(module.device):
        pack_mixtures(module)
        steady_activations(module, module.dtype)
    model = Model(
        module=module, config=text_config, folder=folder, dtype=module.dtype, vocab_size=text_config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids(module, text_config),
        kv_shapes=kv_shapes,
        prefill_budget=LONG_PREFILL_BUDGET if cpu.has_matrices(module.dtype) else PREFILL_BUDGET,
        weights_id=identity.weights_id(folder, config.to_dict(), quantization))
    if cpu.computes(module.dtype):
        model.program = try_program(model)
    probe(model, expected, max_num_seqs)
    if quantization == "int8":
        quantize(model, expected)
    if model.has_fixed_rows:
        model.row_sizes = check.probe_row_sizes(model)
    return model


def try_program(model: Model) -> Forwards | None:
    """Its forwards as one call each, if they compute what the model computes."""
    from worker.model.cpu.forward import Forwards  # needs llvmlite

    program = Forwards.of(model.module, model.kv_shapes, model.most_rows, model.max_model_len)
    return program if program and check.says_the_same(model, program) else None


def read_config(folder: Path) -> Any:
    raw, _ = read_json(folder / "config.json"), generation_config(folder)
    model_type, quantization = raw.get("model_type"), raw.get("quantization_config")
    if raw.get("auto_map"):
        raise ModelRefused(f"{folder} brings code of its own (auto_map): only model classes of transformers are run")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelRefused(f"{folder} is quantized ({method}): give float32 or bfloat16 weights")
    if model_type not in list(CONFIG_MAPPING):
        raise ModelRefused(f"{folder}: transformers does not know model_type {model_type!r}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:          # of any kind: families compute with the fields before they look at them
        raise ModelRefused(f"{folder}: config.json is wrong for {model_type} ({one_line(error)}): correct it"
                           ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelRefused(f"{folder}: {config.model_type} is not a causal language model in transformers")
    return config


def choose_device(wanted: str) -> torch.device:
    """A GPU if there is one, with what its kernels need. Raises ModelRefused where it is requested but missing."""
    if wanted == "cpu":
        return torch.device("cpu")
    missing = missing_for_cuda()
    if not missing:
        return torch.device("cuda")
    if wanted == "cuda":
        raise ModelRefused(f"device cuda needs {missing}; device cpu does without")
    if torch.cuda.is_available():
        log.warning("a GPU is here and stays unused: it needs %s", missing)
    return torch.device("cpu")


def missing_for_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "a GPU that torch can use"
    if find_spec("triton") is None:
        return "Triton (pip install triton)"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "a C compiler, with which Triton launches kernels (apt-get install gcc libc6-dev)"
    return None


def choose_dtype(config: Any, folder: Path, wanted: str, device: torch.device) -> torch.dtype:
    """Half precision is served in bfloat16 where the device computes it; elsewhere float32 is ten times faster."""
    if wanted != "auto":
        return DTYPES[wanted]
    saved = config.get_text_config(decoder=True).dtype or config.dtype or saved_dtype(folder)
    is_slow = device.type == "cpu" and not computes_bfloat16()
    return torch.bfloat16 if saved.itemsize <= HALF_BYTES and not is_slow else torch.float32


def computes_bfloat16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):              # a build of torch without oneDNN
        return False


def try_plain(module: Any, token_ids: list[int]) -> tuple[Tensor, Recorder]:
    """The plain model's logits, and how its layers call our attention."""
    name = type(module).__name__
    try:
        expected = check.plain_logits(module, token_ids)
        recorder = check.record(module)
    except Exception as error:          # whatever a model class does that differs from the common protocol
        raise ModelRefused(f"{name} is not supported: its attention differs ({error})") from error
    if sorted(recorder.shapes) != list(range(len(recorder.shapes))) or not recorder.shapes:
        raise ModelRefused(f"{name} is not supported: layers without attention, or with another kind of it")
    return expected, recorder


def quantize(model: Model, expected: Tensor) -> None:
    if not memory.is_paged(model.device):
        raise ModelRefused("quantization int8 needs a GPU: on a CPU its products are slower than those in bfloat16")
    from worker.model.int8 import quantize_linears  # needs Triton

    num_quantized = quantize_linears(model.module, model.module.get_output_embeddings())
    error = check.relative_error(model, expected)
    log.info("%d linear layers in int8: logits differ by %.2g", num_quantized, error)
    if error > check.MAX_QUANTIZED_ERROR:
        raise ModelRefused(f"{model.folder} loses too much in int8: its logits differ by {error:.2g}")


def eos_token_ids(module: Any, config: Any) -> frozenset[int]:
    found: list[Any] = []
    for value in (module.generation_config.eos_token_id, getattr(config, "eos_token_id", None)):
        found += value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) for token_id in found):
        raise ModelRefused(f"eos_token_id is {found}: correct generation_config.json, or config.json, to numbers")
    return frozenset(found)


def probe(model: Model, expected: Tensor, max_num_seqs: int) -> None:
    name = type(model.module).__name__
    model.is_uniform = check.is_uniform(model)
    if model.is_uniform:
        model.min_rows, model.max_rows, model.max_shared_rows = 1, model.most_rows, model.most_rows
    else:
        model.min_rows, model.max_rows = check.probe_row_limit(model, max_num_seqs)
        model.max_shared_rows = check.probe_shared_rows(model)
    error = check.relative_error(model, expected)
    if error > check.MAX_RELATIVE_ERROR[model.dtype]:
        raise ModelRefused(f"{name} is not supported: its logits differ from the plain model's by {error:.2g}")
    model.numerics_id = identity.numerics_id([
        model.weights_id, model.dtype, attention.PAGE_LEN, model.min_rows, model.max_rows,
        *([] if model.is_uniform else [torch.get_num_threads()]), *cpu.arithmetic(model.dtype)], model.device)
