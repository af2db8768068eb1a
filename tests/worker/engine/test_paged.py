"""Keys and values in pages: what is shared is counted, and the engine over them says what it says over slots.

Without a GPU the kernels run in Triton's interpreter, so that everything is the real path but CUDA's own part of
its graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from tests.tools import require_package
from tests.worker.engine.driver import MIXED, greedy, run, seeded, token_ids
from tests.worker.families import save
from worker.engine.engine import Engine, Request
from worker.model import check, memory
from worker.model.attention import KVShape
from worker.model.folder import ModelRefused
from worker.model.fused import FusedAttention
from worker.model.loading import load

require_package("triton")
from worker.engine import fixed
from worker.engine.fixed import FixedForwards, widths
from worker.engine.paged import KVPages, Pool
from worker.model import int8, pointwise
from worker.model.paged import PAGE_LEN, PagedMemory, padded, tiled
from worker.model.slots import SlotMemory, allocate

CPU = torch.device("cpu")
NUM_SLOTS, NUM_KEPT, NUM_PAGES, NUM_PLACES = 3, 2, 12, 5


class Store(RuleBasedStateMachine):
    """Sequences and kept prefixes take, share and leave pages; each finds its own numbers, whatever others did."""

    memory: Pool

    def make(self) -> Pool:
        return PagedMemory.allocate([KVShape(1, 4, 1)], NUM_PAGES, NUM_SLOTS + NUM_KEPT, NUM_PLACES * PAGE_LEN,
                                    torch.float32, CPU)

    @initialize()
    def begin(self) -> None:
        self.memory = self.make()
        self.kv = KVPages(self.memory, NUM_SLOTS, NUM_PAGES)
        self.most = NUM_PLACES * self.memory.page_len
        self.written: dict[int, list[float]] = {}       # of each slot that is held: what its tokens hold
        self.number = 0.0

    @precondition(lambda self: self.kv.num_free)
    @rule()
    def reserve(self) -> None:
        self.written[self.kv.reserve()] = []

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        slot = self._sequence(data)
        if slot is None or len(self.written[slot]) == self.most:
            return
        num_tokens = data.draw(st.integers(len(self.written[slot]) + 1, self.most))
        if self.kv.num_missing_pages(slot, num_tokens) > self.kv.num_free_pages:
            return
        self.kv.grow(slot, num_tokens)
        for position in range(len(self.written[slot]), num_tokens):
            self.number += 1
            self._numbers(slot, position // self.memory.page_len)[position % self.memory.page_len] = self.number
            self.written[slot].append(self.number)

    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        """In a slot of its own, or behind what was kept of another."""
        source, target = self._sequence(data), data.draw(st.integers(NUM_SLOTS, NUM_SLOTS + NUM_KEPT - 1))
        kept = self.written.get(target, [])
        begin = len(kept)
        if source is None or len(self.written[source]) <= begin:
            return
        end = data.draw(st.integers(begin + 1, len(self.written[source])))
        if self.kv.num_pages_to_keep(source, target, begin, end) <= self.kv.num_free_pages:
            self.kv.keep(source, target, begin, end)
            self.written[target] = kept + self.written[source][begin:end]

    @rule(data=st.data())
    def drop_the_end(self, data: st.DataObject) -> None:
        if kept := [slot for slot in sorted(self.written) if slot >= NUM_SLOTS and len(self.written[slot]) > 1]:
            tokens = self.written[slot := data.draw(st.sampled_from(kept))]
            begin = data.draw(st.integers(1, len(tokens) - 1))
            self.kv.drop(slot, begin, len(tokens))
            del tokens[begin:]

    @rule(data=st.data())
    def reuse(self, data: st.DataObject) -> None:
        target = self._sequence(data)
        sources = [slot for slot in self.written if slot != target and self.written[slot]]
        if target is None or self.written[target] or not sources:
            return
        source = data.draw(st.sampled_from(sources))
        num_tokens = len(self.written[source])
        if self.kv.num_missing_pages(target, num_tokens) <= self.kv.num_free_pages:
            self.kv.grow(target, num_tokens)
            self.kv.copy(source, target, 0, num_tokens)
            self.written[target] = list(self.written[source])

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.written:
            slot = data.draw(st.sampled_from(sorted(self.written)))
            tokens = self.written.pop(slot)
            if slot < NUM_SLOTS:
                self.kv.release(slot)
            else:
                self.kv.drop(slot, 0, len(tokens))

    @invariant()
    def everyone_finds_what_is_theirs(self) -> None:
        self.kv.check()
        for slot, tokens in self.written.items():
            found = [number for place in range(self.kv.pages(len(tokens)))
                     for number in self._numbers(slot, place).tolist()]
            assert found[:len(tokens)] == tokens

    def _sequence(self, data: st.DataObject) -> int | None:
        owned = sorted(slot for slot in self.written if slot < NUM_SLOTS)
        return data.draw(st.sampled_from(owned)) if owned else None

    def _numbers(self, slot: int, place: int) -> Tensor:
        """One of each token of a page."""
        return self.memory.layers[0].values[int(self.memory.table[slot, place]), ..., 0].view(-1)


class StoreOfCpu(Store):
    """In the pages that kernels of ours read on a CPU."""

    def make(self) -> Pool:
        layers = allocate([KVShape(1, 16, 1)], 1, NUM_PAGES * SlotMemory.page_len, torch.float32)
        return SlotMemory(layers, np.zeros((NUM_SLOTS + NUM_KEPT, NUM_PLACES), dtype=np.int64))


TestStore, TestStoreOfCpu = Store.TestCase, StoreOfCpu.TestCase
TestStore.settings = settings(max_examples=100, stateful_step_count=30)
TestStoreOfCpu.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_what_has_a_page_in_common_needs_it_once() -> None:
    store = KVPages(PagedMemory.allocate([KVShape(1, 4, 1)], 4, 4, 3 * PAGE_LEN, torch.float32, CPU), 2, 4)
    first, second = store.reserve(), store.reserve()
    for slot in (first, second):
        store.grow(slot, 2 * PAGE_LEN)
    assert (store.num_free_pages, store.num_owned_pages) == (0, 4)
    store.copy(first, second, 0, 2 * PAGE_LEN)
    assert (store.num_free_pages, store.num_owned_pages) == (2, 2)
    store.release(first)
    assert (store.num_free_pages, store.num_owned_pages) == (2, 2)
    store.check()
    store.keep(second, 2, 0, 2 * PAGE_LEN)
    assert (store.num_free_pages, store.num_owned_pages) == (2, 2), "to keep whole pages takes none"
    with pytest.raises(AssertionError, match="full"):
        store.grow(store.reserve(), 3 * PAGE_LEN)


def test_a_forward_is_filled_up_with_rows_that_are_none() -> None:
    assert padded([7, 0], 4).tolist() == [7, 0, -1, -1]
    assert [tiled(num_rows) for num_rows in (1, 64, 65)] == [64, 64, 128]


@pytest.mark.parametrize("num_pages", [1, 64, 65, 513, 8192])
def test_a_graph_is_made_for_every_length_and_few_in_all(num_pages: int) -> None:
    found = widths(num_pages)
    assert found[-1] == num_pages and found == sorted(set(found))
    assert len(found) <= 5


@pytest.fixture
def paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, so that some chunks are long, and the interpreter has little to do."""
    monkeypatch.setattr(memory, "is_paged", lambda device: True)
    monkeypatch.setattr(check, "DEVICE_ROWS", (8,))
    monkeypatch.setattr(check, "FEW_ROWS", (4,))


