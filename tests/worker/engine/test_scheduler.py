"""The scheduler's promises, for any state of the batch: no clock, no tensor."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.scheduler import (
    CALM_STEPS,
    MAX_REPLAY_ROWS,
    MIN_CHUNK_COST,
    BatchLimit,
    Progress,
    pack,
    schedule,
    share,
)

MAX_ROWS, CHUNK = 8, 64


@st.composite
def batches(draw: st.DrawFn) -> list[Progress]:
    slots = draw(st.lists(st.integers(0, 40), unique=True, max_size=24))
    batch = []
    for slot in slots:
        num_prompt = draw(st.integers(1, 300))
        num_tokens = num_prompt + draw(st.integers(0, 60))
        in_prefill = draw(st.integers(0, (num_prompt - 1) // CHUNK)) * CHUNK
        in_decode = draw(st.integers(num_prompt, max(num_prompt, num_tokens - 1)))
        computed = in_decode if num_tokens > num_prompt and draw(st.booleans()) else in_prefill
        batch.append(Progress(slot, num_prompt, computed, num_tokens))
    return batch


@given(batches())
def test_every_sequence_behind_its_prompt_moves_and_every_step_is_bounded(batch: list[Progress]) -> None:
    plan = schedule(batch, max_rows=MAX_ROWS, prefill_chunk=CHUNK)
    spans = [span for forward in plan.decodes for span in forward]
    rows = [sum(span.end - span.begin for span in forward) for forward in plan.decodes]
    assert all(0 < count <= MAX_ROWS for count in rows)
    computing = {p.slot for p in batch if p.num_computed_tokens >= p.num_prefill_tokens}
    assert computing == {span.slot for span in spans}
    assert sum(rows) <= len(computing) + min(MAX_ROWS, MAX_REPLAY_ROWS)
    cost = sum(max(span.end - span.begin, MIN_CHUNK_COST) for span in plan.prefills)
    assert cost <= CHUNK or len(plan.prefills) == 1


@given(batches())
def test_prompts_are_cut_on_one_grid_whoever_else_computes(batch: list[Progress]) -> None:
    """A chunk begins at a multiple of `prefill_chunk` and ends at the next, or with the prompt."""
    by_slot = {p.slot: p for p in batch}
    for span in schedule(batch, max_rows=MAX_ROWS, prefill_chunk=CHUNK).prefills:
        assert span.begin % CHUNK == 0
        assert span.end == min(span.begin + CHUNK, by_slot[span.slot].num_prefill_tokens)


@given(batches())
def test_spans_continue_what_is_computed_and_nothing_is_computed_twice(batch: list[Progress]) -> None:
    plan = schedule(batch, max_rows=MAX_ROWS, prefill_chunk=CHUNK)
    reached = {p.slot: p.num_computed_tokens for p in batch}
    known = {p.slot: p.num_tokens for p in batch}
    for span in [span for forward in plan.decodes for span in forward] + plan.prefills:
        assert span.begin == reached[span.slot] < span.end <= known[span.slot]
        reached[span.slot] = span.end


@given(batches())
def test_the_first_to_come_is_served(batch: list[Progress]) -> None:
    """Something always moves, and of those that prefill the oldest does."""
    plan = schedule(batch, max_rows=MAX_ROWS, prefill_chunk=CHUNK)
    assert bool(batch) == bool(plan.decodes or plan.prefills)
    prefilling = [p.slot for p in batch if p.num_computed_tokens < p.num_prefill_tokens]
    assert [span.slot for span in plan.prefills] == prefilling[:len(plan.prefills)]
    assert bool(prefilling) == bool(plan.prefills)


@given(batches(), st.integers(0, 200), st.integers(1, 5))
def test_chunks_share_what_has_room_and_short_ones_nothing(batch: list[Progress], max_rows: int, min_rows: int) -> None:
    """Everything once, in the order of the plan; what is computed together has at most so many rows."""
    plan = schedule(batch, max_rows=MAX_ROWS, prefill_chunk=CHUNK, min_chunk_cost=0)
    forwards = share(plan, max_rows=max_rows, min_rows=min_rows)
    assert [forward.decodes for forward in forwards if forward.decodes] == plan.decodes
    assert [span for forward in forwards for span in forward.prefills] == plan.prefills
    for forward in forwards:
        num_parts = bool(forward.decodes) + len(forward.prefills)
        shortest = min((span.end - span.begin for span in forward.prefills), default=min_rows)
        assert num_parts == 1 or (forward.num_rows <= max_rows and shortest >= min_rows)


@given(batches(), st.integers(1, 8), st.integers(1, 4))
def test_in_fixed_shapes_a_chunk_is_computed_by_its_length_alone(batch: list[Progress], max_short: int, num_tiles: int
                                                                 ) -> None:
    """Whatever else there is: its bits are those of the forward that computes it. Everything once, within shapes."""
    tile_len = 16
    max_tiled_rows = max(num_tiles * tile_len, CHUNK)
    plan = schedule(batch, max_rows=MAX_ROWS, prefill_chunk=CHUNK, prefill_budget=4 * CHUNK, min_chunk_cost=0,
                    max_short=max_short)
    forwards = pack(plan, max_rows=MAX_ROWS, max_short=max_short, max_tiled_rows=max_tiled_rows, tile_len=tile_len)
    assert [forward.decodes for forward in forwards if forward.decodes] == plan.decodes
    assert sorted(span for forward in forwards for span in forward.prefills) == sorted(plan.prefills)
    for forward in forwards:
        are_short = {span.end - span.begin <= max_short for span in forward.prefills}
        if False in are_short:
            assert are_short == {False} and not forward.decodes and forward.num_rows_in(tile_len) <= max_tiled_rows
        else:
            assert 0 < forward.num_rows <= MAX_ROWS


def test_in_fixed_shapes_a_step_has_one_chunk_of_a_prompt() -> None:
    """A short one is computed before a long one, on whose keys it may depend where an answer is prefilled again."""
    plan = schedule([Progress(0, 530, 400, 531)], max_rows=MAX_ROWS, prefill_chunk=512, prefill_budget=512,
                    min_chunk_cost=0, max_short=64)
    assert [tuple(span) for span in plan.prefills] == [(0, 400, 512)]


def test_a_step_is_one_forward_where_any_number_of_rows_may_share_it() -> None:
    batch = [Progress(slot, 10, 10, 11) for slot in range(20)] + [Progress(20 + slot, 10, 0, 10) for slot in range(5)]
    plan = schedule(batch, max_rows=100, prefill_chunk=CHUNK, min_chunk_cost=0)
    forward, = share(plan, max_rows=100)
    assert len(forward.decodes) == 20 and len(forward.prefills) == 5
    assert len(share(plan, max_rows=0)) == 6


@given(batches())
def test_a_larger_budget_takes_more_chunks_in_the_same_order(batch: list[Progress]) -> None:
    """Of the first prompt one after the other, on the same grid, then of the next."""
    plans = [schedule(batch, max_rows=MAX_ROWS, prefill_chunk=CHUNK, prefill_budget=budget, min_chunk_cost=0).prefills
             for budget in (0, 3 * CHUNK, 10**9)]
    assert plans[0] == plans[1][:len(plans[0])] and plans[1] == plans[2][:len(plans[1])]
    assert sum(span.end - span.begin for span in plans[1]) <= 3 * CHUNK
    everything = [(p.slot, begin) for p in batch for begin in range(p.num_computed_tokens, p.num_prefill_tokens, CHUNK)]
    assert [(span.slot, span.begin) for span in plans[2]] == everything


def test_fewer_run_after_a_lack_of_memory_and_slowly_more() -> None:
    limit = BatchLimit(8)
    limit.halve(6)
    assert [limit.num_free(num_running) for num_running in (1, 2, 3, 6)] == [2, 1, 0, 0]
    assert limit.num_free(0) == 8, "who is first is tried, however large"
    for num_seqs in (4, 5, 6, 7, 8, 8):
        for _ in range(CALM_STEPS):
            limit.note_calm()
        assert limit.num_seqs == num_seqs
    for num_running in (8, 4, 2, 1, 1):
        limit.halve(num_running)
    assert limit.num_seqs == 1
    limit.halve(8)
    assert limit.num_seqs == 1, "one with many choices was tried alone"
