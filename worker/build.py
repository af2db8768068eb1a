"""From settings to an engine that is ready: the model loaded, and the prefill chunk as large as this machine allows."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import torch

from shared.job import Sampling
from shared.settings import Settings
from shared.threads import LARGE_FOR_KERNELS_BYTES, default_threads, most_threads
from worker.engine.engine import Engine, Request
from worker.model.folder import ModelRefused, weight_bytes
from worker.model.loading import load
from worker.model.memory import num_free_bytes

log = logging.getLogger(__name__)

MIN_CHUNK_TOKENS, CHUNK_TOKENS, GPU_CHUNK_TOKENS = 16, 256, 512
KV_CACHE_BYTES = 4 << 30        # of a CPU's memory, if so much is free; on a GPU all that is free is used


def build(settings: Settings, folder: Path) -> Engine:
    """Raises ModelRefused."""
    num_bytes = weight_bytes(folder)
    torch.set_num_threads(settings.threads or default_threads(most_threads(), num_bytes))
    began_s = time.monotonic()
    log.info("loading %s", folder)
    model = load(str(folder), dtype=settings.dtype, max_model_len=settings.max_model_len, device=settings.device,
                 max_num_seqs=settings.max_num_seqs, quantization=settings.quantization)
    on_cpu = model.device.type == "cpu"
    few_threads = 0
    if model.is_uniform and not settings.threads:       # its bits do not depend on the number of threads
        torch.set_num_threads(most_threads())
        few_threads = default_threads(most_threads(), num_bytes, LARGE_FOR_KERNELS_BYTES)
    num_free = num_free_bytes(model.device) // max(1, settings.workers)     # each of those on one machine has its share
    prefill_chunk = settings.prefill_chunk_tokens or (CHUNK_TOKENS if on_cpu else GPU_CHUNK_TOKENS)
    try:
        engine = Engine(model, max_num_seqs=settings.max_num_seqs, max_model_len=settings.max_model_len,
                        prefill_chunk=prefill_chunk,
                        prefill_budget=settings.prefill_chunk_tokens or model.prefill_budget,
                        kv_cache_bytes=settings.kv_cache_bytes or min(
                            num_free, KV_CACHE_BYTES if on_cpu else sys.maxsize),
                        enable_prefix_caching=settings.enable_prefix_caching,
                        exact_replay_max_tokens=settings.exact_replay_max_tokens,
                        num_speculative_tokens=settings.num_speculative_tokens, numerics=settings.numerics,
                        few_threads=few_threads)
    except ValueError as error:
        raise ModelRefused(f"{folder}: {error}") from None
    engine.limit_prefill(fit_chunk(engine.prefill_budget, _time_prefill(engine), settings.lease_s / 4))
    log.info("loaded in %.1f s: %r, prefill of %d tokens at a time", time.monotonic() - began_s, engine,
             engine.prefill_budget)
    return engine


def _time_prefill(engine: Engine) -> float:
    """Seconds for a step full of prompt tokens; the second of two steps, as the first one warms up."""
    num_tokens = min(engine.prefill_budget, engine.max_model_len - 1)
    took_s = 0.0
    for name in ("warm", "timed"):
        engine.add(Request(name, (0,) * num_tokens, Sampling(max_tokens=1), salt=name))
        began_s = time.perf_counter()
        while engine.has_work:
            engine.step()
        took_s = time.perf_counter() - began_s
    engine.chunks.drop_all()
    return took_s


def fit_chunk(num_tokens: int, took_s: float, most_s: float) -> int:
    """Prompt tokens per step, halved until a step keeps the lease alive. Powers of two: equal machines, equal grids."""
    while took_s > most_s and num_tokens > MIN_CHUNK_TOKENS:
        num_tokens, took_s = num_tokens // 2, took_s / 2
    return num_tokens
