"""How long a context may be: as far as the model's positions and windows mean the same in our attention.

It knows the fields of configs. It knows nothing of memory, which may set a lower limit.
"""

from __future__ import annotations

from typing import Any

import torch

from worker.model import check
from worker.model.attention import Recorder
from worker.model.folder import ModelRefused

TRIAL_WINDOW = 4            # tokens


def choose_max_model_len(config: Any, wanted: int | None) -> int:
    trained = int(config.max_position_embeddings)
    original = _steady_rope_len(config)
    limit = min(trained, original or trained)
    if wanted is not None and wanted > limit:
        raise ModelRefused(f"max_model_len {wanted} is more than this model's {limit}: lower it")
    return wanted or limit


def _steady_rope_len(config: Any) -> int | None:
    """Some rotary embeddings change for the whole batch when its longest row exceeds a length: that is the limit."""
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = []
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            lengths.append(int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings))
    return min(lengths, default=None)


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
