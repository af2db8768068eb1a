"""How long a context may be: as far as the model's positions and windows mean the same in our attention.

It knows the fields of configs. It knows nothing of memory, which may set a lower limit.
"""

from __future__ import annotations

from typing import Any

import torch

from worker.model import check
from worker.model.attention import Recorder
from worker.model.folder import ModelRefused

MIN_MODEL_LEN = 2           # tokens: one of a prompt, and one of its answer
TRIAL_WINDOW = 4            # tokens
CHANGING_ROPES = "dynamic", "longrope"      # for the whole batch, when its longest row exceeds the original length
SCALED_ROPES = "linear", "yarn"             # that reach the original length times a factor, in every row alike


def choose_max_model_len(config: Any, wanted: int | None) -> int:
    """The length that the model was trained for, if none is wanted; rotary embeddings that are scaled reach further."""
    trained = getattr(config, "max_position_embeddings", None)
    if not isinstance(trained, int | float) or trained < MIN_MODEL_LEN:
        raise ModelRefused(f"config.json says max_position_embeddings {trained}: correct it, to tokens")
    trained, ropes = int(trained), _ropes(config)
    steady = [_original(rope, trained) for rope in ropes if rope.get("rope_type") in CHANGING_ROPES]
    scaled = [int(_original(rope, trained) * _factor(rope)) for rope in ropes]
    most = min([*steady, max(trained, min(scaled, default=trained))])
    if wanted is not None and wanted > most:
        raise ModelRefused(f"max_model_len {wanted} is more than this model's {most}: lower it")
    return wanted or min([*steady, trained])


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of rotary embeddings: one set for all layers, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [value for value in rope.values() if isinstance(value, dict)] or ([rope] if rope else [])


def _original(rope: dict[str, Any], trained: int) -> int:
    return int(rope.get("original_max_position_embeddings") or trained)


def _factor(rope: dict[str, Any]) -> float:
    return float(rope.get("factor") or 1) if rope.get("rope_type") in SCALED_ROPES else 1.0


def require_windows(module: Any, config: Any, recorder: Recorder, max_model_len: int) -> None:
    """Raises ModelRefused for a window that reaches a layer only through transformers' mask, which we ignore."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or []
    for layer, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelRefused(f"{config.model_type} is not supported: layer {layer} is of kind {kind}")
    named = {layer: scores.sliding_window == window for layer, scores in recorder.scores.items()}
    if max_model_len <= window or all(named.values()):
        return
    if any(kind == "sliding_attention" and not named[layer] for layer, kind in enumerate(kinds)) or (
            window and not kinds and _is_in_mask(module)):
        raise ModelRefused(f"{config.model_type} does not name its sliding window: set max_model_len to {window}")


def _is_in_mask(module: Any) -> bool:
    """Whether the window of the config changes what the plain model computes: some families never read the field."""
    token_ids = check.random_token_ids(module.config.get_text_config(decoder=True).vocab_size, 2 * TRIAL_WINDOW)
    configs = [config for config in {id(part.config): part.config for part in module.modules()
                                     if hasattr(part, "config")}.values() if getattr(config, "sliding_window", None)]
    windows = [config.sliding_window for config in configs]
    plain = check.plain_logits(module, token_ids)
    try:
        for config in configs:
            config.sliding_window = TRIAL_WINDOW
        return not torch.equal(check.plain_logits(module, token_ids), plain)
    finally:
        for config, window in zip(configs, windows, strict=True):
            config.sliding_window = window
