"""Ask a model held-out questions, greedily and in batches, straight from its weights.

    python -m worker.tiny.evaluate [FOLDER] [--count 200]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from worker.tiny import MODEL_FOLDER
from worker.tiny.chat import END_ID, PAD_ID, decode, encode
from worker.tiny.question import Question
from worker.tiny.skills import SKILLS, held_out

BATCH_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--count", type=int, default=200, help="questions per skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--misses", type=int, default=2, help="wrong answers shown per skill")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    print(f"{'skill':<14} {'right':>6} of {options.count}")
    for skill in SKILLS:
        questions = held_out(skill, options.count, options.seed)
        texts = answers(model, questions)
        wrong = [(question, text) for question, text in zip(questions, texts, strict=True) if not question.check(text)]
        print(f"{skill:<14} {1 - len(wrong) / len(questions):>6.1%}", flush=True)
        for question, text in wrong[: options.misses]:
            print(f"    asked {question.messages[-1]['content']!r}\n    wants {question.answer!r}\n    says  {text!r}")


def accuracy(model: LlamaForCausalLM, questions: Sequence[Question]) -> float:
    texts = answers(model, questions)
    return sum(question.check(text) for question, text in zip(questions, texts, strict=True)) / len(questions)


def answers(model: LlamaForCausalLM, questions: Sequence[Question]) -> list[str]:
    """Questions of like length share a batch; the texts come back in the order of the questions."""
    prompts = [encode(question.messages, question.tools, add_generation_prompt=True) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (questions[i].max_tokens, len(prompts[i])))
    texts = [""] * len(questions)
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        rows = _generate(model, [prompts[i] for i in batch], max(questions[i].max_tokens for i in batch))
        for i, row in zip(batch, rows, strict=True):
            texts[i] = decode(row[: questions[i].max_tokens])
    return texts


@torch.inference_mode()
def _generate(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    # Padded on the left, where the mask hides it, so that every row ends where its answer begins.
    input_ids = torch.tensor([[PAD_ID] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    output = model.generate(input_ids, attention_mask=input_ids != PAD_ID, max_new_tokens=max_tokens, do_sample=False,
                            eos_token_id=END_ID, pad_token_id=PAD_ID)
    rows: list[list[int]] = output[:, longest:].tolist()
    return [row[: row.index(END_ID)] if END_ID in row else row for row in rows]


if __name__ == "__main__":
    main()
