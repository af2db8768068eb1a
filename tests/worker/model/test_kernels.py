"""The kernels of a model's forward against plain torch, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu
from transformers import AutoModelForCausalLM

from tests.system import REPOSITORY
from tests.tools import require_package
from tests.worker.families import FAMILIES, MORE_FAMILIES

require_package("triton")
from worker.model import experts, kernels, pointwise, products
from worker.model.attention import TILE_LEN, KVLayer, Scores
from worker.model.int8 import Int8Linear, quantize
from worker.model.linear import agree
from worker.model.paged import PagedMemory
from worker.model.products import RowLinear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE_LEN = 16
NUM_TOKENS = 2 * kernels.SPLIT_LEN + 40
POSITIONS = (0, 15, 16, kernels.SPLIT_LEN - 1, kernels.SPLIT_LEN, NUM_TOKENS - 1, -1, NUM_TOKENS - 2)
SHAPES = {                                              # heads, heads of keys, head_dim, window, softcap, sinks
    "grouped": (4, 2, 16, None, None, False),
    "one head of keys, width no power of two, window within a page": (8, 1, 80, 9, None, True),
    "three heads, softcap": (3, 3, 64, None, 3.0, False),
    "window over splits": (4, 2, 32, kernels.SPLIT_LEN + 10, 5.0, True),
}


class Pool:
    """One sequence in scattered pages; what is not written is no number."""

    def __init__(self, num_kv_heads: int, head_dim: int):
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_TOKENS, num_kv_heads, head_dim)
        self.new_keys, self.new_values = (torch.randn(shape, generator=generator).to(DEVICE) for _ in "kv")
        num_pages = -(-NUM_TOKENS // PAGE_LEN)
        self.table = torch.randperm(2 * num_pages, generator=generator)[:num_pages].int().to(DEVICE)
        self.keys, self.values = (torch.full((2 * num_pages, num_kv_heads, PAGE_LEN, head_dim), float("nan"),
                                             device=DEVICE) for _ in "kv")
        tokens = torch.arange(NUM_TOKENS, device=DEVICE)
        pages, places = self.table.long()[tokens // PAGE_LEN], tokens % PAGE_LEN
        self.keys[pages, :, places], self.values[pages, :, places] = self.new_keys, self.new_values

    def rows(self, number: int) -> Tensor:
        return self.table.expand(number, -1)


def plain(query: Tensor, pool: Pool, position: int, window: int | None, softcap: float | None, sinks: Tensor | None
          ) -> Tensor:
    """[num_heads, head_dim] in float64: every score of one row."""
    group = len(query) // pool.keys.shape[1]
    keys, values = (x[:position + 1].double().repeat_interleave(group, dim=1) for x in (pool.new_keys, pool.new_values))
    logits = torch.einsum("hd,thd->ht", query.double(), keys) * query.shape[-1] ** -0.5
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if window:
        logits[:, :max(0, position + 1 - window)] = float("-inf")
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None]], dim=1)
    return torch.einsum("ht,thd->hd", logits.softmax(dim=1)[:, :position + 1], values)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_over_pages_are_what_plain_attention_is(shape: str) -> None:
    """Of every length about the borders of pages and splits; a row that is none is zero, and no row reads padding."""
    num_heads, num_kv_heads, head_dim, window, softcap, has_sinks = SHAPES[shape]
    pool = Pool(num_kv_heads, head_dim)
    query = torch.randn(len(POSITIONS), num_heads, head_dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    sinks = torch.linspace(-1, 1, num_heads, device=DEVICE) if has_sinks else None
    positions = torch.tensor(POSITIONS, dtype=torch.int32, device=DEVICE)
    scores = {"scaling": head_dim ** -0.5, "window": window, "softcap": softcap, "sinks": sinks}
    arrived = torch.zeros(len(POSITIONS) * num_kv_heads, dtype=torch.int32, device=DEVICE)
    out = kernels.attend(query, pool.keys, pool.values, pool.rows(len(POSITIONS)), positions, arrived, **scores)
    for row, position in enumerate(POSITIONS):
        expected = torch.zeros(num_heads, head_dim, dtype=torch.float64, device=DEVICE)
        if position >= 0:
            expected = plain(query[row], pool, position, window, softcap, sinks)
        torch.testing.assert_close(out[row].double(), expected, rtol=0, atol=1e-5)
    narrow = pool.rows(2)[:, :1]                        # another table, fewer neighbours, another place in the batch
    again = kernels.attend(query[:2].flip(0), pool.keys, pool.values, narrow, positions[:2].flip(0), arrived, **scores)
    assert torch.equal(again.flip(0), out[:2]), "bits do not depend on neighbours"
    assert not arrived.any()


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(2, 16), (3, 80)])
def test_what_is_written_lies_at_its_place_and_nothing_else_changes(num_kv_heads: int, head_dim: int) -> None:
    pool = Pool(num_kv_heads, head_dim)
    positions = (3, 0, -1, 17, NUM_TOKENS - 1)
    new = torch.randn(2, num_kv_heads, len(positions), head_dim).to(DEVICE).transpose(1, 2)     # as layers have them
    expected = pool.keys.clone(), pool.values.clone()
    for row, position in enumerate(positions):
        for cache, rows in zip(expected, new, strict=True):
            if position >= 0:
                cache[int(pool.table[position // PAGE_LEN]), :, position % PAGE_LEN] = rows[row]
    at = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    kernels.store(pool.keys, pool.values, new[0], new[0], new[1], pool.rows(len(positions)), at, None)
    for cache, wanted in zip((pool.keys, pool.values), expected, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0, equal_nan=True)


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got.float(), expected.float(), rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(5, 5, 16), (9, 3, 80)])
def test_queries_are_turned_in_place_and_keys_on_their_way(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    pool, positions = Pool(num_kv_heads, head_dim), (3, -1, 17)
    qkv = torch.randn(3, num_heads + 2 * num_kv_heads, head_dim).to(DEVICE)
    cos, sin = torch.randn(2, 3, head_dim).to(DEVICE)
    before, (query, key, value) = qkv.clone(), qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    first, second = before.chunk(2, dim=-1)
    turned = before * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    rest = pool.rows(3), torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    kernels.store(pool.keys, pool.values, query, key, value, *rest, (cos, sin))
    for row, position in enumerate(positions):
        if position < 0:
            assert torch.equal(qkv[row], before[row])
            continue
        place = int(pool.table[position // PAGE_LEN]), slice(None), position % PAGE_LEN
        assert close(query[row], turned[row, :num_heads])
        assert close(pool.keys[place], turned[row, num_heads:num_heads + num_kv_heads])
        assert torch.equal(pool.values[place], value[row])
    assert torch.equal(qkv[:, num_heads:], before[:, num_heads:])
    with pytest.raises(RuntimeError, match="angles"):
        kernels.store(pool.keys, pool.values, query, key, value, *rest, (cos[:, :head_dim // 2], sin))


@pytest.mark.parametrize("width", [96, 1100])
def test_what_stands_between_products(width: int) -> None:
    gate, up, x, added = torch.randn(4, 1, 3, width).to(DEVICE)
    weight = torch.randn(width).to(DEVICE)
    assert close(pointwise.silu_and_multiply(torch.cat((gate, up), dim=-1)), silu(gate) * up)
    for other, expected in ((None, x), (added, x + added)):
        total, normed = pointwise.add_and_norm(x, other, weight, 1e-5)
        assert close(total, expected) and close(normed, rms_norm(expected, (width,), weight, 1e-5))


@pytest.mark.parametrize(("num_rows", "num_in", "num_out"), [(3, 200, 300), (40, 2048, 64), (140, 1100, 130)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_of_few_rows(num_rows: int, num_in: int, num_out: int, has_bias: bool) -> None:
    """Whatever does not fill a tile; in splits, whose sum is begun anew each time; of weights in eight bits too."""
    x, weight = torch.randn(1, num_rows, num_in).to(DEVICE), torch.randn(num_out, num_in).to(DEVICE) / num_in ** 0.5
    bias = torch.randn(num_out).to(DEVICE) if has_bias else None
    plain = RowLinear(weight, bias)
    quantized = Int8Linear(plain)
    assert plain.num_splits == quantized.num_splits == {200: 1, 1100: 2, 2048: 4}[num_in]
    assert quantized.scales is not None
    in_order = quantized.weight.view(num_out, -1, products.UNIT // 4, 4).transpose(2, 3).reshape(num_out, -1)
    assert not in_order[:, num_in:].any()
    widened = in_order[:, :num_in].double() * quantized.scales[:, None].double()
    assert (widened - weight.double()).abs().max() <= 0.51 * quantized.scales.max()
    wide = RowLinear(weight, bias)
    wide.tiles = products.WIDE
    for layer, weights in ((plain, weight.double()), (wide, weight.double()), (quantized, widened)):
        expected = linear(x.double(), weights, None if bias is None else bias.double())
        gate, up = expected.chunk(2, dim=-1)
        for _ in range(2):
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(layer.silu_and_multiply(x).double(), silu(gate) * up, rtol=1e-4, atol=1e-3)
        few = torch.cat([x[:, :2], -x[:, :1]], dim=1)
        assert torch.equal(layer(few)[:, :2], layer(x[:, :3])[:, :2])
        assert not layer.arrived.any()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
@pytest.mark.parametrize("kind", [RowLinear, Int8Linear])
@pytest.mark.parametrize(("num_in", "num_out"), [(4096, 6144), (4096, 4096), (14_336, 4096), (896, 1152), (1100, 130),
                                                 (640, 16_400)])
def test_the_bits_of_a_product_do_not_depend_on_how_many_rows_there_are(num_in: int, num_out: int,
                                                                        kind: type[RowLinear]) -> None:
    """Of every tile; nor on what stands in the others."""
    torch.manual_seed(num_in)
    weight = (torch.randn(num_out, num_in) / num_in ** 0.5).to(DEVICE, torch.bfloat16)
    layer = RowLinear(weight, None)
    if kind is Int8Linear:
        whole, scales = quantize(weight)
        layer, weight = Int8Linear(layer), (whole * scales[:, None]).to(torch.bfloat16)
    x = torch.randn(products.MAX_ROWS, num_in).to(DEVICE, torch.bfloat16)
    expected, gated = layer(x), layer.silu_and_multiply(x)
    assert agree(expected, linear(x, weight))
    for num_rows in (1, 2, 16, 17, 64, 100, 128, 200, products.MAX_ROWS):
        rows = torch.cat([x[:num_rows - 1], x[-1:]])
        assert torch.equal(layer(rows), torch.cat([expected[:num_rows - 1], expected[-1:]]))
        assert torch.equal(layer.silu_and_multiply(rows), torch.cat([gated[:num_rows - 1], gated[-1:]]))


def test_how_a_layer_is_cut() -> None:
    """Into splits where outputs are few; stages fit into what a multiprocessor has."""
    assert [products.num_splits(num_tiles, num_in, 128) for num_tiles, num_in in (
        (448, 4096), (64, 14_336), (32, 2048), (1, 100_000), (1, 600))] == [1, 2, 4, 8, 1]
    assert products.Tile(64, 64, 4, 5).within(100_000, 30_000).num_stages == 3


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_compute_for_those_who_chose_them(family: str) -> None:
    """What each does by turns, of its own layout, gate and biases; and bits that do not depend on who else chose."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config((FAMILIES | MORE_FAMILIES)[family], dtype=torch.float32).to(DEVICE)
    module = next(module for module in model.modules() if hasattr(module, "is_transposed"))
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x, chosen = torch.randn(40, 64).to(DEVICE), torch.randint(3, (40, 2)).to(DEVICE)      # nobody chose the fourth
    with torch.inference_mode():
        found = experts._on_gpu(module, x, chosen)
        assert close(found, experts._by_turns(module, x, chosen))
        assert torch.equal(experts._on_gpu(module, x[:3], chosen[:3]), found[:6])


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_over_pages_are_what_plain_attention_is(shape: str) -> None:
    """A prompt in uneven chunks, which begin and end within pages and tiles."""
    num_heads, num_kv_heads, head_dim, window, softcap, has_sinks = SHAPES[shape]
    pool = Pool(num_kv_heads, head_dim)
    empty = KVLayer(*(torch.full_like(cache, float("nan")) for cache in (pool.keys, pool.values)))
    memory = PagedMemory([empty], pool.table.cpu().numpy()[None])
    query = torch.randn(1, num_heads, NUM_TOKENS, head_dim, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    key, value = (new.transpose(0, 1)[None] for new in (pool.new_keys, pool.new_values))
    sinks = torch.linspace(-1, 1, num_heads, device=DEVICE) if has_sinks else None
    for begin, end in pairwise((0, 16, 37, 38, 190, NUM_TOKENS)):
        at = slice(begin, end)
        out = memory.chunk(0, begin, end).attend(0, query[:, :, at], key[:, :, at], value[:, :, at],
                                                 Scores(head_dim ** -0.5, window, softcap, sinks))
        assert out.shape == (1, end - begin, num_heads, head_dim)
        for row in {0, (end - begin) // 2, end - begin - 1}:
            expected = plain(query[0, :, begin + row], pool, begin + row, window, softcap, sinks)
            torch.testing.assert_close(out[0, row].double(), expected, rtol=0, atol=1e-5)


def test_the_bits_of_a_prompts_row_are_its_own() -> None:
    """Beside other tiles, and whatever else is in its own."""
    pool, positions = Pool(2, 16), torch.full((2 * TILE_LEN,), -1, dtype=torch.int32, device=DEVICE)
    query = torch.randn(2 * TILE_LEN, 4, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    positions[:TILE_LEN] = torch.arange(300, 300 + TILE_LEN)
    positions[TILE_LEN] = 5

    def attend(num_tiles: int) -> Tensor:
        rows = slice(num_tiles * TILE_LEN)
        return kernels.attend_tiles(query[rows], pool.keys, pool.values, pool.rows(num_tiles), positions[rows],
                                    scaling=0.25, window=70)

    full = attend(2)
    assert not full[TILE_LEN + 1:].any()
    assert torch.equal(attend(1), full[:TILE_LEN])
    positions[10:TILE_LEN] = -1
    assert torch.equal(attend(1)[:10], full[:10])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from worker.engine import kernels as drawing
from worker.model import grouped, kernels, pointwise, products
SIZES = {"BLOCK": 1024, "BLOCK_ROWS": 16, "BLOCK_PAIRS": 32, "BLOCK_OUT": 64, "BLOCK_IN": 64, "HALF": 40,
         "BLOCK_HALF": 64, "WIDTH": 720, "PAGE_LEN": 16, "NUM_HEADS": 6, "BLOCK_HEADS": 8, "NUM_QUERY_HEADS": 6,
         "BLOCK_QUERY_HEADS": 8, "HEAD_DIM": 80,
         "BLOCK_DIM": 128, "GROUP": 4, "BLOCK_GROUP": 16, "SPLIT_LEN": kernels.SPLIT_LEN, "TILE_LEN": 64,
         "BLOCK_LEN": kernels.BLOCK_LEN, "NUM_SPLITS": 2}
KERNELS = (kernels._store, kernels._attend_split, kernels._attend_tile,
           pointwise._silu_and_multiply, pointwise._add_and_norm, products._multiply, grouped._project,
           drawing._draw, drawing._log_totals)
DRAWING = {"temperatures": "*fp32", "lows": "*i32", "highs": "*i32", "top_ks": "*i32", "slots": "*i32",
           "top_ps": "*fp32", "log_min_ps": "*fp32", "last_token_ids": "*i64"}
POINTERS = {"table": "*i32", "positions": "*i32", "parts": "*fp32", "peaks": "*fp32", "sums": "*fp32", "sinks": "*fp32",
            "order": "*i64", "bounds": "*i64", "arrived": "*i32"}
for capability, has, dtype in (80, True, "*bf16"), (90, False, "*bf16"), (90, True, "*fp32"):
    tensors = dict.fromkeys(("keys", "values", "new_keys", "new_values", "query", "out", "x", "cos", "sin", "gate_up",
                             "added", "weight", "total", "bias"), dtype) | POINTERS
    flags = dict.fromkeys(("HAS_ANGLES", "HAS_SOFTCAP", "HAS_WINDOW", "HAS_SINKS", "HAS_ADDED", "HAS_BIAS",
                           "HAS_SCALES", "IS_EVEN", "IS_QUICK"), has)
    flags |= {"IS_GATED": not has, "IS_CHAINED": capability == 90}
    for kernel in KERNELS:
        constants = {name: value for name, value in (SIZES | flags).items() if name in kernel.arg_names}
        kinds = dict.fromkeys(kernel.arg_names, "i32") | {"scaling": "fp32", "softcap": "fp32", "eps": "fp32"} | tensors
        if kernel is products._multiply:
            kinds |= {"weight": "*i32", "scales": "*fp32"} if has else {"scales": dtype}
            constants |= {"NUM_PARTS": 4 if has else 1, "IS_QUICK": has and dtype == "*bf16"}
        if kernel in (drawing._draw, drawing._log_totals):
            kinds |= DRAWING | {"logits": dtype, "raw": dtype, "out": "*i64" if kernel is drawing._draw else "*fp32"}
        signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


def test_they_compile_for_gpus() -> None:
    """To machine code, of two generations and both types: the interpreter forgives what the compiler refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=REPOSITORY, env=environment, capture_output=True,
                          text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
