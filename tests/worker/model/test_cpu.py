"""Kernels for a CPU: what they compute, and that a row's bits are its own. Also as a processor of 2013 runs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, silu

from tests.worker.families import computing_by, kinds_of_ours
from worker.model import cpu

if not cpu.computes(torch.float32):
    pytest.skip("kernels of ours do not run here", allow_module_level=True)

from llvmlite.ir import VoidType

from worker.engine import likeliest, noise, penalties
from worker.model.cpu import amx, attention, kernel, linear, pointwise
from worker.model.cpu.code import FLOAT32, Code, Value
from worker.model.cpu.kernel import Kernel, Processor
from worker.model.cpu.linear import PanelLinear

OLD = Processor("haswell", {"avx": True, "avx2": True, "fma": True, "avx512f": False, "avx512bf16": False})
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if cpu.computes(dtype)]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache of what was compiled before for the processor that is here."""
    monkeypatch.setattr(kernel, "processor", lambda: OLD)
    monkeypatch.setattr(linear, "processor", lambda: OLD)
    for module in (attention, linear, pointwise, likeliest, noise, penalties):
        for name, value in list(vars(module).items()):
            if isinstance(value, Kernel):
                monkeypatch.setattr(module, name, Kernel(value._write))


def is_near(got: Tensor, expected: Tensor, num_sums: int = 1) -> bool:
    """Up to the rounding of what it is stored as, and of float32 sums of so many."""
    error = (got.double() - expected).abs().max() / expected.abs().max()
    return bool(error <= ROUNDING[got.dtype] + num_sums * 2**-24)


@pytest.mark.parametrize("kernels", kinds_of_ours())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_outputs", "num_columns"), [(1, 2), (31, 66), (97, 64), (320, 1030), (40, 288),
                                                          (33, 8192)])
def test_products_are_products_and_a_row_has_its_own_bits(
        num_outputs: int, num_columns: int, dtype: torch.dtype, kernels: Literal["ours", "vectors"]) -> None:
    """In any number of rows, one after the other or apart in memory, on one thread or two."""
    torch.manual_seed(0)
    weight, bias = torch.randn(num_outputs, num_columns).to(dtype), torch.randn(num_outputs).to(dtype)
    x = torch.randn(300, num_columns + 3).to(dtype)[:, :num_columns]
    with computing_by(kernels):
        layer = PanelLinear(weight, bias)
        assert is_near(PanelLinear(weight, None)(x[None]), x.double()[None] @ weight.double().T, num_columns)
    torch.set_num_threads(2)
    whole = layer(x)
    assert is_near(whole, nn.functional.linear(x.double(), weight.double(), bias.double()), num_columns)
    torch.set_num_threads(1)
    for begin, end in ((0, 1), (1, 3), (3, 14), (14, 37), (37, 53), (53, 86), (100, 229), (0, 300)):
        assert torch.equal(layer(x[begin:end].contiguous()), whole[begin:end])
    assert layer(x[:0]).shape == (0, num_outputs)
    assert torch.equal(layer(x.T.contiguous().T), whole)


@pytest.mark.parametrize("kernels", kinds_of_ours())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_outputs", [64, 608, 96])
def test_gates_are_multiplied_in_their_product(
        num_outputs: int, dtype: torch.dtype, kernels: Literal["ours", "vectors"]) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(num_outputs, 96) / 4).to(dtype), torch.randn(num_outputs).to(dtype)
    x = torch.randn(300, 96).to(dtype)
    with computing_by(kernels):
        layer, plain = PanelLinear(weight, bias, is_gated=True), PanelLinear(weight, bias)
    assert torch.equal(layer(x), plain(x))
    whole = layer.silu_and_multiply(x)
    gate, up = nn.functional.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=-1)
    assert is_near(whole, silu(gate) * up, 96)
    for begin, end in ((0, 1), (3, 20), (100, 229)):
        assert torch.equal(layer.silu_and_multiply(x[None, begin:end])[0], whole[begin:end])
    x[5, 3] = torch.nan
    out = layer.silu_and_multiply(x)
    assert out[5].isnan().all() and torch.equal(out[6:], whole[6:])


