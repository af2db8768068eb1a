"""Train baton-tiny from nothing on synthetic chat and write its folder.

    python -m worker.tiny.train                    # the shipped model: one thread, about 70 minutes
    python -m worker.tiny.train --resume           # go on from the last checkpoint

It knows tensors and the clock. What is asked and answered is made in `skills.py`, and the loss is on answers only.
"""

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

from worker.tiny import MODEL_FOLDER
from worker.tiny.chat import END_ID, PAD_ID, encode, is_answer
from worker.tiny.conversations import conversation
from worker.tiny.evaluate import accuracy
from worker.tiny.skills import SKILLS, TABLE
from worker.tiny.tokenizer import MAX_POSITIONS, VOCAB_SIZE, write_tokenizer
from worker.tiny.words import Draw


@dataclass(frozen=True)
class Stage:
    """What is practised, until so many million tokens."""

    until: float
    brevity: float                      # of numbers and ranges
    end_weight: float                   # of `<|im_end|>` in the loss
    shares: dict[str, float]            # how often a conversation begins with a skill; validation then tilts them


# First to copy and to form answers. Then the decisions that are rare in running text: when to stop, and that a
# number may have one digit only.
STAGES = (
    Stage(until=21.2, brevity=0.0, end_weight=1.0, shares={
        "greeting": 0.5, "counting": 0.5, "listing": 0.9, "spelling": 1.6, "reversing": 1.8, "upper_casing": 1.8,
        "adding": 1.1, "subtracting": 1.4, "recall": 1.0, "capitals": 1.2, "tool_call": 0.4, "tool_result": 0.4,
        "json_schema": 0.7, "unknown": 0.2}),
    Stage(until=42.0, brevity=0.4, end_weight=4.0, shares={
        "greeting": 0.7, "counting": 1.2, "listing": 1.6, "spelling": 1.3, "reversing": 1.6, "upper_casing": 1.5,
        "adding": 1.1, "subtracting": 1.6, "recall": 1.0, "capitals": 1.2, "tool_call": 0.7, "tool_result": 0.9,
        "json_schema": 0.8, "unknown": 0.3}),
)


@dataclass(frozen=True)
class Recipe:
    """Lengths of training are in millions of tokens, padding included.

    The whole takes about 70 minutes of one core with AVX512-BF16.
    """

    stages: tuple[Stage, ...] = STAGES
    seed: int = 1
    batch_tokens: int = 4096            # padded: many small steps, yet Muon's orthogonalisation is an eighth of each
    pool_batches: int = 48              # drawn together and sorted by length, so that little is padding
    muon_lr: float = 0.006
    adam_lr: float = 0.005
    warmup: float = 0.38
    decay: float = 18.9                 # the last part: the learning rates fall to nearly nothing
    short_until: float = 7.6            # copying is learnt sooner from short conversations
    validate_every: float = 2.66
    validation_questions: int = 32      # per skill

    @property
    def whole(self) -> float:
        return self.stages[-1].until

    def stage(self, done: float) -> Stage:
        return next((stage for stage in self.stages if done < stage.until), self.stages[-1])


STEPS_PER_LINE = 50
TEMPERATURE = 0.3       # what a request gets that asks for none: a long count has many places to slip

CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=MAX_POSITIONS,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=END_ID,
    pad_token_id=PAD_ID,
    dtype="bfloat16",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=Path("baton-tiny.checkpoint.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training = Training(Recipe(seed=options.seed), options.checkpoint)
    if options.resume:
        training.load()
    training.run()
    write_folder(training.model, options.folder)


class Training:
    """The model, its optimizers and the share of the recipe that is done."""

    def __init__(self, recipe: Recipe, checkpoint: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.checkpoint = checkpoint
        self.model: LlamaForCausalLM = LlamaForCausalLM._from_config(CONFIG, attn_implementation=ATTENTION)
        self.optimizers = _optimizers(self.model, recipe)
        self.weights = dict(recipe.stages[0].shares)
        self.step = 0
        self.num_pools = 0
        self.num_tokens = 0

    @property
    def done(self) -> float:
        """In millions of tokens."""
        return self.num_tokens / 1e6

    @property
    def stage(self) -> Stage:
        return self.recipe.stage(self.done)

    def run(self) -> None:
        next_validation = self.done + self.recipe.validate_every
        clock = Clock(self.num_tokens)
        losses: list[float] = []
        for batch in self._batches():
            losses.append(self._learn(batch))
            if len(losses) == STEPS_PER_LINE:
                print(self._progress(sum(losses) / len(losses), clock), flush=True)
                losses.clear()
            if self.done >= next_validation:
                next_validation += self.recipe.validate_every
                self._validate()
                self.save()
        self._validate()
        self.save()

    def _learn(self, batch: "Batch") -> float:
        scale = _schedule(self.done, self.recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["peak_lr"]
        loss = _loss(self.model, batch, self.stage.end_weight)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.num_tokens += batch.input_ids.numel()
        return loss.item()

    def _batches(self) -> Iterator["Batch"]:
        while self.done < self.recipe.whole:
            self.num_pools += 1
            draw = Draw("train", f"{self.recipe.seed} {self.num_pools}", self.stage.brevity)
            yield from _pool(draw, self.weights, self.recipe, short=self.done < self.recipe.short_until)

    def _validate(self) -> None:
        """Accuracy per skill on validation questions; a skill that lags gets up to three times its share."""
        self.model.eval().set_attn_implementation("sdpa")
        draw = Draw("validation", seed=self.step)
        for skill in SKILLS:
            right = accuracy(self.model, [TABLE[skill](draw) for _ in range(self.recipe.validation_questions)])
            self.weights[skill] = self.stage.shares[skill] * (0.5 + 2.5 * (1 - right))
            print(f"    {skill:<14} {right:>5.0%}", flush=True)
        self.model.train().set_attn_implementation(ATTENTION)

    def _progress(self, loss: float, clock: "Clock") -> str:
        tokens_per_s = clock.rate(self.num_tokens)
        left_s = 1e6 * (self.recipe.whole - self.done) / tokens_per_s
        return (f"step {self.step}  loss {loss:.4f}  {self.done:.1f} M tokens"
                f"  {tokens_per_s:.0f} tokens/s  {left_s / 60:.1f} minutes left")

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizers": [each.state_dict() for each in self.optimizers],
                 "weights": self.weights, "step": self.step, "num_pools": self.num_pools, "num_tokens": self.num_tokens}
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def load(self) -> None:
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.weights, self.step = state["weights"], state["step"]
        self.num_pools, self.num_tokens = state["num_pools"], state["num_tokens"]


class Clock:
    """Tokens per second since it was made."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.started_s = time.monotonic()

    def rate(self, num_tokens: int) -> float:
        return (num_tokens - self.num_tokens) / (time.monotonic() - self.started_s)


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor       # rows padded on the right: nothing real attends to padding, which comes after it
    answers: Tensor         # True where a token must be predicted


def _pool(draw: Draw, weights: Mapping[str, float], recipe: Recipe, short: bool) -> list[Batch]:
    """Several batches' worth of conversations, sorted by length, cut into batches and shuffled."""
    rows: list[list[int]] = []
    num_tokens = 0
    while num_tokens < recipe.pool_batches * recipe.batch_tokens:
        longest = draw.choice([80, 160]) if short else draw.choice([80, 80, 160, 160, 240, 320, 700])
        spoken = conversation(draw, weights, longest)
        rows.append(encode(spoken.messages, spoken.tools)[: MAX_POSITIONS])
        num_tokens += len(rows[-1])
    rows.sort(key=len)
    batches = []
    while rows:
        size = max(1, recipe.batch_tokens // len(rows[-1]))
        batches.append(_batch(rows[-size:]))
        del rows[-size:]
    draw.random.shuffle(batches)
    return batches


def _batch(rows: list[list[int]]) -> Batch:
    longest = -max(map(len, rows)) // 32 * -32 + 1      # inputs end before the last: 32 suits the kernels
    input_ids = torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows])
    answers = torch.tensor([is_answer(row) + [False] * (longest - len(row)) for row in rows])
    return Batch(input_ids, answers)


def _loss(model: LlamaForCausalLM, batch: Batch, end_weight: float) -> Tensor:
    """Cross entropy of the answers, their ends weighted; only their positions reach the head."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch.input_ids[:, :-1], use_cache=False).last_hidden_state
        predicted = batch.answers[:, 1:]
        logits = model.lm_head(hidden[predicted])
    weights = torch.ones(VOCAB_SIZE)
    weights[END_ID] = end_weight
    return nn.functional.cross_entropy(logits.float(), batch.input_ids[:, 1:][predicted], weights)


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def _schedule(done: float, recipe: Recipe) -> float:
    """Warm up, stay, then fall to nearly nothing."""
    return max(0.01, min(1.0, done / recipe.warmup, (recipe.whole - done) / recipe.decay))


ATTENTION = "baton_tiny_blocks"
ATTENTION_BLOCK = 64


def _block_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention by plain matrix products in bf16, a block of queries at a time and only over what it sees.

    On a CPU this takes a fifth to a half of the time of the fused kernel, whose backward is slow.
    """
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    query = (query * scaling).to(torch.bfloat16)
    key = key.to(torch.bfloat16).reshape(rows * groups, length, width).transpose(-1, -2)
    value = value.to(torch.bfloat16).reshape(rows * groups, length, width)
    blocks = []
    with torch.autocast("cpu", enabled=False):      # it would take the softmax to fp32 and back
        for start in range(0, length, ATTENTION_BLOCK):
            end = min(start + ATTENTION_BLOCK, length)
            block = query[:, :, start:end].reshape(rows * groups, heads // groups * (end - start), width)
            scores = (block @ key[..., :end]).add_(_future(start, end, heads // groups))
            blocks.append((scores.softmax(-1) @ value[:, :end]).view(rows, heads, end - start, width))
    return torch.cat(blocks, 2).transpose(1, 2), None


@cache
def _future(start: int, end: int, heads: int) -> Tensor:
    return torch.full((end - start, end), -math.inf, dtype=torch.bfloat16).triu(start + 1).repeat(heads, 1)


AttentionInterface.register(ATTENTION, _block_attention)


def write_folder(model: LlamaForCausalLM, folder: Path) -> None:
    """The weights in bf16, the configuration, the tokenizer and its template."""
    write_tokenizer(folder)
    shipped = deepcopy(model).bfloat16()
    shipped.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=True,
                                                 temperature=TEMPERATURE)
    shipped.save_pretrained(folder)


if __name__ == "__main__":
    main()
