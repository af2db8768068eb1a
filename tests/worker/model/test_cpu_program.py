"""Kernel calls that are made again as one say what the calls said, on whatever numbers; what cannot be is not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from worker.model import cpu, memory
from worker.model.attention import Context
from worker.model.loading import load
from worker.model.model import Model
from worker.model.slots import Together

if not cpu.computes(torch.float32):
    pytest.skip("kernels of ours do not run here", allow_module_level=True)

from worker.model.cpu import forward
from worker.model.cpu.code import FLOAT32, Code, Value
from worker.model.cpu.kernel import Kernel, empty
from worker.model.cpu.linear import PanelLinear
from worker.model.cpu.program import ALIGNMENT, Arena, Program, Recording, Unexplained, recorded
from worker.model.fused import FusedMLP

TINY = Path(__file__).parents[3] / "worker" / "tiny" / "model"
NUM_SLOTS, NUM_TOKENS = 8, 300
DTYPES = [name for name in ("float32", "bfloat16") if cpu.computes(getattr(torch, name))]


@Kernel
def twice(code: Code, x: Value, out: Value, num_rows: Value) -> None:
    with code.shares(num_rows) as row:
        numbers = code.numbers(x + row * 64, FLOAT32)
        code.store(numbers + numbers, out + row * 64, FLOAT32)


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def doubled(arena: Arena, x: Tensor, times: int, threads: int) -> Recording:
    arena.restart()
    with recorded(arena) as calls:
        out = x
        for _ in range(times):
            source, out = out, empty(len(x), 16, torch.float32)
            twice(source, out, len(x), num_threads=threads)
    return Recording(calls, {"rows": len(x), "x": x.data_ptr()})


def test_a_program_makes_calls_again_in_their_order(threads: int) -> None:
    """Each sees what the one before has written, all of it; of any number of rows, wherever they lie."""
    arena = Arena(500, 20 * 64)
    program = Program(*(doubled(arena, torch.zeros(num_rows, 16), 20, threads) for num_rows in (2, 7)))
    arena.restart()
    outs = [arena.take(500, 16, torch.float32) for _ in range(20)]
    for num_rows in (500, 3):
        x = torch.randn(num_rows, 16)
        program.set("rows", num_rows)
        program.set("x", x.data_ptr())
        for _ in range(50):
            outs[-1].fill_(-1.0)
            program.run(threads)
            assert torch.equal(outs[-1][:num_rows], x * 2**20) and (outs[-1][num_rows:] == -1).all()


@pytest.mark.parametrize(("why", "numbers"), [
    ("they call other kernels", [{}, {}]), ("what has no name", [{}, {}]),
    ("by nothing", [{"rows": 2, "again": 2}, {"rows": 9, "again": 9}]), ("by nothing", [{"slots": 3}, {"slots": 3}])])
def test_recordings_that_say_more_than_their_names_are_no_program(why: str, numbers: list[dict[str, int]]) -> None:
    arena, inputs = Arena(9, 64 * 4), [torch.zeros(num_rows, 16) for num_rows in (2, 9)]
    calls = [doubled(arena, x, 3 + (index if "other" in why else 0), 1).calls for index, x in enumerate(inputs)]
    with pytest.raises(Unexplained, match=why):
        Program(*map(Recording, calls, numbers))


def test_memory_is_used_again_two_turns_later() -> None:
    arena = Arena(3, 10 * ALIGNMENT)
    first = arena.take(1, ALIGNMENT, torch.uint8)
    assert arena.take(3, 5, torch.bfloat16).data_ptr() == first.data_ptr() + 3 * ALIGNMENT
    for num_rows, width in ((1, 9 * ALIGNMENT), (4, 1)):
        with pytest.raises(MemoryError):
            arena.take(num_rows, width, torch.uint8)
    arena.turn()
    second = arena.take(1, ALIGNMENT, torch.uint8)
    arena.turn()
    assert arena.take(1, ALIGNMENT, torch.uint8).data_ptr() == first.data_ptr() != second.data_ptr()


def tiny(dtype: Any) -> Model:
    return load(str(TINY), dtype=dtype)


def played(model: Model) -> list[Tensor]:
    """Logits of some forwards: of rows that come, go and move, of chunks, and of both."""
    draw = random.Random(0)
    trial = memory.scratch(model.kv_shapes, NUM_SLOTS, NUM_TOKENS, model.dtype, model.device)
    for layer in trial.layers:
        for cache in layer:
            cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)))
    logits = []
    for _ in range(30):
        num_rows, num_chunks = draw.choice([(draw.randint(1, NUM_SLOTS), 0), (0, 1), (3, 2), (1, 1)])
        slots = sorted(draw.sample(range(NUM_SLOTS), num_rows + num_chunks))
        positions = [draw.randrange(NUM_TOKENS) for _ in range(num_rows)]
        parts: list[tuple[Context, int]] = [(trial.rows(slots[:num_rows], positions), num_rows)] if num_rows else []
        for slot in slots[num_rows:]:
            begin = draw.randrange(NUM_TOKENS - 1)
            end = min(begin + draw.randint(1, 100), NUM_TOKENS)
            positions += range(begin, end)
            parts.append((trial.chunk(slot, begin, end), end - begin))
        token_ids = [draw.randrange(model.vocab_size) for _ in positions]
        kept = sorted(draw.sample(range(len(positions)), draw.randint(1, len(positions))))
        context = Together(parts) if len(parts) > 1 else parts[0][0]
        logits.append(model.forward(token_ids, positions, context, kept))
    return logits


def says_what_calls_say(model: Model) -> bool:
    assert model.program and model.is_uniform
    pairs = zip(played(model), played(replace(model, program=None)), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_has_the_bits_of_calls(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where angles are yet to be found."""
    monkeypatch.setattr(forward, "ANGLES_STEP", 50)
    assert says_what_calls_say(tiny(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (3, 3, 32), (8, 1, 128), (8, 2, 64)])
