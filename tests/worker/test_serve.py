"""What a worker decides at its start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from shared import container
from shared.job import Sampling
from shared.settings import Settings
from tests.worker.engine.driver import run
from worker.build import MIN_CHUNK_TOKENS, _time_prefill, build, fit_chunk
from worker.engine.engine import MANY_ROWS
from worker.engine.request import Request
from worker.engine.runner import Runner
from worker.engine.scheduler import Forward
from worker.engine.sequence import Sequence
from worker.model.attention import PAGE_LEN
from worker.model.folder import ModelRefused
from worker.serve import model_folder, serve, served_names
from worker.worker import Worker


@pytest.mark.parametrize(("took_s", "expected"), [
    (0.01, 256), (0.75, 256), (0.76, 128), (2.9, 64), (1e9, MIN_CHUNK_TOKENS)])
def test_a_slow_machine_takes_smaller_chunks(took_s: float, expected: int) -> None:
    """A step stays under a quarter of the lease, so that a long prompt never costs a worker its jobs."""
    assert fit_chunk(256, took_s, most_s=0.75) == expected


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_prompt_that_is_timed_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is found computed by the one that warms up, and nothing of either is left."""
    settings = Settings()
    engine, computed, plain = build(settings, model_folder(settings)), list[int](), Runner.run
    engine.limit_prefill(32)
    engine.prefill_budget = 96

    def watch(self: Runner, forward: Forward, sequences: Mapping[int, Sequence]) -> Any:
        computed.append(sum(span.end - span.begin for span in forward.prefills))
        return plain(self, forward, sequences)

    monkeypatch.setattr(Runner, "run", watch)
    assert _time_prefill(engine) > 0
    assert sum(computed) == 2 * 96 and not engine.chunks.cache.num_pieces


@pytest.mark.usefixtures("threads")
def test_on_a_slow_machine_a_prompt_is_cut_otherwise_and_still_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in smaller chunks, kept in them, and found."""
    prompt = tuple(5 + place % 97 for place in range(400))
    request = Request("it", prompt, Sampling(max_tokens=8, num_logprobs=1))
    found, took_s = list[Any](), Settings().lease_s
    monkeypatch.setattr("worker.build._time_prefill", lambda engine: took_s)
    for settings in (Settings(), Settings(enable_prefix_caching=False)):
        engine = build(settings, model_folder(settings))
        assert engine.prefill_chunk < 256
        found += [[(token_id, output.logprobs) for output in run(engine, {0: [request]})["it", 0]
                   for token_id in output.token_ids] for _ in "ab"]
    assert found == [found[0]] * 4


@pytest.mark.usefixtures("threads")
def test_keys_and_values_fill_no_more_memory_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    roomy = build(settings, model_folder(settings))
    monkeypatch.setattr(container, "num_free_bytes", lambda: float(100 << 20))
    tight = build(settings, model_folder(settings))
    page_bytes = PAGE_LEN * tight.model.kv_bytes_per_token
    assert 50 << 20 < tight.kv.num_pages * page_bytes < 100 << 20 < roomy.kv.num_pages * page_bytes
    one_of_two = build(Settings(workers=2), model_folder(settings))
    assert one_of_two.kv.num_pages == tight.kv.num_pages // 2


@pytest.mark.usefixtures("threads")
async def test_steps_take_as_many_threads_as_the_setting_says(
        redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads the model and whoever steps may be two threads, and OpenMP counts for each."""
    seen = []

    async def run(_: Worker) -> None:
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(Worker, "run", run)
    assert await serve(Settings(redis_url=redis_url, allow_no_aof=True, threads=3)) == 0
    assert seen == [3]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("large_bytes", "expected"), [(0, 4), (1 << 40, 3)])
def test_a_small_model_leaves_a_core_but_in_forwards_of_many_rows_or_of_prompts_alone(
        large_bytes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.build.most_threads", lambda: 4)
    monkeypatch.setattr("worker.build.LARGE_FOR_KERNELS_BYTES", large_bytes)
    engine, plain = build(settings := Settings(), model_folder(settings)), Runner.run
    seen: dict[tuple[bool, bool], int] = {}
    if not engine.model.is_uniform:
        pytest.skip("torch computes it, whose bits depend on the number of threads")

    def watch(self: Runner, forward: Forward, sequences: Mapping[int, Sequence]) -> Any:
        seen[bool(forward.decodes), forward.num_rows > MANY_ROWS] = torch.get_num_threads()
        return plain(self, forward, sequences)

    monkeypatch.setattr(Runner, "run", watch)
    for name, num_tokens in (("few", 3), ("many", MANY_ROWS + 1)):
        engine.add(Request(name, (1,) * num_tokens, Sampling(max_tokens=3, ignore_eos=True)))
        engine.step()
    while engine.has_work:
        engine.step()
    assert seen == {(False, False): 4, (True, True): 4, (True, False): expected}


@pytest.mark.usefixtures("threads")
def test_too_little_memory_is_refused_in_one_line() -> None:
    settings = Settings(kv_cache_bytes=1 << 16)
    with pytest.raises(ModelRefused, match=r"kv_cache_bytes 65536 is less than .*: lower max_model_len"):
        build(settings, model_folder(settings))


@pytest.mark.usefixtures("threads")
def test_the_shortest_context_is_one_token_and_its_answer() -> None:
    settings = Settings(max_model_len=2)
    assert build(settings, model_folder(settings)).max_model_len == 2


def test_names() -> None:
    assert served_names(Settings()) == ("baton-tiny",)
    assert served_names(Settings(model="org/m")) == ("org/m",)
    assert served_names(Settings(model="org/m", served_model_name=("a", "b"))) == ("a", "b")
