"""The card: what the API must know of a model, made from the model's folder.

It knows tokenizers and templates. It knows nothing of Redis, and nothing of how the model computes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from shared.card import Card
from shared.template import ChatTemplate
from worker.engine.engine import Engine
from worker.model.folder import ModelRefused, generation_config, one_line, read_json, weight_files

log = logging.getLogger(__name__)

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def make_card(name: str, engine: Engine) -> Card:
    """Raises ModelRefused when the API cannot run the tokenizer."""
    model = engine.model
    tokenizer = load_tokenizer(model.folder)
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
                prefill_chunk_tokens=engine.chunks.piece_len,
                weights_id=model.weights_id, numerics_id=engine.numerics_id, created_s=_created_s(model.folder))


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, of a class of transformers: code in the folder is neither run nor asked about.

    Where the folder names a class of its own, tokenizer.json is read as it stands: all such classes write it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception:
            if not _names_code(folder):
                raise
            log.info("the tokenizer's own class (auto_map) is not run: tokenizer.json is read without it")
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:          # of any kind: transformers reads these files without looking what they hold
        remedy = "fetch its tokenizer files again" if (folder / "tokenizer.json").is_file() else "add tokenizer.json"
        raise ModelRefused(f"{folder}: no tokenizer can be loaded ({one_line(error)}): {remedy}") from None


def _names_code(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return (folder / "tokenizer.json").is_file() and path.is_file() and bool(read_json(path).get("auto_map"))


def _sampling_defaults(folder: Path) -> dict[str, float]:
    config = generation_config(folder)
    return {name: config[name] for name in SAMPLING_DEFAULTS if isinstance(config.get(name), (int, float))}


def _created_s(folder: Path) -> int:
    return max(int(path.stat().st_mtime) for path in weight_files(folder))
