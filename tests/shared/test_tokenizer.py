"""From messages to ids as transformers does it, save that what a user writes is never a special token."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from shared import tokenizer as module
from shared.card import Card
from shared.errors import BadRequest, TemplateRefused
from shared.tokenizer import Tokenizer
from tests.api.scripted import CHATML, byte_card, byte_tokenizer

START, END, THINK = "<|im_start|>", "<|im_end|>", "<think>"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "does f"}}]
TOOL_TEMPLATE = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML


def byte_level() -> FastTokenizer:
    """A token per byte, some merges, an added token that is not special."""
    fast = byte_tokenizer(START, END)
    fast.add_tokens([AddedToken(THINK, special=False, normalized=False)])
    return fast


def byte_fallback() -> FastTokenizer:
    """As Llama 2 and Gemma: pieces with '▁' for a space, and <0xNN> for what no piece covers."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for piece in ("▁", "a", "b", "s", "e", "r", "u", "▁a", "ä", "\n"):
        vocab[piece] = len(vocab)
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True,
                                    fuse_unk=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([START, END])
    return fast


KINDS = {"byte level": byte_level, "byte fallback": byte_fallback}


@functools.cache
def pair(kind: str, template: str = TOOL_TEMPLATE) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """Ours, and transformers' own, of one file."""
    fast = KINDS[kind]()
    card = replace(byte_card("m", template), tokenizer_json=fast.to_str(),
                   special_tokens={"bos_token": START, "eos_token": END})
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=START, eos_token=END)
    theirs.chat_template = template
    return Tokenizer(card), theirs


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def apply(theirs: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert isinstance(ids, list)
    return ids


def id_of(tokenizer: Tokenizer, content: str) -> int:
    token_id = tokenizer.fast.token_to_id(content)
    assert token_id is not None
    return token_id


def special(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """The added tokens among the ids, as text."""
    added = tokenizer.fast.get_added_tokens_decoder()
    return [added[i].content for i in ids if i in added]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=20))
@settings(max_examples=50)
def test_ids_are_those_of_apply_chat_template(kind: str, text: str) -> None:
    """Of every text in which no added token stands."""
    ours, theirs = pair(kind)
    assert ours.encode_chat(user(text)) == apply(theirs, user(text))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_with_tools_are_those_of_apply_chat_template(kind: str) -> None:
    ours, theirs = pair(kind)
    assert ours.encode_chat(user("a b"), TOOLS) == apply(theirs, user("a b"), TOOLS)


pieces = st.lists(st.sampled_from([START, END, THINK, "<|im_", "start|>", "<", "<|im_<|im_end|>start|>", "a", " ", "ä",
                                   "\ufdd0", "\ufdd1"]), max_size=8).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=pieces)
@settings(max_examples=80)
def test_no_user_text_becomes_a_special_token(kind: str, text: str) -> None:
    """Whatever he writes, in pieces, nested or doubled: the special ids are the template's, and the text is his."""
    ours, _ = pair(kind)
    ids = ours.encode_chat(user(text))
    assert special(ids, ours) == [START, END, START]
    first, end = ids.index(id_of(ours, START)), ids.index(id_of(ours, END))
    said = b"".join(map(ours.token_bytes, ids[first + 1:end]))
    assert said == f"user\n{text}".encode()


def test_special_tokens_in_tools_and_names_are_plain_text_too() -> None:
    """In values and in keys."""
    ours, _ = pair("byte level")
    tools = [{"type": "function", "function": {"name": END, "parameters": {START: [END]}}}]
    assert special(ours.encode_chat(user("a"), tools), ours) == [START, END, START]
    call = [{"id": END, "type": "function", "function": {"name": START, "arguments": {END: START}}}]
    template = "{{ messages | tojson }}" + START
    ours, _ = pair("byte level", template)
    assert special(ours.encode_chat([{"role": "assistant", "content": END, "tool_calls": call}]), ours) == [START]


def test_tools_choose_the_template_for_tools() -> None:
    card = replace(byte_card("m"), chat_templates={"default": "d", "tool_use": "t"})
    assert Tokenizer(card).encode_chat(user("a")) == [ord("d")]
    assert Tokenizer(card).encode_chat(user("a"), TOOLS) == [ord("t")]


def test_a_model_without_a_template_cannot_chat() -> None:
    with pytest.raises(BadRequest, match="no chat template"):
        Tokenizer(replace(byte_card("m"), chat_templates={})).encode_chat(user("a"))


def test_truncation_and_padding_in_the_file_are_not_obeyed() -> None:
    """Left there by whoever trained: a prompt is never cut in silence."""
    fast = byte_level()
    fast.enable_truncation(4)
    fast.enable_padding(length=99)
    ours = Tokenizer(replace(byte_card("m"), tokenizer_json=fast.to_str()))
    assert ours.encode_chat(user("a long text")) == pair("byte level", CHATML)[0].encode_chat(user("a long text"))


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=20))
def test_the_bytes_of_tokens_joined_are_the_text(kind: str, text: str) -> None:
    """Also where one character is several tokens."""
    ours, _ = pair(kind)
    ids = ours.fast.encode(text, add_special_tokens=False).ids
    assert b"".join(map(ours.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_have_bytes_and_unknown_ids_none(kind: str) -> None:
    ours, _ = pair(kind)
    assert ours.token_bytes(id_of(ours, START)) == START.encode()
    assert ours.token_bytes(10**6) == b""


@pytest.mark.parametrize("text", ["\ud800", f"\udfff{END}"])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(TemplateRefused, match="Unicode"):
        pair("byte level")[0].encode_chat(user(text))


def test_what_is_nested_without_end_is_refused() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for template in (CHATML, "{{ messages | tojson }}{{ tools | tojson }}"):
        with pytest.raises(TemplateRefused):
            pair("byte level", template)[0].encode_chat(user("a"), [{"x": deep}])


def test_text_that_holds_every_mark_of_ours_is_refused() -> None:
    """Marks are noncharacters, which no text is meant to hold; one that is free is enough."""
    ours, _ = pair("byte level")
    assert special(ours.encode_chat(user(END + "".join(module.CUTS[:-1]))), ours) == [START, END, START]
    with pytest.raises(TemplateRefused):
        ours.encode_chat(user(END + "".join(module.CUTS)))


def test_a_card_is_all_it_needs() -> None:
    """Packed by a worker, unpacked by a pod: the same ids."""
    card, packed = (ours := pair("byte fallback")[0]).card.pack()
    assert Tokenizer(Card.unpack(card, packed)).encode_chat(user("ab ä")) == ours.encode_chat(user("ab ä"))


def test_pretokenized_spaces_do_not_matter() -> None:
    """A tokenizer that splits words first reads the whole rendering, as transformers does."""
    fast = byte_level()
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ours = Tokenizer(replace(byte_card("m"), tokenizer_json=fast.to_str()))
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast)
    theirs.chat_template = CHATML
    assert ours.encode_chat(user("a b  c")) == apply(theirs, user("a b  c"))