@Kernel
def shapes(code: Code, out: Value) -> None:
    """How many rows registers have: within others that had another shape, behind those, and behind all."""
    with amx.registers(code, code.integer(20)):
        with amx.registers(code, code.integer(5)):
            code.call("llvm.x86.sttilecfg", VoidType(), code.pointer(out))
        code.call("llvm.x86.sttilecfg", VoidType(), code.pointer(out + 64))
    code.call("llvm.x86.sttilecfg", VoidType(), code.pointer(out + 128))


@pytest.mark.skipif(not cpu.has_matrices(torch.bfloat16), reason="no matrix registers")
def test_matrix_registers_are_left_as_others_had_shaped_them() -> None:
    """oneDNN shapes them too, on the same threads."""
    out = torch.zeros(3, 64, dtype=torch.uint8)
    shapes(out, num_threads=1)
    assert out[:, amx.ROWS_PLACE:amx.ROWS_PLACE + 8].tolist() == [
        [5, 5, 5, 5, 5, 5, 16, 16], [16, 16, 4, 4, 16, 4, 16, 16], [0] * 8]


def test_weights_that_bfloat16_holds_are_kept_in_half_the_memory() -> None:
    """And say in float32 what they said, to the bit."""
    torch.manual_seed(0)
    weight, x = torch.randn(40, 64).bfloat16().float(), torch.randn(5, 64)
    halved, whole = PanelLinear(weight, None), PanelLinear(torch.cat([weight, torch.full((1, 64), 0.1)]), None)
    assert halved.packed.dtype == torch.bfloat16 and whole.packed.dtype == torch.float32
    assert torch.equal(halved(x), whole(x)[:, :40])


def test_a_product_that_is_no_number_stays_in_its_row() -> None:
    x = torch.ones(14, 32)
    x[5, 3] = torch.nan
    out = PanelLinear(torch.ones(32, 32), None)(x)
    assert out[5].isnan().all() and (out[torch.arange(14) != 5] == 32).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 90])
