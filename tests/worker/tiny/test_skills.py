"""What baton-tiny is trained on and asked: disjoint by construction, and each check tells right from wrong.

How often the model answers right is asked elsewhere; nothing here runs it.
"""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from worker.tiny import MODEL_FOLDER
from worker.tiny.chat import END_ID, decode, encode, is_answer, render
from worker.tiny.conversations import conversation
from worker.tiny.question import assistant
from worker.tiny.skills import SKILLS, TABLE, held_out
from worker.tiny.words import Draw, split_of

WEIGHTS = dict.fromkeys(SKILLS, 1.0)

CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "a question": ([{"role": "user", "content": "Count from 1 to 40."}], None),
    "a developer turn, text in parts": (
        [{"role": "developer", "content": "Be brief."},
         {"role": "user", "content": [{"type": "text", "text": "Hé"}, {"type": "text", "text": "llo"}]}], None),
    "tools without a system turn": ([{"role": "user", "content": "Hi"}], held_out("tool_call", 1)[0].tools),
    "tools with a system turn": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        held_out("tool_call", 1)[0].tools),
    "calls and results": (
        [{"role": "user", "content": "Weather in Rome and Köln?"},
         {"role": "assistant", "content": None, "tool_calls": [
             {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}},
             {"id": "b", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}]},
         {"role": "tool", "tool_call_id": "a", "content": "sunny"},
         {"role": "tool", "tool_call_id": "b", "content": "rainy"},
         {"role": "assistant", "content": "Sunny, and rainy."}],
        held_out("tool_call", 1)[0].tools),
}


@pytest.mark.parametrize("skill", SKILLS)
def test_training_never_sees_a_held_out_word_name_number_or_phrasing(skill: str) -> None:
    """Everything that either side draws is recorded; the two records share nothing."""
    trained = _drawn("train", skill, count=1500)
    validated = _drawn("validation", skill, count=300)
    asked = _drawn("test", skill, count=300)
    assert asked
    assert not asked & (trained | validated)
    assert not validated & trained


def test_no_question_is_put_together_around_the_split() -> None:
    """Over all skills at once: a word of one skill is not a name of another's held-out questions."""
    draw = Draw("train", "all skills")
    draw.drawn = set()
    for _ in range(2000):
        conversation(draw, WEIGHTS, longest_bytes=240)
    assert {split_of(text) for text in draw.drawn} == {"train"}
    assert {split_of(text) for skill in SKILLS for text in _drawn("test", skill, count=200)} == {"test"}


@pytest.mark.parametrize("skill", SKILLS)
def test_a_check_accepts_its_reference_and_nothing_else(skill: str) -> None:
    """Also not the answer cut short, with more behind it, or of another question."""
    questions = held_out(skill, 200)
    assert len({json.dumps([question.messages, question.tools]) for question in questions}) > 100
    for question, other in pairwise(questions):
        assert question.check(question.answer)
        assert question.check(f" {question.answer}\n")
        assert not question.check("")
        assert not question.check(question.answer[:-1])
        assert not question.check(question.answer + " x")
        assert question.check(other.answer) == (other.answer == question.answer)
        assert len(question.answer.encode()) < question.max_tokens


def test_held_out_questions_are_the_same_for_the_same_seed() -> None:
    assert [q.messages for q in held_out("recall", 20)] == [q.messages for q in held_out("recall", 20)]
    assert [q.messages for q in held_out("recall", 20)] != [q.messages for q in held_out("recall", 20, seed=1)]


def test_counting_to_forty_fits_256_tokens() -> None:
    assert len(encode([assistant(", ".join(map(str, range(1, 41))))])) < 256


@given(st.text())
@settings(max_examples=200)
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    """Through the shipped file; also text of several planes, controls and broken emoji."""
    tokenizer = _shipped()
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text


def test_every_byte_is_one_token() -> None:
    """Digits and letters among them, each by its own number."""
    tokenizer = _shipped()
    for character in map(chr, range(128)):
        assert tokenizer.encode(character, add_special_tokens=False).ids == [ord(character)]
    assert tokenizer.encode("é漢", add_special_tokens=False).ids == list("é漢".encode())


def test_tool_marks_show_in_the_text_and_chat_marks_do_not() -> None:
    tokenizer = _shipped()
    token_ids = tokenizer.encode("<tool_call>x</tool_call><|im_end|>", add_special_tokens=False).ids
    assert len(token_ids) == 4
    assert tokenizer.decode(token_ids) == "<tool_call>x</tool_call>"


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_template_says_the_same_in_transformers_and_in_plain_jinja(chat: str, add_generation_prompt: bool) -> None:
    messages, tools = CHATS[chat]
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    theirs = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
                                           add_generation_prompt=add_generation_prompt)
    assert _plain_jinja(messages, tools, add_generation_prompt) == theirs
    assert render(messages, tools, add_generation_prompt) == theirs


def test_the_template_hides_nothing() -> None:
    """Without tools it says the chat and no more: no system turn of its own."""
    said = render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert said == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("skill", SKILLS)
def test_the_loss_is_on_answers_and_their_ends_only(skill: str) -> None:
    question = held_out(skill, 1)[0]
    messages = [*question.messages, assistant(question.answer)]
    token_ids = encode(messages, question.tools)
    learnt = [token_id for token_id, answer in zip(token_ids, is_answer(token_ids), strict=True) if answer]
    spoken = [message for message in messages if message["role"] == "assistant"]
    answers = [encode([message])[len(b"assistant\n") + 1 : -1] for message in spoken]
    assert learnt == [token_id for answer in answers for token_id in answer]
    assert learnt[-1] == END_ID
    assert decode(answers[-1]) == question.answer


def test_the_shipped_model_is_as_small_as_promised() -> None:
    """1 to 4 million parameters, and at most 10 MB for the whole folder."""
    assert sum(file.stat().st_size for file in MODEL_FOLDER.iterdir()) <= 10_000_000
    with safe_open(MODEL_FOLDER / "model.safetensors", framework="numpy") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - no mapping
    assert 1_000_000 <= sum(map(math.prod, shapes)) <= 4_000_000


def test_the_shipped_files_agree_with_each_other() -> None:
    config = AutoConfig.from_pretrained(MODEL_FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.vocab_size == len(tokenizer) == _shipped().get_vocab_size()
    assert config.eos_token_id == tokenizer.eos_token_id == END_ID
    assert config.max_position_embeddings == tokenizer.model_max_length == 2048


def _drawn(split: Any, skill: str, count: int) -> set[str]:
    draw = Draw(split, skill)
    draw.drawn = set()
    for _ in range(count):
        TABLE[skill](draw)
    return draw.drawn


def _shipped() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))


def _plain_jinja(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
) -> str:
    """As a process without transformers renders the shipped file."""
    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((MODEL_FOLDER / "chat_template.jinja").read_text())
    return template.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
