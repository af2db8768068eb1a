"""Answers are what they must be, whatever the weights: random ones, which say anything."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig

from shared.grammar import MAX_FORCED_BYTES, TRIAL_STEPS, Grammars, of_choice, of_grammar, of_regex, of_schema
from shared.job import Sampling
from shared.tokenizer import Tokenizer as ChatTokenizer
from tests.worker.engine.driver import run, token_ids
from tests.worker.families import SMALL
from worker import tiny
from worker.announce import make_card
from worker.constraint import MIN_WARY_TOKENS, GrammarConstraint, Trust
from worker.engine.engine import MAX_FORCED_TOKENS, Engine, Request
from worker.engine.request import NO_WAY_ON
from worker.engine.sampler import Draws, Row, Sampler
from worker.model import cpu
from worker.model.attention import PAGE_LEN
from worker.model.loading import load
from worker.tiny.skills import held_out

TOKENIZER = Tokenizer.from_file(str(Path(tiny.MODEL_FOLDER) / "tokenizer.json"))
EOS = 256
GRAMMARS = Grammars(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), [EOS])
PROMPT = tuple(TOKENIZER.encode("Say something.", add_special_tokens=False).ids)
SCHEMA: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["name", "tags"],
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
                   "tags": {"type": "array", "items": {"enum": ["red", "green", None]}, "maxItems": 3}}}
REGEX = r"[a-f]{2,8}(-[0-9]{2}){1,3}"
KINDS: dict[str, tuple[str, Callable[[str], object]]] = {
    "schema": (of_schema(SCHEMA), lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
    "regex": (of_regex(REGEX), lambda text: _require(re.fullmatch(REGEX, text))),
    "choice": (of_choice(["yes", "no", "per\"haps\n"]), lambda text: _require(text in ("yes", "no", "per\"haps\n"))),
    "grammar": (of_grammar('start: "(" start ")" | "x"'), lambda text: _require(
        re.fullmatch(r"\(*x\)*", text) and text.count("(") == text.count(")"))),
}
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.8}, {"top_k": 5, "num_logprobs": 2},
    {"temperature": 1.5, "presence_penalty": 2.0, "frequency_penalty": 1.0, "repetition_penalty": 1.4},
    {"ignore_eos": True}, {"min_tokens": 60}, {"logit_bias": ((EOS, 100.0),)}, {"logit_bias": ((EOS, -100.0),)}]


def _require(value: object) -> None:
    assert value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("random")
    torch.manual_seed(7)
    module = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {
        "vocab_size": TOKENIZER.get_vocab_size(), "eos_token_id": EOS, "max_position_embeddings": 1024}))
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    module.save_pretrained(folder)
    return folder


ON_A_GPU = pytest.param({"device": "cuda", "kv_cache_bytes": 1 << 22}, id="on a GPU", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))


def make_engine(folder: Path, device: Literal["cpu", "cuda"] = "cpu", **options: Any) -> Engine:
    return Engine(load(str(folder), dtype="float32", device=device),
                  **{"max_num_seqs": 8, "prefill_chunk": 16} | options)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return make_engine(folder)


def request(name: str, grammar: str, n: int = 1, continued: Sequence[int] = (), **sampling: Any) -> Request:
    constraints = tuple(GrammarConstraint.of(GRAMMARS, grammar, list(continued)) for _ in range(n)) if grammar else ()
    return Request(name, PROMPT, Sampling(**{"max_tokens": 90, "seed": 3} | sampling), n,
                   (tuple(continued),) if continued else (), constraints=constraints)


def text_of(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_what_it_must_be(kind: str, engine: Engine) -> None:
    """Sampled in every way, two choices each, beside each other and beside one that may say anything."""
    grammar, judge = KINDS[kind]
    requests = [request(str(number), grammar, 2, **sampling) for number, sampling in enumerate(SAMPLINGS)]
    free = request("free", "", max_tokens=40, temperature=0.0, ignore_eos=True)
    alone = token_ids(run(engine, {0: [free]})["free", 0])
    found = run(engine, {0: [*requests[:2], free], 3: requests[2:]})
    assert token_ids(found.pop(("free", 0))) == alone
    ended = [outputs for outputs in found.values() if outputs[-1].finish_reason == "stop"]
    assert len(ended) > len(found) / 2                  # brackets may open until there is no more room
    for outputs in ended:
        judge(text_of(token_ids(outputs)))
    if kind == "choice":
        assert len(ended) == len(found) and len({text_of(token_ids(outputs)) for outputs in ended}) > 1


def test_an_answer_that_can_only_end_ends_at_once(engine: Engine) -> None:
    """Without a token that says so."""
    outputs = run(engine, {0: [request("one", of_choice(["yes"]))]})["one", 0]
    assert (text_of(token_ids(outputs)), outputs[-1].finish_reason) == ("yes", "stop")
    assert EOS not in token_ids(outputs)


def test_it_goes_on_where_another_worker_has_left(engine: Engine) -> None:
    """From every token on, to the same end, and an answer that lacks only its end has it."""
    whole = token_ids(run(engine, {0: [request("whole", KINDS["schema"][0], max_tokens=200)]})["whole", 0])
    for num_logged in range(1, len(whole) + 1):
        logged = whole[:num_logged]
        outputs = run(engine, {0: [request("heir", KINDS["schema"][0], continued=logged, max_tokens=200)]})["heir", 0]
        assert logged + token_ids(outputs) == whole and outputs[-1].finish_reason == "stop"


def batch() -> list[Request]:
    """Two of them longer than a page."""
    long = [request(name, of_regex("[ab]{280}"), max_tokens=290) for name in ("long", "longer")]
    return long + [request(f"{kind} {number}", KINDS[kind][0], **sampling) for kind in ("schema", "regex")
                   for number, sampling in enumerate(SAMPLINGS[:4])]


@pytest.mark.parametrize("options", [{"runs_ahead": True}, {"numerics": "fast"}, {"num_pages": 3}, ON_A_GPU], ids=str)
def test_however_it_is_computed(options: dict[str, Any], folder: Path, engine: Engine) -> None:
    """A step ahead, in shared forwards, and short of memory, where the younger one gives way and replays."""
    num_pages = options.get("num_pages")
    if num_pages:
        options = {"kv_cache_bytes": num_pages * PAGE_LEN * engine.model.kv_bytes_per_token, "max_model_len": 512}
    other = make_engine(folder, **options)
    expected, found = ({key: token_ids(outputs) for key, outputs in run(each, {0: batch()}).items()}
                       for each in (engine, other))
    assert found == expected
    assert (other.num_preempted > 0) == (num_pages is not None)


def test_a_form_begins_behind_a_token_and_no_answer_ends_before(engine: Engine) -> None:
    """What is thought may be anything; a worker that takes over in the middle of it thinks on."""
    after, choice = 264, of_choice(["yes", "no"])            # </think>

    def think(name: str, seed: int, continued: Sequence[int] = (), bias: float = 5.0) -> tuple[list[int], str | None]:
        constraint = GrammarConstraint.of(GRAMMARS, choice, continued, after)
        sampling = Sampling(max_tokens=60, temperature=1.5, seed=seed, logit_bias=((after, bias), (EOS, 50.0)))
        outputs = run(engine, {0: [Request(name, PROMPT, sampling, continued=(tuple(continued),) if continued else (),
                                           constraints=(constraint,))]})[name, 0]
        return [*continued, *token_ids(outputs)], outputs[-1].finish_reason

    answers = [think("whole", seed) for seed in range(12)]
    assert all(EOS not in thought for thought, _ in answers)
    ended = [(seed, thought) for seed, (thought, reason) in enumerate(answers) if reason == "stop"]
    seed, thought = max(ended, key=lambda each: len(each[1]))
    place = thought.index(after)
    assert place > 0 and text_of(thought[place + 1:]) in ("yes", "no")
    for num_logged in (1, place, place + 1):
        assert think("heir", seed, thought[:num_logged]) == (thought, "stop")
    assert think("never", seed, bias=-100.0)[1] == "length"


class Told(GrammarConstraint):
    """Counts its masks."""

    num_asked = 0

    @staticmethod
    def prepare(constraints: Sequence[Any]) -> None:
        for constraint in constraints:
            constraint.num_asked += constraint._bits is None
        GrammarConstraint.prepare(constraints)


class Wary(Told):
    is_trusted = False


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.0}, {"num_logprobs": 2}, {"top_p": 0.9}],
                         ids=str)
@pytest.mark.parametrize("regex", [r"[^5]{70}", r"(?s).{70}", r"[^a-m]{70}", r"[ab]{70}"])
def test_who_draws_first_and_asks_afterwards_says_the_same(regex: str, sampling: dict[str, Any], engine: Engine
                                                           ) -> None:
    """And asks hardly oftener than there are tokens, whatever the weights."""
    numbers = range(4)
    grammar = of_regex(regex)
    asked: dict[type[Told], int] = {}
    answers: dict[type[Told], object] = {}
    for kind in (Told, Wary):
        told = [kind.of(GRAMMARS, grammar, []) for _ in numbers]
        found = run(engine, {0: [Request(str(i), PROMPT, Sampling(**{"max_tokens": 60, "seed": i} | sampling),
                                         constraints=(told[i],)) for i in numbers]})
        answers[kind] = {key: (token_ids(outputs), [each for output in outputs for each in output.logprobs],
                               outputs[-1].finish_reason) for key, outputs in found.items()}
        asked[kind] = sum(each.num_asked for each in told)
        num_tokens = sum(len(token_ids(outputs)) for outputs in found.values())
    assert answers[Told] == answers[Wary]
    assert asked[Wary] == num_tokens
    assert asked[Told] == num_tokens if "top_p" in sampling else asked[Told] <= num_tokens


FORCED = of_schema({"type": "object", "additionalProperties": False, "required": ["available", "refundable"],
                    "properties": {"available": {"type": "boolean"}, "refundable": {"enum": ["never", "always"]}}})


@pytest.mark.parametrize("options", [{}, {"runs_ahead": True}, {"num_speculative_tokens": 0}, {"numerics": "fast"},
                                     ON_A_GPU], ids=str)
def test_what_must_follow_takes_no_step(options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it change what is said, also where log probabilities and penalties want every token drawn."""
    answers, num_steps = [], []
    for most in (0, MAX_FORCED_TOKENS):
        monkeypatch.setattr("worker.engine.engine.MAX_FORCED_TOKENS", most)
        other = make_engine(folder, **options)
        step, counted = other.step, count()
        monkeypatch.setattr(other, "step", lambda step=step, counted=counted: (next(counted), step())[1])
        found = run(other, {0: [request(str(i), FORCED, 2, **sampling) for i, sampling in enumerate(SAMPLINGS[:2])]})
        num_steps.append(next(counted))
        rest = run(other, {0: [request(str(i), FORCED, **sampling) for i, sampling in enumerate(SAMPLINGS[2:], 2)]})
        answers.append({key: ([output.logprobs for output in outputs] if key[0] == "3" else token_ids(outputs),
                              outputs[-1].finish_reason) for key, outputs in (found | rest).items()})
        assert found["0", 0] and all("refundable" in text_of(token_ids(outputs)) for outputs in found.values())
    assert answers[0] == answers[1]
    assert num_steps[1] < 0.6 * num_steps[0]