def test_it_is_the_same_whatever_heads_there_are(tmp_path: Path, num_heads: int, num_kv_heads: int, head_dim: int,
                                                 dtype: Any) -> None:
    """With norms of their own; and few tokens may be all that a model takes."""
    config = Qwen3Config(vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=head_dim,
                         num_attention_heads=num_heads, num_key_value_heads=num_kv_heads,
                         max_position_embeddings=NUM_TOKENS)
    module = Qwen3ForCausalLM(config)
    for layer in module.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_norm.weight)
    module.save_pretrained(tmp_path)
    assert says_what_calls_say(load(str(tmp_path), dtype=dtype))
    assert load(str(tmp_path), dtype=dtype, max_model_len=20).program


@pytest.mark.parametrize("why", ["an operator of torch", "no room", "angles that depend on a length"])
def test_what_cannot_be_recorded_is_called(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "no room":
        monkeypatch.setattr(forward, "ROOM", 0.5)
    elif why == "an operator of torch":
        plain = FusedMLP.forward
        monkeypatch.setattr(FusedMLP, "forward", lambda self, x: plain(self, x) * 1.0)
    else:
        monkeypatch.setattr(forward, "FIXED_ROPES", ("llama3",))
    model = tiny("float32")
    assert model.program is None
    monkeypatch.undo()
    assert all(torch.equal(*pair) for pair in zip(played(model), played(tiny("float32")), strict=True))


def test_what_says_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that a family does beside its parts: here the head's outputs are others when it is called by itself."""
    multiply, by_itself = PanelLinear.forward, []

    def multiplied(self: PanelLinear, x: Tensor) -> Tensor:
        out = multiply(self, x)
        if x.dim() > 2:
            return out
        by_itself.append(len(x))
        return out * 2

    monkeypatch.setattr(PanelLinear, "forward", multiplied)
    assert tiny("float32").program is None and by_itself


def test_more_rows_than_it_has_room_for_are_called() -> None:
    model = tiny("float32")
    num_tokens = model.most_rows + 1
    trial = memory.scratch(model.kv_shapes, 1, num_tokens, model.dtype, model.device)
    token_ids = [token % model.vocab_size for token in range(num_tokens)]
    assert model.program
    logits = []
    for end, fits in ((num_tokens, False), (model.most_rows, True)):
        chunk = trial.chunk(0, 0, end)
        assert model.program.fits(end, chunk) is fits
        logits.append(model.forward(token_ids[:end], range(end), chunk, [model.most_rows - 1]))
    assert torch.equal(*logits)
