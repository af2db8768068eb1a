"""Drafts: what followed the same tokens before, fewer after a miss, and never a change of the answer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.worker.engine.driver import alone, greedy, run, seeded, token_ids
from tests.worker.families import VOCAB_SIZE, save
from worker.engine.draft import MAX_PAUSE_STEPS, Drafter
from worker.engine.engine import Engine, Output, Request
from worker.engine.sampler import Logprobs
from worker.model.loading import load
from worker.model.model import Model


def propose(drafter: Drafter, prompt: tuple[int, ...], drawn: list[int], most: int) -> list[int]:
    return drafter.propose(prompt, drawn, most) if drafter.search(prompt, drawn) else []


def test_what_followed_last_time_is_drafted() -> None:
    drafter = Drafter(max_tokens=8)
    prompt = (1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 9)
    assert propose(drafter, prompt, [0], 8) == []
    assert propose(drafter, prompt, [0, 1, 2, 3], 8) == [7, 8], "where it stood last"
    drafter.learn(2, 2)
    assert propose(drafter, prompt, [0, 1, 2, 3, 7, 8, 9], 8) == [0, 1, 2, 3], "twice as many when all were right"
    assert propose(drafter, prompt, [0, 1, 2, 3, 7, 8, 9], 1) == [0]


def test_what_repeats_is_taken_to_repeat_again() -> None:
    drafter = Drafter(max_tokens=8)
    drafter.learn(8, 8)
    assert propose(drafter, (5, 1, 2), [1, 2, 1, 2], 8) == [1, 2, 1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_a_prompt_may_be_shorter_than_an_ngram(num_tokens: int) -> None:
    drafter, drawn = Drafter(max_tokens=8), [4, 5, 6, 7, 4, 5, 6]
    for end in range(len(drawn)):
        assert propose(drafter, (1, 2, 3)[:num_tokens], drawn[:end], 8) == []
    assert propose(drafter, (1, 2, 3)[:num_tokens], drawn, 8) == [7, 4]


def test_a_miss_makes_it_pause_ever_longer_and_a_hit_ends_that() -> None:
    drafter, prompt, drawn = Drafter(max_tokens=8), (1, 1, 1, 1), [1]
    pauses = []
    for _ in range(9):
        drafter.learn(2, 0)
        num_steps = 0
        while not propose(drafter, prompt, drawn, 8):
            num_steps += 1
        pauses.append(num_steps)
    assert pauses == [1, 4, 16, 64, 64, 64, 64, 64, 64]
    assert pauses[-1] == MAX_PAUSE_STEPS
    assert propose(drafter, prompt, drawn, 8) == [1], "and draft one token at first"
    drafter.learn(1, 1)
    drafter.learn(2, 0)
    assert propose(drafter, prompt, drawn, 8) == []
    assert propose(drafter, prompt, drawn, 8) == [1]


@pytest.fixture(scope="module", params=[("llama", "float32"), ("mixtral", "bfloat16"), ("gemma2", "bfloat16")],
                ids="-".join)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """One that drafts, and one that does not."""
    family, dtype = request.param
    folder: Path = save(family, tmp_path_factory.mktemp("m"))
    drafting, plain = (Engine(load(str(folder), dtype=dtype), max_num_seqs=12, prefill_chunk=32,
                              num_speculative_tokens=number) for number in (8, 0))
    return drafting, plain


def repeating(seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    words = [[draw.randrange(2, VOCAB_SIZE) for _ in range(5)] for _ in range(3)]
    return tuple(token_id for _ in range(6) for token_id in draw.choice(words))


REQUESTS = [
    *(Request(f"greedy{i}", repeating(i), greedy(90 + i, num_logprobs=2)) for i in range(3)),
    Request("sampled", repeating(3), seeded(90, temperature=0.4, num_logprobs=1)),
    Request("truncated", repeating(4), seeded(80, top_k=3, top_p=0.9, temperature=0.5), n=2),
    Request("late", repeating(5), greedy(70, min_tokens=60, stop_token_ids=tuple(range(2, VOCAB_SIZE, 3)))),
    Request("penalized", repeating(6), greedy(60, frequency_penalty=0.2)),
    Request("biased", repeating(7), seeded(60, temperature=0.3, logit_bias=((7, 4.0),))),
    Request("one word", repeating(8), greedy(70, logit_bias=((7, 99.0),), num_logprobs=1)),
    Request("two words", repeating(9), seeded(70, logit_bias=((7, 99.0), (8, 99.0)))),      # drafts are often wrong
]


def flat(outputs: list[Output]) -> tuple[list[int], list[Logprobs], str | None]:
    return token_ids(outputs), [entry for output in outputs for entry in output.logprobs], outputs[-1].finish_reason


def test_an_answer_with_drafts_is_the_answer_without(engines: tuple[Engine, Engine]) -> None:
    """Together, joining midway, and each alone: the same tokens and log probabilities to the bit, in fewer steps."""
    drafting, plain = engines
    arrivals = {0: REQUESTS[:3], 7: REQUESTS[3:6], 20: REQUESTS[6:]}
    with_drafts, without = run(drafting, arrivals), run(plain, arrivals)
    assert {key: flat(outputs) for key, outputs in with_drafts.items()} == {
        key: flat(outputs) for key, outputs in without.items()}
    for request in REQUESTS:
        assert alone(drafting, request) == alone(plain, request)
    assert drafting.num_draft_tokens > drafting.num_accepted_tokens > 40
    assert plain.num_draft_tokens == 0


def test_who_does_not_want_drafts_gets_tokens_one_by_one(engines: tuple[Engine, Engine]) -> None:
    drafting, _ = engines
    for speculative in (False, True):
        sampling = greedy(20, logit_bias=((7, 99.0),), speculative=speculative)
        outputs = run(drafting, {0: [Request("it", repeating(0), sampling)]})["it", 0]
        assert any(len(output.token_ids) > 1 for output in outputs) is speculative


def test_drafts_never_make_a_forward_of_their_own(engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    """They fill up one that is computed anyway, and where there are two already nobody drafts."""
    drafting, _ = engines
    num_rows: list[int] = []
    decode = Model.decode

    def noting(self: Model, token_ids: list[int], *rest: Any) -> Any:
        num_rows.append(len(token_ids))
        return decode(self, token_ids, *rest)

    monkeypatch.setattr(Model, "decode", noting)
    monkeypatch.setattr(drafting, "max_rows", 6)
    num_forwards = []
    for speculative in (False, True):
        num_rows.clear()
        sampling = greedy(40, logit_bias=((7, 99.0),), speculative=speculative)
        run(drafting, {0: [Request(str(i), repeating(i), sampling) for i in range(7)]})
        assert max(num_rows) == 6
        num_forwards.append(len(num_rows))
    assert num_forwards[1] <= num_forwards[0]
    num_rows.clear()
    run(drafting, {0: [Request(str(i), repeating(i), sampling) for i in range(3)]})
    assert len(num_rows) < 39 and max(num_rows) == 6
