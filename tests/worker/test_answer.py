"""An answer in the making: what is logged, when, and that a log is enough to go on from."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shared.grammar import Grammars
from shared.job import Entry, Finish, Job, Sampling, Usage
from shared.queue import Claimed, Write
from worker import tiny
from worker.answer import Answer
from worker.engine.engine import Output

TOKENIZER = Tokenizer.from_file(str(Path(tiny.MODEL_FOLDER) / "tokenizer.json"))
GRAMMARS = Grammars(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), ())


def claim(n: int = 1, **sampling: Any) -> Claimed:
    job = Job(id="job", tenant="t", pod="p", prompt_token_ids=(1, 2, 3), sampling=Sampling(max_tokens=99, **sampling),
              tokenizer_id="", weights_id="", n=n)
    return Claimed(job, epoch=1, position=0, num_tokens=0, alone=False)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def draw(index: int, token_id: int, finish_reason: str | None = None) -> Output:
    return Output("job", index, (token_id,), (), finish_reason)


def entries(writes: list[Write]) -> list[Entry]:
    return [write.entry for write in writes]


def text_of(log: list[Entry], index: int = 0) -> str:
    return "".join(d.text for entry in log if entry.kind == "delta" for d in entry.deltas if d.index == index)


def test_the_terminal_follows_the_last_delta_with_the_usage() -> None:
    answer = Answer(claim(), TOKENIZER)
    for token_id in ids("Hi"):
        answer.take(draw(0, token_id))
    answer.take(draw(0, ids("!")[0], "length"))
    delta, end = entries(answer.flush(0.0))
    assert delta.deltas[0].text == "Hi!"
    assert delta.deltas[0].finish_reason == "length"
    assert (end.position, end.finish) == (2, Finish(Usage(3, 3)))
    assert 0 <= time.time() - end.finish.ended_s < 60


def test_who_begins_with_other_weights_than_the_job_names_says_so_once() -> None:
    """A pod may have to put the answer back, and knows of its worker nothing else."""
    for weights_id, expected in ((claim().job.weights_id, ["", ""]), ("others", ["others", ""])):
        answer, log = Answer(claim(), TOKENIZER, weights_id=weights_id), list[Entry]()
        for token_id in ids("ab"):
            answer.take(draw(0, token_id))
            log += entries(answer.flush(0.0))
        assert [entry.deltas[0].weights_id for entry in log] == expected
    continued = Answer(replace(claim(), position=2), TOKENIZER, log, weights_id="others")
    continued.take(draw(0, ids("c")[0]))
    assert entries(continued.flush(0.0))[0].deltas[0].weights_id == ""


def test_what_was_drawn_ahead_of_an_end_is_no_part_of_it() -> None:
    """A device computes the next step before the stop string is found in this one."""
    answer = Answer(claim(stop=("b",)), TOKENIZER)
    assert [answer.take(draw(0, token_id)) for token_id in ids("abc")] == [False, True, False]
    delta, end = entries(answer.flush(0.0))
    assert (text_of([delta]), len(delta.deltas[0].token_ids), end.finish) == ("a", 2, Finish(Usage(3, 2)))


def test_tokens_are_gathered_but_never_a_choices_first_or_last() -> None:
    answer = Answer(claim(), TOKENIZER)
    first, second, third = ids("abc")
    answer.take(draw(0, first))
    assert answer.is_due(0.0, flush_s=1.0)
    answer.flush(0.0)
    answer.take(draw(0, second))
    assert not answer.is_due(0.5, flush_s=1.0)
    assert answer.is_due(1.0, flush_s=1.0)
    answer.take(draw(0, third, "stop"))
    assert answer.is_due(0.5, flush_s=1.0)
    assert [d.token_ids for d in entries(answer.flush(0.5))[0].deltas] == [(second, third)]


@pytest.mark.parametrize("tells_stop", [False, True])
def test_a_stop_string_ends_the_choice_and_tells_the_engine(tells_stop: bool) -> None:
    answer = Answer(claim(stop=("END",), tells_stop=tells_stop), TOKENIZER)
    told = [answer.take(draw(0, token_id)) for token_id in ids("say END")]
    assert told == [False] * 6 + [True]
    delta, end = entries(answer.flush(0.0))
    assert delta.deltas[0].text == "say "
    assert delta.deltas[0].finish_reason == "stop"
    assert delta.deltas[0].token_ids == tuple(ids("say END"))
    assert delta.deltas[0].stop == ("END" if tells_stop else "")
    assert end.finish.usage.num_completion_tokens == 7


def test_what_may_begin_a_stop_string_is_released_at_the_end() -> None:
    answer = Answer(claim(stop=("END",)), TOKENIZER)
    *most, last = ids("the EN")
    for token_id in most:
        answer.take(draw(0, token_id))
    answer.take(draw(0, last, "length"))
    assert text_of(entries(answer.flush(0.0))) == "the EN"


def test_choices_end_one_by_one_and_the_job_with_the_last() -> None:
    answer = Answer(claim(n=2), TOKENIZER)
    answer.take(draw(0, ids("a")[0], "stop"))
    answer.take(draw(1, ids("b")[0]))
    assert [entry.kind for entry in entries(answer.flush(0.0))] == ["delta"]
    answer.take(draw(1, ids("c")[0], "stop"))
    assert [entry.kind for entry in entries(answer.flush(0.0))] == ["delta", "end"]


@given(text=st.text(alphabet="aé🙂EN D\n", min_size=1, max_size=30), cut=st.integers(0, 200),
       flushes=st.sets(st.integers(0, 200)), stop=st.sampled_from([(), ("END",), ("N", "END"), ("🙂",)]))
def test_another_worker_goes_on_from_the_log_alone(text: str, cut: int, flushes: set[int],
                                                    stop: tuple[str, ...]) -> None:
    """Half a character or half a stop string may lie at the cut: the joined text is that of one worker."""
    token_ids = ids(text)
    uninterrupted = Answer(claim(stop=stop), TOKENIZER)
    whole = text_of(run(uninterrupted, token_ids, set()))

    first = Answer(claim(stop=stop), TOKENIZER)
    log = run(first, token_ids[:cut], flushes, end=cut >= len(token_ids))
    logged = [token_id for entry in log if entry.kind == "delta" for d in entry.deltas for token_id in d.token_ids]
    if not (log and log[-1].kind == "end"):
        claimed = replace(claim(stop=stop), epoch=2, position=len(log), num_tokens=len(logged))
        heir = Answer(claimed, TOKENIZER, log)
        assert heir.request(GRAMMARS).continued == (tuple(logged),)
        log += run(heir, token_ids[len(logged):], flushes)
    assert text_of(log) == whole
    assert [entry.position for entry in log] == list(range(1, len(log) + 1))


def run(answer: Answer, token_ids: list[int], flushes: set[int], *, end: bool = True) -> list[Entry]:
    """Feeds tokens one by one, flushes after some of them, and at the end if there is one."""
    log: list[Entry] = []
    for i, token_id in enumerate(token_ids):
        last = end and i == len(token_ids) - 1
        stopped = answer.take(draw(0, token_id, "length" if last else None))
        if i in flushes or last or stopped:
            log += entries(answer.flush(0.0))
        if stopped:
            break
    return log


def test_what_was_found_computed_is_charged_once_whoever_ends_the_answer() -> None:
    """And what an unlike worker adds is marked in the log, from its first delta on."""
    token_ids = ids("abcd")
    first = Answer(claim(), TOKENIZER)
    first.take(replace(draw(0, token_ids[0]), num_cached_tokens=2))
    log = entries(first.flush(0.0))
    heir = Answer(replace(claim(), epoch=2, position=1, num_tokens=1, is_like=False), TOKENIZER, log)
    log += run(heir, token_ids[1:], {0})
    assert [(d.num_cached_tokens, d.is_exact) for e in log[:-1] for d in e.deltas] == [
        (2, True), (0, False), (0, False)]
    assert log[-1].finish == Finish(Usage(3, 4, num_cached_tokens=2))


def test_what_was_drawn_behind_a_stop_string_is_not_part_of_the_answer() -> None:
    """Tokens may come several at a time: where they were cut changes neither text nor usage."""
    one_by_one, together = (Answer(claim(stop=("l",)), TOKENIZER) for _ in range(2))
    token_ids = ids("Hello!")
    assert [one_by_one.take(draw(0, token_id)) for token_id in token_ids[:3]] == [False, False, True]
    assert together.take(Output("job", 0, tuple(token_ids), (), None))
    assert entries(together.flush(0.0)) == entries(one_by_one.flush(0.0))
    assert together.num_tokens == 3


def test_a_job_says_which_special_tokens_are_shown() -> None:
    """To whoever begins its answer, and to whoever goes on from the log."""
    end = TOKENIZER.get_vocab()["<|im_end|>"]
    for shown, text in (((end,), "a<|im_end|>b<|im_end|>"), ((), "ab")):
        claimed = claim(shown_token_ids=shown)
        first = Answer(claimed, TOKENIZER)
        log = run(first, [*ids("a"), end], {1}, end=False)
        heir = Answer(replace(claimed, epoch=2, position=1, num_tokens=2), TOKENIZER, log)
        assert text_of(log + run(heir, [*ids("b"), end], set())) == text