ARRIVALS = {0: MIXED[:2], 7: MIXED[2:]}


def answers(engine: Engine, arrivals: Mapping[int, Sequence[Request]] = ARRIVALS
            ) -> dict[tuple[str, int], tuple[list[int], int]]:
    return {key: (token_ids(outputs), outputs[0].num_cached_tokens) for key, outputs in run(engine, arrivals).items()}


def make_engine(folder: Path, num_bytes: int = 1 << 20, **options: Any) -> Engine:
    return Engine(load(str(folder), dtype="float32"), max_num_seqs=6, prefill_chunk=16, kv_cache_bytes=num_bytes,
                  **options)


@pytest.mark.parametrize(("family", "sizes"), [("llama", (4, 8)), ("gpt_oss", (8,))])
def test_the_engine_says_over_pages_what_it_says_over_slots(family: str, sizes: tuple[int, ...], tmp_path: Path,
                                                            request: Any) -> None:
    """Prompts in chunks, found beginnings, choices, drafts; windows and sinks. All forwards of rows have as many where
    torch multiplies, as for who routes to experts."""
    folder = save(family, tmp_path)
    expected = answers(make_engine(folder))
    request.getfixturevalue("paged")
    engine = make_engine(folder)
    assert isinstance(engine.kv, KVPages) and engine.runner.fixed
    fused = [module for module in engine.model.module.modules() if isinstance(module, FusedAttention)]
    assert len(fused) == (2 if family == "llama" else 0) and all(module.pointwise is pointwise for module in fused)
    assert engine.model.row_sizes == sizes
    assert {forward.num_rows for forward in engine.runner.fixed.rows} == set(sizes)
    assert answers(engine) == expected
    assert any(num_cached for _, num_cached in expected.values())
    assert engine.num_accepted_tokens
    assert engine.kv.num_owned_pages == 0


