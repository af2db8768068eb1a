"""Random models of llama's shape, for speed measurements: `python -m tests.bench.models 113m FOLDER`.

Seeded, saved in bfloat16 as most models are, with a tokenizer whose every word is one token, and without special
tokens: each server writes as many tokens as requested, and every token shows as text. Such weights repeat their last
token. Nothing here loads torch before a model is made.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

SEED = 0
SHAPES: dict[str, dict[str, Any]] = {
    "5m": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
           "num_attention_heads": 8, "num_key_value_heads": 4},
    "113m": {"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14,
             "num_attention_heads": 12, "num_key_value_heads": 4},
    "500m": {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 30,
             "num_attention_heads": 16, "num_key_value_heads": 8},
}
SHAPED_ALIKE = {"max_position_embeddings": 4096, "tie_word_embeddings": True,
                "bos_token_id": None, "eos_token_id": None}

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
NUM_BYTES = 128                                         # ASCII: no token is a partial character, each shows as text
# A vowel and the consonant behind it are never merged: words fall apart into syllables in one way only.
SYLLABLES = [a + b for a, b in product("bcdfghjklmnpqrstvwxz", "aeiou")]

NUM_FIRSTS = 75             # syllables with which a word of every vocabulary may begin: 75 × 100 words fit the smallest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path, help="where it is saved, with tokenizer and chat template")
    args = parser.parse_args()
    save_random(args.name, args.folder)


def save_random(name: str, folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    config = LlamaConfig(**SHAPES[name], **SHAPED_ALIKE)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(config.vocab_size), chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(vocab_size: int) -> Any:
    """ASCII, the syllables, then words of one, two and three syllables until the vocabulary is full."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # ByteLevel writes printable ASCII as itself, and the rest of it from Ā on; Ġ is the space.
    letters = [chr(byte) for byte in range(0x21, 0x7F)] + [chr(0x100 + i) for i in range(0x22)]
    merges = list(islice(_merges(), vocab_size - NUM_BYTES))
    tokens = letters + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def _merges() -> Iterator[tuple[str, str]]:
    yield from ((syllable[0], syllable[1]) for syllable in SYLLABLES)
    yield from (("Ġ", syllable) for syllable in SYLLABLES)
    yield from (("Ġ" + first, second) for first, second in product(SYLLABLES, repeat=2))
    yield from (("Ġ" + first + second, third) for first, second, third in product(SYLLABLES, repeat=3))


def prompt(number: int, num_tokens: int) -> list[dict[str, str]]:
    """Messages of so many tokens, one per word, which differ for every number from the first token on."""
    draw = random.Random(number)
    firsts = SYLLABLES[:NUM_FIRSTS]
    content = "".join(f" {draw.choice(firsts)}{draw.choice(SYLLABLES)}" for _ in range(num_tokens))
    return [{"role": "user", "content": content}]


if __name__ == "__main__":
    main()
