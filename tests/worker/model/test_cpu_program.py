"""Kernel calls that are made again as one say what the calls said, on whatever numbers; what cannot be is not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from worker.model import cpu, memory
from worker.model.loading import load
from worker.model.model import Model

if not cpu.computes(torch.float32):
    pytest.skip("kernels of ours do not run here", allow_module_level=True)

from worker.model.cpu import stack as stacks
from worker.model.cpu.code import FLOAT32, Code, Value
from worker.model.cpu.kernel import Kernel, empty
from worker.model.cpu.program import ALIGNMENT, Arena, Program, recorded
from worker.model.cpu.stack import Stack
from worker.model.fused import FusedLayer

TINY = Path(__file__).parents[3] / "worker" / "tiny" / "model"
NUM_SLOTS, NUM_TOKENS = 8, 300


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


def test_a_program_makes_calls_again_in_their_order(threads: int) -> None:
    """Each sees what the one before has written, all of it."""
    arena, x = Arena(1 << 20), torch.zeros(500, 16)
    with recorded(arena) as calls:
        out = x
        for _ in range(20):
            source, out = out, empty(500, 16, torch.float32)
            twice(source, out, 500, num_threads=threads)
    program = Program(calls)
    for number in (1.0, 3.0):
        x.fill_(number)
        for _ in range(50):
            program.run()
            assert (out == number * 2**20).all()


def test_memory_is_used_again_two_turns_later() -> None:
    arena = Arena(10 * ALIGNMENT)
    first = arena.take(1, ALIGNMENT, torch.uint8)
    assert arena.take(3, 5, torch.bfloat16).data_ptr() == first.data_ptr() + ALIGNMENT
    with pytest.raises(MemoryError):
        arena.take(9, ALIGNMENT, torch.uint8)
    arena.turn()
    second = arena.take(1, ALIGNMENT, torch.uint8)
    arena.turn()
    assert arena.take(1, ALIGNMENT, torch.uint8).data_ptr() == first.data_ptr() != second.data_ptr()


def tiny(dtype: Any) -> Model:
    return load(str(TINY), dtype=dtype)


def the_stack(model: Model) -> Stack:
    found, = (module for module in model.module.modules() if isinstance(module, Stack))
    return found


def played(model: Model) -> list[Tensor]:
    """Logits of some forwards, of rows that come, go and move."""
    draw = random.Random(0)
    trial = memory.scratch(model.kv_shapes, NUM_SLOTS, NUM_TOKENS, model.dtype, model.device)
    for layer in trial.layers:
        for cache in layer:
            cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)))
    logits = []
    for _ in range(30):
        num_rows = draw.randint(1, NUM_SLOTS)
        slots = sorted(draw.sample(range(NUM_SLOTS), num_rows))
        positions = [draw.randrange(NUM_TOKENS) for _ in slots]
        token_ids = [draw.randrange(model.vocab_size) for _ in slots]
        logits.append(model.decode(token_ids, trial.rows(slots, positions), positions, range(num_rows)))
    return logits


@pytest.mark.parametrize("dtype", [name for name in ("float32", "bfloat16") if cpu.computes(getattr(torch, name))])
def test_rows_of_a_program_have_the_bits_of_calls(dtype: Any) -> None:
    model = tiny(dtype)
    by_program = played(model)
    assert the_stack(model).is_recordable
    the_stack(model).is_recordable = False
    assert all(torch.equal(*pair) for pair in zip(by_program, played(model), strict=True))


def test_heads_that_have_norms_are_part_of_it(tmp_path: Path) -> None:
    config = Qwen3Config(vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=NUM_TOKENS)
    module = Qwen3ForCausalLM(config)
    for layer in module.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_norm.weight)
    module.save_pretrained(tmp_path)
    model = load(str(tmp_path))
    by_program = played(model)
    assert the_stack(model).is_recordable and model.is_uniform
    the_stack(model).is_recordable = False
    assert all(torch.equal(*pair) for pair in zip(by_program, played(model), strict=True))


@pytest.mark.parametrize("why", ["an operator of torch", "no room"])
def test_what_cannot_be_recorded_is_called(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "no room":
        monkeypatch.setattr(stacks, "MAX_WIDTHS", 2)
    else:
        plain = FusedLayer._add
        monkeypatch.setattr(FusedLayer, "_add", lambda self, x, added: plain(self, x, added) * 1.0)
    model = tiny("float32")
    assert not the_stack(model).is_recordable
    monkeypatch.undo()
    assert all(torch.equal(*pair) for pair in zip(played(model), played(tiny("float32")), strict=True))


def test_each_memory_has_programs_of_its_own() -> None:
    model = tiny("float32")
    assert all(torch.equal(*pair) for pair in zip(played(model), played(model), strict=True))


def test_large_layers_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where calling costs nothing beside computing."""
    monkeypatch.setattr(stacks, "MAX_WEIGHTS", 1000)
    assert not any(isinstance(module, Stack) for module in tiny("float32").module.modules())