def test_all_of_a_forward_is_tried_with_few_rows(tmp_path: Path, paged: None) -> None:
    """The head too; and who rounds otherwise with few rows has as many always."""
    model = load(str(save("llama", tmp_path)), dtype="float32")
    assert model.row_sizes == (4, 8)
    head, seen = model.module.lm_head, set[int]()
    head.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[-2]))
    assert check.probe_row_sizes(model) == (4, 8)
    assert seen == {4, 8}
    head.register_forward_hook(lambda _, args, out: out + 1e-6 * (out.shape[-2] < 8))
    assert check.probe_row_sizes(model) == (8,)


def test_weights_of_eight_bits_say_nearly_the_same(tmp_path: Path, paged: None, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    """By another name, since they are other weights; on a CPU they are refused."""
    folder = save("llama", tmp_path)
    monkeypatch.setattr(int8, "MIN_WEIGHTS", 1)
    plain, quantized = load(str(folder), dtype="float32"), load(str(folder), dtype="float32", quantization="int8")
    assert sum(isinstance(module, int8.Int8Linear) for module in quantized.module.modules()) == 8
    assert plain.weights_id != quantized.weights_id
    logprobs = []
    for model in (plain, quantized):
        engine = Engine(model, max_num_seqs=2, prefill_chunk=16, kv_cache_bytes=1 << 20)
        outputs = run(engine, {0: [Request("one", tuple(range(10, 24)), greedy(2, num_logprobs=4))]})["one", 0]
        logprobs.append(outputs[0].logprobs[0][1])
    assert logprobs[0] != logprobs[1] == pytest.approx(logprobs[0], abs=0.2)
    monkeypatch.setattr(check, "MAX_QUANTIZED_ERROR", 1e-3)
    with pytest.raises(ModelRefused, match="loses too much in int8"):
        load(str(folder), dtype="float32", quantization="int8")
    monkeypatch.setattr(memory, "is_paged", lambda device: False)
    with pytest.raises(ModelRefused, match="int8 needs a GPU"):
        load(str(folder), quantization="int8")


def test_bits_do_not_depend_on_what_runs_beside(tmp_path: Path, paged: None) -> None:
    """Alone, together, and short of memory, where the younger one gives way and replays."""
    requests = [Request("greedy", tuple(range(10, 41)), greedy(3, num_logprobs=2)),
                Request("seeded", tuple(range(40, 71)), seeded(3, num_logprobs=1))]
    folder = save("llama", tmp_path)
    roomy = make_engine(folder, num_speculative_tokens=0)
    num_bytes = 4 * PAGE_LEN * roomy.model.kv_bytes_per_token       # two pages each, and both want a third
    tight = make_engine(folder, num_bytes, num_speculative_tokens=0, max_model_len=3 * PAGE_LEN)
    alone = {key: outputs for request in requests for key, outputs in run(roomy, {0: [request]}).items()}
    for engine in (roomy, tight):
        for key, outputs in run(engine, {0: requests}).items():
            assert token_ids(outputs) == token_ids(alone[key])
            assert [o.logprobs for o in outputs] == [o.logprobs for o in alone[key]]
    assert tight.num_preempted > 0 == roomy.num_preempted


def test_a_chunk_is_computed_by_its_length_whatever_there_is_beside(tmp_path: Path, paged: None,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it would fit into a forward of decode rows: one number of tokens has one way to its bits."""
    monkeypatch.setattr(fixed, "MAX_SHORT", 3)
    engine = make_engine(save("llama", tmp_path))
    assert forwards(engine).max_rows > forwards(engine).max_short == 3
    seen = dict[str, set[int]]()

    def watch(kind: str) -> None:
        original = getattr(forwards(engine), kind)

        def watched(token_ids: Sequence[int], slots: Sequence[int], *rest: Any) -> Any:
            seen.setdefault(kind, set()).update(slots)
            return original(token_ids, slots, *rest)

        monkeypatch.setattr(forwards(engine), kind, watched)

    watch("run_rows")
    watch("run_tiles")

    def ways(*prompts: int) -> list[tuple[bool, bool]]:
        """Of prompts of so many tokens, which decode nothing: whether they are rows, and whether they are tiles."""
        seen.clear()
        run(engine, {0: [Request(str(i), tuple(range(10 * i, 10 * i + num)), greedy(1))
                         for i, num in enumerate(prompts)]})
        return [(i in seen.get("run_rows", ()), i in seen.get("run_tiles", ())) for i in range(len(prompts))]

    assert ways(3) == [(True, False)] and ways(5) == [(False, True)]
    assert ways(3, 5) == ways(3) + ways(5)


class Recorder:
    """In the place of CUDA's graphs, which need a GPU: a forward that is computed on the same tensors again."""

    def __init__(self, error: float = 0.0):
        self.error = error
        self.num_replays = 0

    def __call__(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        logits = forward().clone()

        def replay() -> None:
            self.num_replays += 1
            logits.copy_(forward() + self.error)

        return torch.inference_mode()(replay), logits


@pytest.fixture
def engine(tmp_path: Path, paged: None) -> Engine:
    return Engine(load(str(save("llama", tmp_path)), dtype="float32"), max_num_seqs=4, max_model_len=48,
                  prefill_chunk=16, kv_cache_bytes=1 << 20)


def forwards(engine: Engine) -> FixedForwards:
    assert engine.runner.fixed
    return engine.runner.fixed


def test_a_batch_that_is_written_into_a_graph_says_the_same(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request("greedy", tuple(range(3, 16)), greedy(7)), Request("seeded", (6, 7), seeded(4), n=2)]
    arrivals = {0: requests[:1], 3: requests[1:]}
    expected = answers(engine, arrivals)
    recorder = Recorder()
    monkeypatch.setattr(fixed, "record", recorder)
    assert forwards(engine).record(engine.model)
    before = recorder.num_replays
    assert answers(engine, arrivals) == expected
    assert recorder.num_replays > before


def test_a_graph_that_says_something_else_is_not_used(engine: Engine, monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(error=1e-3)
    monkeypatch.setattr(fixed, "record", recorder)
    assert not forwards(engine).record(engine.model)
    assert "differ from its forward" in caplog.text
    before = recorder.num_replays
    assert answers(engine, {0: [Request("greedy", (3, 4, 5), greedy(3))]})
    assert recorder.num_replays == before


def test_what_is_no_graph_is_computed_without(engine: Engine, monkeypatch: pytest.MonkeyPatch,
                                              caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: Any) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(fixed, "record", refuse)
    assert not forwards(engine).record(engine.model)
    assert "operation not permitted" in caplog.text
