"""How close the engine comes to what a GPU can do: `python -m tests.bench.device`.

A random model of a common shape, made on the device and saved nowhere; the engine alone, without Redis or HTTP. A step
reads every weight once and the keys and values of its rows, so the bandwidth that a large copy reaches is the roofline
of decoding, as the rate of a large product is that of prompts. A gap is the time between two steps when the GPU runs
no kernel; between the kernels of one graph there is a microsecond or so.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from shared.job import Sampling
from tests.bench import models
from worker.engine.engine import Engine, Request
from worker.model.loading import prove
from worker.model.model import Model

SHAPES: dict[str, dict[str, Any]] = models.SHAPES | {
    "8b": {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "1b": {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8},
}
GIB = 2**30
COPY_BYTES = 4 * GIB
MATRIX = 8192
SETTLING_STEPS, TIMED_STEPS = 8, 40
PROFILED_STEPS = 10
MIN_GAP_US = 5.0                # shorter ones lie within a graph
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.8}, "top_p": {"temperature": 0.6, "top_p": 0.9},
    "top_k": {"temperature": 0.7, "top_k": 20, "top_p": 0.8}}


class Ceiling(NamedTuple):
    bytes_per_s: float
    flop_per_s: float


class Point(NamedTuple):
    numerics: Literal["exact", "fast"]
    num_rows: int
    num_prompt_tokens: int
    sampling: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--points", nargs="+", type=read_point, default=[read_point("exact:1:128:greedy")],
                        help="numerics:rows:prompt tokens:sampling")
    parser.add_argument("--prompts", nargs="*", type=int, default=[512, 2048], help="chunks of a prompt, in tokens")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="that the model is made for")
    parser.add_argument("--quantization", choices=["none", "int8"], default="none")
    parser.add_argument("--kernels", action="store_true", help="also what each kernel takes")
    args = parser.parse_args()
    ceiling = measure_ceiling(args.device)
    print(f"{device_name(args.device)}: copies {ceiling.bytes_per_s / 1e12:.2f} TB/s, multiplies "
          f"{ceiling.flop_per_s / 1e12:.0f} TFLOP/s", flush=True)
    began_s = time.perf_counter()
    model = make_model(args.shape, args.device, args.quantization, args.max_num_seqs)
    print(f"{model!r}: made and proved in {time.perf_counter() - began_s:.1f} s", flush=True)
    gc.freeze()                                         # as a worker does
    for point in args.points:
        decode(model, point, ceiling, args.kernels)
    for chunk in args.prompts:
        prefill(model, chunk, ceiling)


def read_point(text: str) -> Point:
    numerics, num_rows, num_prompt_tokens, sampling = text.split(":")
    return Point("fast" if numerics == "fast" else "exact", int(num_rows), int(num_prompt_tokens), sampling)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "a CPU"


def measure_ceiling(device: str) -> Ceiling:
    scale = 1 if device == "cuda" else 64
    source = torch.empty(COPY_BYTES // scale, dtype=torch.uint8, device=device).fill_(7)
    target = torch.empty_like(source)
    square = torch.randn(MATRIX // scale, MATRIX // scale, device=device).to(torch.bfloat16)
    copy_s = median_s(device, lambda: target.copy_(source))
    multiply_s = median_s(device, lambda: square @ square)
    return Ceiling(2 * source.nbytes / copy_s, 2 * len(square) ** 3 / multiply_s)


def median_s(device: str, run: Callable[[], object], repeats: int = 10) -> float:
    times = []
    for _ in range(repeats + 2):
        wait(device)
        began_s = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[2:])


def wait(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def make_model(shape: str, device: str, quantization: Literal["none", "int8"] = "none", max_num_seqs: int = 64
               ) -> Model:
    """A model as `load` makes it from a folder."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False, bos_token_id=None,
                         eos_token_id=None, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    with tempfile.TemporaryDirectory() as folder:
        return prove(module.eval().requires_grad_(False), config, Path(folder), max_num_seqs=max_num_seqs,
                     quantization=quantization)


