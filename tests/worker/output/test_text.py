"""Text that is shown bit by bit is the text that all tokens make, and no half of anything is ever shown."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from shared.byte_level import BYTE_OF_CHARACTER
from worker.output.text import TextStream

BYTES = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CORPUS = ["the cat sat on the mat", "naïve café 🙂 日本語 🙃", "END of the END", "{\"a\": [1, 2]}"] * 4


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return with_added(tokenizer)


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral have it: pieces with '▁', and <0x..> for what the vocabulary lacks."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", *fallback, *"▁abcdefghijklmnoprstuvwxyzEND", "▁the", "▁c", "at"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "t"), ("▁", "c")],
                                     unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return with_added(tokenizer)


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdehmnoprstEND"),
                                          ("▁the", -1.0), ("at", -1.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return with_added(tokenizer)


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, metaspace)}


def whole(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def shown(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.feed([token_id]) for token_id in ids), stream.finish()]


texts = st.text(alphabet="abc the ENDé🙂日\n\"{", max_size=40)
kinds = st.sampled_from(sorted(TOKENIZERS))


@given(kind=kinds, text=texts)
def test_the_pieces_make_the_whole(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text).ids
    assert "".join(shown(TextStream(tokenizer), ids)) == whole(tokenizer, ids)


@given(ids=st.lists(st.integers(0, TOKENIZERS["byte_level"].get_vocab_size() - 1), max_size=40))
def test_any_tokens_at_all_make_the_text_of_decode(ids: list[int]) -> None:
    """Broken UTF-8 in the middle and at the end, special and added tokens."""
    tokenizer = TOKENIZERS["byte_level"]
    assert "".join(shown(TextStream(tokenizer), ids)) == whole(tokenizer, ids)


@given(kind=kinds, ids=st.lists(st.integers(0, 400), max_size=30), cuts=st.sets(st.integers(0, 30)),
       min_tokens=st.integers(0, 30))
def test_the_text_does_not_depend_on_how_the_tokens_came(kind: str, ids: list[int], cuts: set[int], min_tokens: int
                                                         ) -> None:
    """Fed one by one, or as a log has gathered them: what is shown after the same tokens is the same."""
    tokenizer = TOKENIZERS[kind]
    ids = [token_id % tokenizer.get_vocab_size() for token_id in ids]
    one_by_one, gathered = (TextStream(tokenizer, ("END",), min_tokens=min_tokens) for _ in range(2))
    left, right, begin = "", "", 0
    for end in sorted({*(cut for cut in cuts if cut < len(ids)), len(ids)}):
        left += "".join(one_by_one.feed([token_id]) for token_id in ids[begin:end])
        right += gathered.feed(ids[begin:end])
        assert left == right
        begin = end
    assert one_by_one.finish() == gathered.finish()
    assert one_by_one.stopped == gathered.stopped


@given(text=st.text(alphabet="aé🙂日", min_size=1, max_size=12), kind=st.sampled_from(["byte_level", "byte_fallback"]))
def test_no_character_is_ever_split(text: str, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert not any(REPLACEMENT in piece for piece in shown(TextStream(tokenizer), tokenizer.encode(text).ids))


@given(text=st.text(alphabet="ENDx ", max_size=24), stop=st.lists(
    st.sampled_from(["END", "EN", "ND ", "x", "NDEN", "DD", " E"]), min_size=1, max_size=3, unique=True),
       min_tokens=st.just(0) | st.integers(1, 12))
@settings(max_examples=400)
def test_a_stop_string_ends_the_text_before_it_and_nothing_of_it_is_shown(text: str, stop: list[str], min_tokens: int
                                                                          ) -> None:
    """Against a search that reads the whole text: the string that is complete first wins, of several the longest; but
    none that is complete with the first `min_tokens`."""
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer, tuple(stop), min_tokens=min_tokens)
    ids = tokenizer.encode(text).ids
    end, begin = expected_stop(text, stop, len(whole(tokenizer, ids[:min_tokens])))
    pieces = shown(stream, ids)
    assert "".join(pieces) == text[:begin]
    assert stream.stop == text[begin:end]


def expected_stop(text: str, stop: list[str], num_early: int) -> tuple[int, int]:
    """Where it ends, and where it begins: where the text ends if there is none."""
    for end in range(num_early + 1, len(text) + 1):
        found = [each for each in stop if text[:end].endswith(each)]
        if found:
            return end, end - max(map(len, found))
    return len(text), len(text)


def test_a_stop_string_at_the_very_start_leaves_nothing() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer, ("the",))
    assert "".join(shown(stream, tokenizer.encode("the cat").ids)) == ""
    assert stream.stopped


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_special_tokens_are_hidden_and_added_ones_are_shown(make: Callable[[], Tokenizer]) -> None:
    tokenizer = TOKENIZERS[make.__name__]
    ids = [token_id for text in ("<tool_call>", "<|end|>") if (token_id := tokenizer.token_to_id(text)) is not None]
    assert len(ids) == 2
    assert "".join(shown(TextStream(tokenizer), ids)).strip() == "<tool_call>"


@given(kind=kinds, before=texts, behind=texts)
def test_a_special_token_may_be_shown_where_it_came(kind: str, before: str, behind: str) -> None:
    """The text about it is what it is without."""
    tokenizer = TOKENIZERS[kind]
    end = tokenizer.get_vocab()["<|end|>"]
    first, second = tokenizer.encode(before).ids, tokenizer.encode(behind).ids
    stream = TextStream(tokenizer, shown=(end,))
    said = stream.feed(first) + stream.feed([end]) + stream.feed(second) + stream.finish()
    left, mark, right = said.partition("<|end|>")
    assert mark and left + right == whole(tokenizer, first + second)
    assert left == whole(tokenizer, first)


@pytest.mark.parametrize(("make", "half"), [(byte_level, "é"), (byte_fallback, "🙂")])
def test_half_a_character_before_a_shown_token_is_shown_before_it(make: Callable[[], Tokenizer], half: str) -> None:
    """And what comes behind it is no half of the same."""
    tokenizer = TOKENIZERS[make.__name__]
    end, (begin, *_, last) = tokenizer.get_vocab()["<|end|>"], _byte_ids(tokenizer, half)
    assert "".join(shown(TextStream(tokenizer, shown=(end,)), [begin, end, last])) == "\ufffd<|end|>\ufffd"


def _byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary.get(f"<0x{byte:02X}>") or vocabulary[BYTES[byte]] for byte in text.encode()]
