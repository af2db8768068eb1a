"""`make bench-peers`: Baton beside vLLM's CPU build and `transformers serve`, on random models of llama's shape.

One client sends each the same prompts for the same number of tokens. They take turns, and are stopped while another is
measured. A peer that cannot be installed, started or measured here is reported in one line.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from shared.settings import Settings
from tests.bench import client
from tests.bench.client import Timing
from tests.bench.floor import Floor, measured_apart
from tests.bench.models import SHAPES, prompt
from tests.bench.peer_install import REQUIREMENTS, PeerFailed, install
from tests.bench.peer_servers import CORES, Server, start_ours, start_peer
from tests.bench.run import summary

CACHE = Path("~/.cache/baton-peers")
OURS = "baton"
WARM_UP, WARM_UP_TOKENS = 4, 8                          # requests at most, and of each, at the start of each turn
REQUEST_TIMEOUT_S = 1800.0                              # 64 prompts at once on half a billion weights take minutes
COLUMNS = ("streams", "server", "tok/s", "ours ÷", "TTFT p50", "p99", "per token", "gap p50", "p99", "RSS", "PSS",
           "of reads", "of floor", "steal", "others")
LEGEND = """\
times in ms; per token: mean of a request, p50; gap: between two events, which may carry several tokens. Memory in MiB,
of all processes, the most at the end of a turn (RSS counts shared pages for each). ours ÷: our tok/s by theirs, median
of rounds. of reads: the time to read all weights once, by the time per token. of floor: tok/s, by what reading and
multiplying alone would allow, prompts included. steal, others: of the machine's CPU time, while measured."""


@dataclass
class Turn:
    timings: list[Timing]
    took_s: float
    rss_bytes: int
    pss_bytes: int
    steal: float                                        # of the CPU time of all cores
    others: float                                       # the same: neither the server nor this client


@dataclass
class Measured:
    """The measurements of one model."""

    floors: dict[str, Floor]
    start_s: dict[str, float] = field(default_factory=dict)     # from nothing to the first token
    failures: dict[str, str] = field(default_factory=dict)
    turns: dict[int, dict[str, list[Turn]]] = field(default_factory=dict)       # by concurrency and server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="by their number of weights")
    parser.add_argument("--peers", nargs="*", choices=REQUIREMENTS, default=list(REQUIREMENTS), help="beside Baton")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32, 64], help="streams at once")
    parser.add_argument("--rounds", type=int, default=5, help="in each of which every server has a turn")
    parser.add_argument("--requests", type=int, default=3, help="of each stream in a turn")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each prompt")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of the peers; auto: what Baton computes in here")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where peers and models are kept")
    parser.add_argument("--markdown", action="store_true", help="the rows once more, for a document")
    args = parser.parse_args()
    args.cache = args.cache.expanduser().absolute()
    signal.signal(signal.SIGTERM, end_in_order)
    environments, failures = bring(args)
    for name in args.models:
        measured = measure(args, saved_model(args, name), environments)
        measured.failures = failures | measured.failures
        show(args, name, measured)


def end_in_order(*_: object) -> None:
    """Otherwise frozen servers would remain. `timeout` sends the signal twice: the second must not interrupt this."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def bring(args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """The peers' environments, and why the others have none."""
    environments, failures = {}, {}
    for peer in args.peers:
        try:
            environments[peer] = install(peer, args.cache)
        except PeerFailed as failure:
            failures[peer] = f"not installed: {failure}"
    return environments, failures


def saved_model(args: argparse.Namespace, name: str) -> Path:
    folder: Path = args.cache / "models" / name
    if not (folder / "tokenizer.json").exists():        # saved last
        subprocess.run([sys.executable, "-m", "tests.bench.models", name, folder], check=True)
    return folder


def measure(args: argparse.Namespace, model: Path, environments: dict[str, Path]) -> Measured:
    measured = Measured(measure_floors(args, model, environments))
    dtype = args.dtype if args.dtype != "auto" else measured.floors[OURS].dtype
    num_kv_tokens = 2 * max(args.concurrency) * (args.prompt_tokens + args.tokens)
    running: dict[str, Server] = {}
    with tempfile.TemporaryDirectory(prefix="baton-peers-") as folder:
        starts: dict[str, Callable[[], Server]] = {OURS: partial(start_ours, Path(folder), model)}
        starts |= {peer: partial(start_peer, peer, Path(folder), environment, model, dtype, num_kv_tokens)
                   for peer, environment in environments.items()}
        try:
            for name, start in starts.items():
                with noted(name, measured, running):
                    print(f"{model.name}: starting {name}", file=sys.stderr)
                    began_s = time.perf_counter()
                    running[name] = start()
                    ask(args, running[name], range(1), 1, num_tokens=1)
                    measured.start_s[name] = time.perf_counter() - began_s
                    running[name].freeze()
            for concurrency in args.concurrency:
                measured.turns[concurrency] = take_turns(args, concurrency, running, measured)
        finally:
            with ExitStack() as stack:                  # each is stopped, even if stopping another fails
                for server in running.values():
                    stack.callback(server.stop)
    for name, floor in measure_floors(args, model, environments).items():
        measured.floors[name] |= floor                  # before and after: the machine is not always quiet
    return measured


def measure_floors(args: argparse.Namespace, model: Path, environments: dict[str, Path]) -> dict[str, Floor]:
    """Of ours and of each peer, which differ in threads and may differ in the number type."""
    settings = Settings()
    ours = measured_apart(model, settings.dtype, settings.threads or CORES)
    dtype = args.dtype if args.dtype != "auto" else ours.dtype
    return {OURS: ours} | (dict.fromkeys(environments, measured_apart(model, dtype, CORES)) if environments else {})