def decode(model: Model, point: Point, ceiling: Ceiling, shows_kernels: bool) -> None:
    began_s = time.perf_counter()
    engine = make_engine(model, point)
    made_s = time.perf_counter() - began_s
    sampling = Sampling(max_tokens=1900, seed=3, ignore_eos=True, **SAMPLINGS[point.sampling])
    for row in range(point.num_rows):
        prompt = tuple((row * 7919 + i) % model.vocab_size for i in range(point.num_prompt_tokens))
        engine.add(Request(str(row), prompt, sampling))
    begun: set[str] = set()
    began_s = time.perf_counter()
    while len(begun) < point.num_rows:
        begun |= {output.request_id for output in engine.step()}
    first_s = time.perf_counter() - began_s
    for _ in range(SETTLING_STEPS):
        engine.step()
    wait(model.device)
    steps = list(timed_steps(engine))
    wait(model.device)
    step_s = sum(steps) / len(steps)
    length = point.num_prompt_tokens + SETTLING_STEPS + TIMED_STEPS // 2
    num_bytes = weight_bytes(model) + point.num_rows * length * model.kv_bytes_per_token
    busy_s, gap_s, kernels = profile(engine) if model.device.type == "cuda" else (0.0, 0.0, [])
    has_graphs = engine.runner.fixed is not None and engine.runner.fixed.has_graphs
    print(f"{point.numerics:>5} {point.num_rows:>4} rows of {length:>5} tokens, {point.sampling:>8}: "
          f"{point.num_rows / step_s:>8.0f} tok/s, step {1e3 * step_s:6.2f} ms "
          f"(p99 {1e3 * sorted(steps)[-1]:6.2f}, busy {1e3 * busy_s:6.2f}, gap {1e6 * gap_s:5.0f} us), "
          f"{100 * num_bytes / ceiling.bytes_per_s / step_s:3.0f} % of the roofline; all prompts {first_s:.2f} s, "
          f"made in {made_s:.1f} s, graphs {'yes' if has_graphs else 'no'}", flush=True)
    if shows_kernels:
        for name, num, total_s in kernels[:24]:
            print(f"      {1e6 * total_s:8.1f} us  {num:6.1f} x  {name[:110]}")


def make_engine(model: Model, point: Point) -> Engine:
    return Engine(model, max_num_seqs=max(8, point.num_rows), max_model_len=4096, prefill_chunk=512,
                  kv_cache_bytes=24 * GIB if model.device.type == "cuda" else GIB, enable_prefix_caching=False,
                  num_speculative_tokens=0, numerics=point.numerics)


def timed_steps(engine: Engine) -> Iterator[float]:
    for _ in range(TIMED_STEPS):
        began_s = time.perf_counter()
        engine.step()
        yield time.perf_counter() - began_s


def profile(engine: Engine) -> tuple[float, float, list[tuple[str, float, float]]]:
    """Seconds of a step in which kernels run, and of the gap before it; per kernel name, number and time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in recorded.events()
                   if "CUDA" in str(event.device_type))
    busy_us, gap_us, reached = 0.0, 0.0, spans[0][0]
    totals: dict[str, tuple[float, float]] = {}
    for begin, end, name in spans:
        busy_us += max(0.0, end - max(begin, reached))
        gap_us += begin - reached if begin - reached > MIN_GAP_US else 0
        reached = max(reached, end)
        num, total = totals.get(name, (0.0, 0.0))
        totals[name] = num + 1 / PROFILED_STEPS, total + (end - begin) / 1e6 / PROFILED_STEPS
    kernels = sorted(((name, num, total) for name, (num, total) in totals.items()), key=lambda each: -each[2])
    return busy_us / 1e6 / PROFILED_STEPS, gap_us / 1e6 / PROFILED_STEPS, kernels


def prefill(model: Model, chunk: int, ceiling: Ceiling) -> None:
    """One prompt of 4096 tokens, in chunks of this size."""
    num_tokens = 4096
    engine = Engine(model, max_num_seqs=8, prefill_chunk=chunk, kv_cache_bytes=4 * GIB, enable_prefix_caching=False,
                    num_speculative_tokens=0)
    times = []
    for number in range(4):
        engine.add(Request(str(number), tuple(range(num_tokens)), Sampling(max_tokens=1, temperature=0.0)))
        wait(model.device)
        began_s = time.perf_counter()
        while engine.has_work:
            engine.step()
        times.append(time.perf_counter() - began_s)
    took_s = statistics.median(times[1:])
    num_flop = 2 * num_tokens * (num_weights(model) - model.vocab_size * model.config.hidden_size)
    for shape in model.kv_shapes:       # products with keys and with values, of half of all pairs
        num_flop += 4 * shape.num_query_heads * shape.head_dim * num_tokens**2 // 2
    print(f"{num_tokens} tokens in chunks of {chunk}: {1e3 * took_s:.1f} ms, {num_tokens / took_s:.0f} tok/s, "
          f"{100 * num_flop / took_s / ceiling.flop_per_s:.0f} % of the peak", flush=True)


def num_weights(model: Model) -> int:
    """The weights that every step reads: not the embedding, which is looked up."""
    return sum(weight.numel() for weight in read_weights(model))


def weight_bytes(model: Model) -> int:
    return sum(weight.nbytes for weight in read_weights(model))


def read_weights(model: Model) -> list[torch.Tensor]:
    embedding = model.module.get_input_embeddings().weight
    return [weight for weight in model.module.parameters() if weight is not embedding]


if __name__ == "__main__":
    main()
