"""The lower bound for any server on this machine with a model's weights: `python -m tests.bench.floor FOLDER`.

Every step reads all weights once, however many rows it has; every token of an answer multiplies with each of them, and
every token of a prompt with all but those of the head, which only its last one needs. So the machine's read bandwidth
and its matrix rate are the floor of the time; attention, sampling and all that serves come on top. It knows weights,
rows and seconds. It knows nothing of servers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

SAVED_BYTES = 2                                         # of a weight in bfloat16, as tests.bench.models saves them
WINDOW_S = 4.0              # the best pass within it counts: other processes may disturb most of them
MATRIX = 1024                                           # rows and columns: large enough for the full rate


@dataclass(frozen=True)
class Floor:
    dtype: str                                          # what the weights are computed in
    num_threads: int
    num_weights: int
    num_head_weights: int                               # of these, the weights that turn the last layer into logits
    weight_bytes: int                                   # what one step reads
    read_bytes_per_s: float                             # of a buffer as large as the weights, so from cache if they fit
    multiply_flop_per_s: float                          # of large square matrices, by torch or packed as in a worker

    def __or__(self, other: Floor) -> Floor:
        """The better of two measurements of the same quantity: each may have been disturbed."""
        return replace(self, read_bytes_per_s=max(self.read_bytes_per_s, other.read_bytes_per_s),
                       multiply_flop_per_s=max(self.multiply_flop_per_s, other.multiply_flop_per_s))

    @property
    def read_s(self) -> float:
        """Seconds to read all weights once: the least time of a step."""
        return self.weight_bytes / self.read_bytes_per_s

    def multiply_s(self, num_weights: int) -> float:
        """Seconds to multiply with so many weights, for one token."""
        return 2 * num_weights / self.multiply_flop_per_s

    def most_tokens_per_s(self, num_rows: int, num_prompt_tokens: int, num_tokens: int) -> float:
        """For so many streams that each decode `num_tokens` after a prompt, if nothing else took time."""
        decode_s = num_tokens * max(self.read_s, num_rows * self.multiply_s(self.num_weights))
        prefill_s = num_rows * num_prompt_tokens * self.multiply_s(self.num_weights - self.num_head_weights)
        return num_rows * num_tokens / (decode_s + prefill_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model of tests.bench.models")
    parser.add_argument("--dtype", default="auto", help="as Baton's setting (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps(asdict(measure(args.folder, args.dtype, args.threads))))


def measured_apart(folder: Path, dtype: str, num_threads: int) -> Floor:
    """Measures in a process of its own: the process that measures servers does not load torch."""
    command = [sys.executable, "-m", "tests.bench.floor", str(folder), "--dtype", dtype, "--threads", str(num_threads)]
    return Floor(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def measure(folder: Path, wanted: str, num_threads: int) -> Floor:
    import torch

    from worker.model.linear import pack_linears
    from worker.model.loading import choose_dtype, read_config

    torch.set_num_threads(num_threads)
    config = read_config(folder)
    dtype = choose_dtype(config, folder, wanted, torch.device("cpu"))
    num_weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // SAVED_BYTES
    weight_bytes = num_weights * dtype.itemsize
    buffer = torch.ones(weight_bytes // torch.float32.itemsize)     # bytes are bytes: this sum is the fastest reader
    square = torch.ones(MATRIX, MATRIX, dtype=dtype)
    packed = torch.nn.Sequential(torch.nn.Linear(MATRIX, MATRIX, dtype=dtype))
    pack_linears(packed)
    read_bytes_per_s = weight_bytes / best_s(buffer.sum)
    with torch.inference_mode():
        multiply_flop_per_s = 2 * MATRIX ** 3 / min(best_s(lambda: square @ square), best_s(lambda: packed(square)))
    return Floor(str(dtype).removeprefix("torch."), num_threads, num_weights, config.vocab_size * config.hidden_size,
                 weight_bytes, read_bytes_per_s, multiply_flop_per_s)


def best_s(run: Callable[[], object]) -> float:
    seconds: list[float] = []
    while sum(seconds) < WINDOW_S:
        began_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)


if __name__ == "__main__":
    main()