def test_what_stands_between_products(num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    check_pointwise(num_rows, dtype)


def check_pointwise(num_rows: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(1, num_rows, 2 * 1024) * 8).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert is_near(pointwise.silu_and_multiply(gate_up), silu(gate) * up)
    assert is_near(pointwise.gelu_and_multiply(gate_up), gelu(gate, approximate="tanh") * up)

    x, added = (torch.randn(1, num_rows, 1024).to(dtype) for _ in "xa")
    weight = torch.randn(1024).to(dtype)
    for other in (None, added):
        total, normed = pointwise.add_and_norm(x, other, weight, 1e-5)
        assert torch.equal(total, x if other is None else x + other)
        assert is_near(normed, rms_norm(total.double(), weight.shape, weight.double(), 1e-5), 64)

    heads, (cos, sin) = torch.randn(num_rows, 5, 64).to(dtype), torch.randn(2, num_rows, 64).to(dtype)
    first, second = heads.double().chunk(2, dim=-1)
    expected = heads.double() * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    assert is_near(pointwise.rotate(heads[:, 1:4], cos, sin), expected[:, 1:4])
    with pytest.raises(RuntimeError, match="do not turn"):
        pointwise.rotate(heads, cos[:, :32], sin[:, :32])

    weight, untouched = torch.randn(64).to(dtype), heads[:, 0].clone()
    expected = rms_norm(heads.double(), weight.shape, weight.double(), 1e-6)
    assert is_near(pointwise.norm_heads(heads[:, 1:], weight, 1e-6), expected[:, 1:], 16)
    assert torch.equal(heads[:, 0], untouched)
    assert torch.equal(pointwise.add(x, added), x + added)


def test_numbers_of_another_type_are_refused() -> None:
    """A kernel would read or write beyond the end of them."""
    x, other = torch.ones(2, 32), torch.ones(2, 32, dtype=torch.float64)
    heads, pages = torch.ones(2, 1, 32, dtype=torch.float64), torch.zeros(1, 1, 1, 16, 32, 16, 1)
    places = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.arange(2)
    for call in (lambda: pointwise.add(x, other), lambda: pointwise.add_and_norm(x, None, other[0], 1e-6),
                 lambda: pointwise.norm_heads(x[:, None], other[0], 1e-6),
                 lambda: PanelLinear(torch.ones(8, 32), None)(other),
                 lambda: attention.write(pages, torch.zeros(1, 1, 1, 256, 32), heads, heads, *places, heads)):
        with pytest.raises(RuntimeError, match="float64 among"):
            call()


def test_an_older_processor_computes_the_same_in_float32(old: None) -> None:
    """With half as many registers, of half the length: fewer rows at a time, the same sums in the same order."""
    torch.manual_seed(0)
    check_pointwise(7, torch.float32)
    weight, x = torch.randn(70, 130), torch.randn(20, 130)
    layer = PanelLinear(weight, None)
    assert layer.tile.rows < 12
    assert is_near(layer(x), x.double() @ weight.double().T, 130)
    assert torch.equal(layer(x[3:5]), layer(x)[3:5])

    query, (keys, values) = torch.randn(1, 3, 64), torch.randn(2, 256, 64)
    in_lanes = keys.view(1, 1, 1, 16, 16, 64, 1).transpose(4, 5).contiguous()
    rows = attention.Runs(torch.tensor([0]), torch.tensor([99]), [1]).rows(3, 64)
    table = torch.zeros(1, 1, dtype=torch.int64)
    out = attention.attend(query, in_lanes, values.view(1, 1, 1, 256, 64), table, rows, scaling=0.125, window=None,
                           softcap=None, sinks=None)
    shares = (query[0].double() @ keys[:100].double().T * 0.125).softmax(-1)
    assert is_near(out[0], shares @ values[:100].double(), 100)


def test_an_older_processor_draws_the_same(old: None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2048)
    found = likeliest.likeliest(logits, 20)
    assert found is not None and torch.equal(found[0], logits.topk(20).values)
    assert is_near(likeliest.log_totals(logits), logits.double().logsumexp(-1), 100)
    assert torch.equal(noise.draw(logits, noise.Wishes())[0], logits.argmax(-1))
    seen, counts = torch.zeros(1, 2048, dtype=torch.bool), torch.zeros(1, 2048)
    seen[0, 5], counts[0, 5], expected = True, 2.0, logits.clone()
    expected[1, 5] -= 2 * 0.5 + 1.5
    penalties.penalize(logits, torch.tensor([1]), torch.tensor([0]), seen, counts, torch.tensor([[1.0], [0.5], [1.5]]))
    assert torch.allclose(logits, expected) and logits[1, 5] < -1


@Kernel
def exponentials(code: Code, x: Value, out: Value) -> None:
    code.store(code.exp(code.numbers(x, FLOAT32)), out, FLOAT32)


@Kernel
def logarithms(code: Code, x: Value, out: Value) -> None:
    code.store(code.log(code.numbers(x, FLOAT32)), out, FLOAT32)


@Kernel
def folded(code: Code, x: Value, out: Value) -> None:
    numbers = code.numbers(x, FLOAT32)
    code.store(code.largest(numbers), out, FLOAT32)
    code.store(code.total(numbers), out + 4, FLOAT32)


@given(st.lists(st.floats(-200, 80, width=32), min_size=16, max_size=16))
def test_exponentials(numbers: list[float]) -> None:
    x, out = torch.tensor(numbers), torch.empty(16)
    exponentials(x, out, num_threads=1)
    expected = x.double().exp()
    assert torch.allclose(out.double(), expected, rtol=3e-5, atol=2**-126)


def test_exponentials_at_the_borders() -> None:
    x, out = torch.zeros(16), torch.empty(16)
    x[:5] = torch.tensor([torch.nan, -torch.inf, torch.inf, -1e30, 1e30])
    exponentials(x, out, num_threads=1)
    assert out[0].isnan() and out[1] == out[3] == 0 and out[2] == out[4] > 1e38
    assert (out[5:] == 1).all()


@Kernel
def powers_of_two(code: Code, x: Value, out: Value) -> None:
    code.store(code.exp2(code.numbers(x, FLOAT32)), out, FLOAT32)


@pytest.mark.skipif(not cpu.has_matrices(torch.bfloat16), reason="no matrix registers")
@given(st.lists(st.floats(-200, 100, width=32), min_size=16, max_size=16))
def test_powers_of_two_for_matrices(numbers: list[float]) -> None:
    """Nothing of what is masked, and no number of what is none."""
    x, out = torch.tensor(numbers), torch.empty(16)
    x[:2] = torch.tensor([torch.nan, -torch.inf])
    powers_of_two(x, out, num_threads=1)
    assert out[0].isnan() and out[1] == 0
    assert torch.allclose(out[2:].double(), x[2:].double().exp2(), rtol=4e-6, atol=2**-126)


@given(st.lists(st.floats(2**-126, 2**126, width=32) | st.floats(0.5, 2, width=32), min_size=16, max_size=16))
def test_logarithms(numbers: list[float]) -> None:
    x, out = torch.tensor(numbers), torch.empty(16)
    logarithms(x, out, num_threads=1)
    assert torch.allclose(out.double(), x.double().log(), rtol=3e-7, atol=0)


def test_sums_and_largest() -> None:
    out = torch.empty(2)
    folded(torch.arange(16.0).flip(0).contiguous(), out, num_threads=1)
    assert out.tolist() == [15, 120]


def test_every_share_is_computed_once_by_some_thread() -> None:
    @Kernel
    def count(code: Code, out: Value, num: Value) -> None:
        with code.shares(num) as unit:
            place = out + unit * 4
            code.store(code.numbers(place, FLOAT32, 1) + 1.0, place, FLOAT32)

    out = torch.zeros(10_000)
    for num_threads in (1, 2, 3):
        count(out, len(out), num_threads=num_threads)
    assert (out == 3).all()


@pytest.mark.parametrize("missing", ["llvmlite", "threads", "features"])
def test_where_kernels_cannot_run_torch_computes(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computes: Any = cpu.computes.__wrapped__
    assert computes(torch.float32) and not computes(torch.float64)
    if missing == "llvmlite":
        monkeypatch.setattr(cpu, "find_spec", lambda name: None)
    elif missing == "threads":
        monkeypatch.setattr(kernel, "_openmp", lambda: None)
    else:
        monkeypatch.setattr(kernel, "processor", lambda: Processor("x86-64", {}))
    assert not computes(torch.float32) and not computes(torch.bfloat16)


@pytest.mark.skipif(not cpu.has_matrices(torch.bfloat16), reason="no matrix registers")
def test_where_the_system_keeps_matrix_registers_vectors_compute_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a worker's numerics say."""
    assert "AMX" in cpu.arithmetic(torch.bfloat16) and "AMX" not in cpu.arithmetic(torch.float32)
    torch.manual_seed(0)
    weight, x = torch.randn(1024, 512).bfloat16(), torch.randn(64, 512).bfloat16()
    expected = PanelLinear(weight, None)(x)
    monkeypatch.setattr(amx, "REQUEST_PERMISSION", -1)
    monkeypatch.setattr(amx, "is_there", amx.is_there.__wrapped__)
    assert not amx.is_there() and "AMX" not in cpu.arithmetic(torch.bfloat16)
    out = PanelLinear(weight, None)(x)
    assert cpu.computes(torch.bfloat16) and torch.allclose(out, expected, rtol=0.02, atol=0.1)
    assert not torch.equal(out, expected)