@pytest.mark.parametrize(("most", "num_pages"), [(MAX_FORCED_TOKENS, 64), (600, 64), (600, 7)])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_what_must_follow_has_pages_of_its_own(runs_ahead: bool, most: int, num_pages: int, folder: Path,
                                               engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one at once, and none of a neighbour's; where there are none, the youngest gives way."""
    literal = of_regex("[a-z]{3}" + "yes " * 140 + "[a-z ]{60}")
    crowd = [request(f"free {seed}", "", max_tokens=200, seed=seed, ignore_eos=True) for seed in range(2)]
    crowd += [request(f"formed {seed}", literal, max_tokens=700, seed=seed) for seed in range(2)]
    expected = {key: token_ids(outputs) for each in crowd for key, outputs in run(engine, {0: [each]}).items()}
    monkeypatch.setattr("worker.engine.engine.MAX_FORCED_TOKENS", most)
    other = make_engine(folder, runs_ahead=runs_ahead, max_model_len=1024,
                        kv_cache_bytes=num_pages * PAGE_LEN * engine.model.kv_bytes_per_token)
    crowd[2:] = [request(f"formed {seed}", literal, max_tokens=700, seed=seed) for seed in range(2)]
    found = {key: token_ids(outputs) for key, outputs in run(other, {0: crowd}).items()}
    assert found == expected
    assert (other.num_preempted > 0) == (num_pages == 7)


SPELLED = ["a<|im_end|>b", "<think>", "x <tool_call> y", "</think>9"]


@pytest.mark.parametrize("sampling", [{}, {"num_logprobs": 1}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("text", SPELLED)
def test_what_spells_a_special_token_is_text(text: str, sampling: dict[str, Any], engine: Engine) -> None:
    """Of which an answer may consist, whole."""
    for grammar in (of_choice([text]), of_schema({"const": text})):
        outputs = run(engine, {0: [request("spelled", grammar, **sampling)]})["spelled", 0]
        assert text_of(token_ids(outputs)) in (text, json.dumps(text)) and outputs[-1].finish_reason == "stop"


def test_who_gives_up_has_not_ended(engine: Engine) -> None:
    """A grammar that turns out to be too much behind what was looked at when it was compiled."""
    grammar = of_choice(["x" + "ab" * 90_000, "y"])
    found = [run(engine, {0: [request("much", grammar, max_tokens=3, seed=seed)]})["much", 0] for seed in range(9)]
    ends = {(text_of(token_ids(outputs)), outputs[-1].finish_reason) for outputs in found}
    assert ("y", "stop") in ends and len(ends) > 1
    assert {reason for text, reason in ends if text != "y"} == {NO_WAY_ON}


@pytest.mark.parametrize(("times", "end"), [((0.0, 0.003), "stop"), ((0.0, 0.03), NO_WAY_ON)])
def test_a_form_that_is_slow_at_most_tokens_is_given_up(times: tuple[float, ...], end: str, engine: Engine,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbour would wait for it at every step; for one that is slow now and then it does."""
    free = request("free", "", max_tokens=40, ignore_eos=True)
    alone = token_ids(run(engine, {0: [free]})["free", 0])
    note, took = GrammarConstraint._note, cycle(times)
    monkeypatch.setattr(GrammarConstraint, "_note", lambda self, _: note(self, next(took)))
    found = run(engine, {0: [request("slow", of_regex("[ab]{200}"), max_tokens=300), free]})
    assert found["slow", 0][-1].finish_reason == end
    assert len(token_ids(found["slow", 0])) > 10
    assert token_ids(found["free", 0]) == alone


def test_of_long_text_a_little_is_looked_at(engine: Engine) -> None:
    constraint = GrammarConstraint.of(GRAMMARS, of_schema({"const": "z" * 20_000}), [])
    for _ in range(9):
        assert 0 < len(constraint.forced) <= MAX_FORCED_BYTES
        assert constraint.accept(constraint.forced[0])


def test_no_answer_is_too_short_that_may_be_longer(engine: Engine) -> None:
    """Neither its end nor a token that stops it comes before; where only the end may follow, it comes."""
    stop = TOKENIZER.encode("a", add_special_tokens=False).ids[0]
    for regex, stops, least in (("[a-f]*", (), 30), ("[a-f]{60}", (stop,), 30), ("[ab]{5}", (), 5)):
        for seed in range(5):
            asked = request("long", of_regex(regex), min_tokens=30, seed=seed, stop_token_ids=stops)
            outputs = run(engine, {0: [asked]})["long", 0]
            assert len(text_of(token_ids(outputs))) >= least and outputs[-1].finish_reason == "stop"


def test_an_answer_ends_within_what_must_follow(engine: Engine) -> None:
    """At its last token, at a token that stops it, or behind as many as it may have."""
    grammar = of_choice(["x" + "yes " * 50])
    stops = TOKENIZER.encode("s", add_special_tokens=False).ids
    for sampling, length, reason in (({"max_tokens": 300}, 201, "stop"), ({"max_tokens": 45}, 45, "length"),
                                     ({"max_tokens": 90, "stop_token_ids": tuple(stops)}, 4, "stop")):
        outputs = run(engine, {0: [request("one", grammar, **sampling)]})["one", 0]
        ids = token_ids(outputs)
        assert (len(text_of(ids)), outputs[-1].finish_reason) == (length, reason)
        assert len(outputs) < len(ids)


def test_who_follows_by_itself_is_asked_at_its_end() -> None:
    """The built-in model counts, and nobody makes a mask before it ends. Where it must count otherwise, what it would
    say next will do; without kernels of ours that is not known, and a mask is made at the places where it would not."""
    engine = make_engine(Path(tiny.MODEL_FOLDER))
    tokenizer = ChatTokenizer(make_card(str(tiny.MODEL_FOLDER), engine))
    grammars = Grammars(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), sorted(engine.model.eos_token_ids))
    prompt = tuple(tokenizer.encode_chat([{"role": "user", "content": "Count from 1 to 40."}], []))

    def count(regex: str) -> tuple[str, Told]:
        told = Told.of(grammars, of_regex(regex), [])
        sampling = Sampling(max_tokens=200, temperature=0.0)
        outputs = run(engine, {0: [Request("count", prompt, sampling, constraints=(told,))]})["count", 0]
        return text_of(token_ids(outputs)), told

    whole, told = count("[0-9, ]{1,300}")
    assert whole.startswith("1, 2, 3, 4, 5") and whole.endswith("39, 40") and told.num_asked == 1
    without, told = count("[0-8, ]{1,300}")
    assert "9" not in without and "6, 7, 8" in without
    assert told.num_asked == 1 if cpu.computes(torch.float32) else 1 < told.num_asked < len(without) / 2


def test_who_follows_by_itself_drafts() -> None:
    """What it must be does not keep it from copying; it says the same without drafts."""
    schema, answers = of_schema({"type": "object"}), []
    for num_drafted in (8, 0):
        engine = make_engine(Path(tiny.MODEL_FOLDER), num_speculative_tokens=num_drafted)
        tokenizer = ChatTokenizer(make_card(str(tiny.MODEL_FOLDER), engine))
        grammars = Grammars(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), sorted(engine.model.eos_token_ids))
        requests = [Request(str(i), tuple(tokenizer.encode_chat(question.messages, question.tools)),
                            Sampling(max_tokens=120, temperature=0.0), constraints=(Told.of(grammars, schema, []),))
                    for i, question in enumerate(held_out("json_schema", 6))]
        found = {key: token_ids(outputs) for key, outputs in run(engine, {0: requests}).items()}
        answers.append(found)
        assert all(isinstance(json.loads(text_of(ids)), dict) for ids in found.values())
        assert bool(engine.num_accepted_tokens) == bool(num_drafted)
    assert answers[0] == answers[1]


@given(st.lists(st.booleans(), max_size=300))
def test_trust_is_lost_at_once_and_given_back(follows: list[bool]) -> None:
    """Whoever never follows is asked at nearly every token; who always does, never."""
    trust, num_free, num_lost = Trust(), 0, 0
    for is_right in follows:
        num_free += trust.is_given
        num_lost += trust.is_given and not is_right
        (trust.gain if is_right else trust.lose)()
        assert trust.is_given or num_lost
    assert num_free == len(follows) or not all(follows)
    if not any(follows):
        assert num_free <= 1 + len(follows) // (MIN_WARY_TOKENS + 1)


def test_who_finds_no_memory_to_draw_again_says_the_same(folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
                                                         ) -> None:
    """Nothing is taken before all is drawn; what was drawn and not read is drawn once more."""
    requests = [request(str(i), of_regex(r"[^5]{70}"), max_tokens=60, seed=i) for i in range(4)]
    expected = {key: token_ids(outputs) for key, outputs in run(engine, {0: requests}).items()}
    other, sample, num_failed = make_engine(folder), Sampler.sample, 0

    def starved(self: Sampler, logits: torch.Tensor, rows: Sequence[Row], **options: Any) -> Draws:
        nonlocal num_failed
        if num_failed < 2 and all(row.allowed is not None for row in rows):
            num_failed += 1
            raise MemoryError
        return sample(self, logits, rows, **options)

    monkeypatch.setattr(Sampler, "sample", starved)
    found = run(other, {0: [request(str(i), of_regex(r"[^5]{70}"), max_tokens=60, seed=i) for i in range(4)]})
    assert {key: token_ids(outputs) for key, outputs in found.items()} == expected
    assert (num_failed, other.num_preempted > 0) == (2, True)
    other.check()


MERGED = "positive negative neutral because name tags red green null true false 0123456789"


@pytest.fixture(scope="module")
def merging() -> Grammars:
    """A tokenizer of bytes and of longer tokens: many ways to write one text, of which masks want its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([json.dumps(MERGED.split())] * 9, trainer)
    assert tokenizer.get_vocab_size() > 300
    return Grammars(tokenizer.to_str(), tokenizer.get_vocab_size(), [0])


def is_accepted(constraint: GrammarConstraint, token_id: int) -> bool:
    """Without going on."""
    before = vars(constraint) | {"_matcher": constraint._matcher.deep_copy()}
    if is_accepted := constraint.accept(token_id):
        vars(constraint).update(before)
    return is_accepted


@pytest.mark.parametrize("grammar", [
    KINDS["schema"][0], of_regex("([^5]{5}positive){10}"), of_regex("(posit|negat)ive [0-9]{3,5}( because [a-z]+)?"),
    of_choice(["positive", "negative", "neutral", "posit"]), of_grammar('start: gen "!"\ngen[stop=""]: /[a-z]*/'),
    of_schema({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}})])
def test_what_may_follow_is_what_a_mask_names(grammar: str, merging: Grammars) -> None:
    """Of every token, at every place of answers that are drawn of what may follow."""
    for seed in range(3):
        draw = random.Random(seed)
        constraint, twin = (GrammarConstraint.of(merging, grammar, []) for _ in range(2))
        for _ in range(40):
            bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")[:merging.vocab_size]
            backwards = range(merging.vocab_size - 1, -1, -1)           # the end last: it has a mask made
            assert [is_accepted(twin, token_id) for token_id in backwards] == bits[::-1].astype(bool).tolist()
            token_id = draw.choice(np.flatnonzero(bits).tolist())
            assert constraint.accept(token_id)
            assert twin.accept(token_id)
            if constraint.is_complete or token_id == 0:
                break


class Stuck:
    """Its matcher gives up at the third token."""

    is_complete = is_trusted = False

    def __init__(self) -> None:
        self.forced: list[int] = []
        self.num_accepted = 0

    @staticmethod
    def prepare(constraints: Sequence[Any]) -> None:
        pass

    def allowed(self) -> npt.NDArray[np.int32]:
        return np.full(-(-TOKENIZER.get_vocab_size() // 32), -1, dtype=np.int32)

    def accept(self, token_id: int) -> bool:
        self.num_accepted += 1
        return self.num_accepted < 3


def test_what_must_follow_for_ever_is_not_looked_for() -> None:
    """Of a client's grammar: no trial comes to where this one has but one way on, and never an end."""
    grammar = of_grammar("start: /[0-9]{30}/ A B\nA: /a+/\nB: /a/")
    GRAMMARS.compile(grammar, TRIAL_STEPS)
    digits = TOKENIZER.encode("0123456789" * 3, add_special_tokens=False).ids
    constraint = GrammarConstraint.of(GRAMMARS, grammar, digits)
    for token_id in TOKENIZER.encode("a" * 20, add_special_tokens=False).ids:
        assert constraint.accept(token_id) and not constraint.forced


def test_who_cannot_go_on_fails_alone(engine: Engine) -> None:
    stuck = Request("stuck", PROMPT, Sampling(max_tokens=9, ignore_eos=True), constraints=(Stuck(),))
    found = run(engine, {0: [stuck, request("other", of_choice(["yes"]))]})
    assert [output.finish_reason for output in found["stuck", 0]] == [None, None, NO_WAY_ON]
    assert text_of(token_ids(found["other", 0])) == "yes"


@pytest.mark.parametrize("num_missing", [0, 1, 40])
def test_tokens_without_logits_take_no_room_in_a_mask(num_missing: int) -> None:
    vocab_size = TOKENIZER.get_vocab_size() - num_missing
    grammars = Grammars(TOKENIZER.to_str(), vocab_size, [EOS])
    for form in (of_choice(["yes", "no"]), of_regex("[a-z ]+")):
        few, all_ = (GrammarConstraint.of(each, form, ()).allowed() for each in (grammars, GRAMMARS))
        assert few.shape == (-(-vocab_size // 32),) and few.any()
        whole = vocab_size // 32
        assert (few[:whole] == all_[:whole]).all()