@contextmanager
def noted(name: str, measured: Measured, running: dict[str, Server]) -> Iterator[None]:
    """A peer that fails gets no further turns; without ours there is nothing to compare."""
    try:
        yield
    except (PeerFailed, OSError, AssertionError, psutil.Error) as failure:
        if name == OURS:
            raise
        measured.failures[name] = str(failure) or type(failure).__name__
        if server := running.pop(name, None):
            server.stop()


def take_turns(args: argparse.Namespace, concurrency: int, running: dict[str, Server],
               measured: Measured) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {name: [] for name in running}
    num_requests = args.requests * concurrency
    for number in range(args.rounds):
        # Prompts that no server has seen, the same for all: cached prefixes do not help.
        begin = 1_000_000 * concurrency + 10_000 * number
        for name, server in list(running.items()):
            with noted(name, measured, running):
                print(f"{concurrency} streams, round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
                server.thaw()
                ask(args, server, range(begin - min(WARM_UP, concurrency), begin), concurrency, WARM_UP_TOKENS)
                turns[name].append(take_turn(args, server, range(begin, begin + num_requests), concurrency))
                server.freeze()
    return turns


def take_turn(args: argparse.Namespace, server: Server, numbers: range, concurrency: int) -> Turn:
    ours = [*server.processes(), psutil.Process()]
    before, ours_before_s = psutil.cpu_times(), cpu_s(ours)
    timings, took_s = ask(args, server, numbers, concurrency, args.tokens)
    after, ours_s = psutil.cpu_times(), cpu_s(ours) - ours_before_s
    short = [timing for timing in timings if timing.num_tokens != args.tokens]
    if short:
        raise PeerFailed(f"{len(short)} of {len(timings)} answers have not {args.tokens} tokens")
    steal_s = after.steal - before.steal if hasattr(after, "steal") else 0.0
    busy_s = sum(getattr(after, name) - getattr(before, name) for name in ("user", "nice", "system"))
    memory = [process.memory_full_info() for process in server.processes()]
    whole_s = took_s * psutil.cpu_count()
    return Turn(timings, took_s, sum(each.rss for each in memory), sum(getattr(each, "pss", 0) for each in memory),
                steal_s / whole_s, max(0.0, busy_s - ours_s) / whole_s)


def cpu_s(processes: list[psutil.Process]) -> float:
    return sum((times.user + times.system for times in (process.cpu_times() for process in processes)), 0.0)


def ask(args: argparse.Namespace, server: Server, numbers: range, concurrency: int,
        num_tokens: int) -> tuple[list[Timing], float]:
    bodies = [{"model": server.model, "messages": prompt(number, args.prompt_tokens), "max_tokens": num_tokens,
               "temperature": 0, **server.fields} for number in numbers]
    return asyncio.run(client.run(server.url, bodies, concurrency, REQUEST_TIMEOUT_S))


def show(args: argparse.Namespace, model: str, measured: Measured) -> None:
    table = Table(title=f"{model}: {args.rounds} rounds of {args.requests} requests of each stream, "
                        f"{args.prompt_tokens} + {args.tokens} tokens, {psutil.cpu_count()} cores")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    lines = [[str(concurrency), *line] for concurrency, turns in measured.turns.items()
             for line in rows(args, concurrency, turns, measured.floors)]
    for line, after in zip(lines, [*lines[1:], [""]], strict=True):
        table.add_row(*line, end_section=line[0] != after[0])
    Console(width=150).print(table, LEGEND, *facts(measured), sep="\n", highlight=False)
    if args.markdown:
        print("", *("| " + " | ".join([model, *line]) + " |" for line in lines), sep="\n")


def rows(args: argparse.Namespace, concurrency: int, turns: dict[str, list[Turn]],
         floors: dict[str, Floor]) -> Iterator[list[str]]:
    for name, of_server in turns.items():
        if not of_server:
            continue
        all_in_all = summary([timing for turn in of_server for timing in turn.timings],
                             sum(turn.took_s for turn in of_server))
        floor = floors[name]
        most_tokens_per_s = floor.most_tokens_per_s(concurrency, args.prompt_tokens, args.tokens)
        ratio = statistics.median(theirs.took_s / ours.took_s
                                  for ours, theirs in zip(turns[OURS], of_server, strict=False))
        yield [name, f"{all_in_all['tokens_per_s']:,.1f}", "" if name == OURS else f"{ratio:.2f}",
               *(f"{all_in_all[key]:,.1f}" for key in ("ttft_p50_ms", "ttft_p99_ms", "per_token_ms", "gap_p50_ms",
                                                      "gap_p99_ms")),
               f"{max(turn.rss_bytes for turn in of_server) >> 20:,}",
               f"{max(turn.pss_bytes for turn in of_server) >> 20:,}",
               f"{1000 * floor.read_s / all_in_all['per_token_ms']:.0%}",
               f"{all_in_all['tokens_per_s'] / most_tokens_per_s:.0%}",
               *(f"{statistics.mean(shares):.0%}" for shares in zip(*((turn.steal, turn.others) for turn in of_server),
                                                                   strict=True))]


def facts(measured: Measured) -> Iterator[str]:
    for name, floor in measured.floors.items():
        if name in measured.start_s:
            yield (f"{name}: first token {measured.start_s[name]:.1f} s after its start; {floor.dtype}, "
                   f"{floor.num_threads} threads, on which {floor.weight_bytes >> 20:,} MiB of weights are read at "
                   f"{floor.read_bytes_per_s / 1e9:.1f} GB/s (one row: at most {1 / floor.read_s:,.1f} tok/s) and "
                   f"multiplied at {floor.multiply_flop_per_s / 1e9:.0f} GFLOP/s")
    yield from (f"{name}: {failure}" for name, failure in measured.failures.items())


if __name__ == "__main__":
    main()
