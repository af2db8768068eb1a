"""The card: what the API must know of a model, made from the model's folder.

It knows tokenizers and templates. It knows nothing of Redis, and nothing of how the model computes.
"""

from __future__ import annotations

import json
from pathlib import Path

from shared.card import Card
from shared.template import ChatTemplate
from worker.engine.engine import Engine
from worker.model.folder import ModelRefused

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def make_card(name: str, engine: Engine) -> Card:
    """Raises ModelRefused when the API cannot run the tokenizer."""
    from transformers import AutoTokenizer

    model = engine.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.folder)
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{model.folder}: no tokenizer can be loaded ({type(error).__name__}): "
                           "add tokenizer.json") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ModelRefused(f"{model.folder}: its tokenizer has no tokenizer.json and cannot be converted to one")
    templates = tokenizer.chat_template or {}
    templates = {"default": templates} if isinstance(templates, str) else dict(templates)
    for template_name, source in templates.items():
        try:
            ChatTemplate(source)
        except ValueError as error:
            raise ModelRefused(f"{model.folder}: chat template {template_name}: {error}") from None
    return Card(model=name, tokenizer_json=tokenizer.backend_tokenizer.to_str(), chat_templates=templates,
                special_tokens={key: str(token) for key, token in tokenizer.special_tokens_map.items()
                                if isinstance(token, str)},
                sampling_defaults=_sampling_defaults(model.folder),
                eos_token_ids=tuple(sorted(model.eos_token_ids)), vocab_size=model.vocab_size,
                max_model_len=engine.max_model_len, max_num_seqs=engine.kv.num_slots,
                prefill_chunk_tokens=engine.prefill_chunk,
                weights_id=model.weights_id, numerics_id=engine.numerics_id, created_s=_created_s(model.folder))


def _sampling_defaults(folder: Path) -> dict[str, float]:
    """What the model's authors recommend, in generation_config.json."""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    return {name: config[name] for name in SAMPLING_DEFAULTS if isinstance(config.get(name), (int, float))}


def _created_s(folder: Path) -> int:
    return max(int(path.stat().st_mtime) for path in folder.glob("*.safetensors"))
