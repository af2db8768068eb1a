"""Tries grammars in processes of their own, with limits of time, memory and stack: a bad one cannot harm the caller.

A server process holds the tokenizer and forks for each trial, which ends itself at its limits. The server is reached
through one socket, over which it receives a further socket for each trial. It ends when the process that started it
does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from threading import BoundedSemaphore, Lock
from typing import Any, NamedTuple

from shared import threads
from shared.errors import InvalidGrammar, Unavailable
from shared.grammar import MAKERS, MAX_GRAMMAR_CHARS, TOO_LONG, TRIAL_STEPS, Grammars

log = logging.getLogger(__name__)

CPU_S = 0.5                 # per trial
WALL_S = 10.0               # per trial, when other processes compete for the cores
STACK_BYTES = threads.STACK_BYTES // 2                  # the thread that compiles it later has more
HEAP_BYTES = 256 << 20      # while compiling,
KEPT_BYTES = 64 << 20       # and for the compiled grammar
NICENESS = 5
START_S = 60.0              # until the tokenizer is loaded
EXIT_S = 1.0                # wait for the exit code of a server that did not start
MAX_AT_ONCE = 2
MAX_WAIT_S = 5.0            # for other trials to end
MAX_KNOWN = 4096            # verdicts,
MAX_KNOWN_CHARS = 16 << 20  # and characters of the grammars in them
TOO_MUCH = "This cannot be enforced: it takes too much work or memory."
NOT_UNDERSTOOD = "This cannot be enforced: it has a part that is not understood."
MAX_ASKED_BYTES = 8 * MAX_GRAMMAR_CHARS
BEGUN, FAILED = b"\1", b"\2"                            # sent before anything else; sent in place of a verdict


class Verdict(NamedTuple):
    grammar: str                                        # as it travels with a job; empty: refused
    refusal: str


class Trials:
    """Makes and checks grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._made_of = tokenizer_json, vocab_size, eos_token_ids
        self._server: Server | None = None
        self._known = OrderedDict[bytes, Verdict]()     # by the hash of what was asked
        self._num_chars = 0                             # of their grammars
        self._lock, self._starts, self._places = Lock(), Lock(), BoundedSemaphore(MAX_AT_ONCE)

    def make(self, kind: str, value: Any) -> str:
        """The grammar of a constraint (`MAKERS`), tried. Raises InvalidGrammar, or Unavailable without a process."""
        asked = json.dumps([kind, value]).encode()
        if len(asked) > MAX_ASKED_BYTES:
            raise InvalidGrammar(TOO_LONG)
        digest = hashlib.sha256(asked).digest()
        with self._lock:
            verdict = self._known.get(digest)
        if verdict is None:
            if not self._places.acquire(timeout=MAX_WAIT_S):
                raise Unavailable(retry_after_s=MAX_WAIT_S)
            try:
                verdict = self._try(asked)
            finally:
                self._places.release()
        with self._lock:
            if digest not in self._known:
                self._num_chars += len(verdict.grammar)
            self._known[digest] = verdict
            self._known.move_to_end(digest)
            while len(self._known) > MAX_KNOWN or self._num_chars > MAX_KNOWN_CHARS:
                self._num_chars -= len(self._known.popitem(last=False)[1].grammar)
        if verdict.refusal:
            raise InvalidGrammar(verdict.refusal)
        return verdict.grammar

    def _try(self, asked: bytes) -> Verdict:
        for _ in range(2):
            try:
                server = self._started()
                began_s = time.monotonic()
                begun, answer = server.ask(asked).partition(BEGUN)[1:]
            except OSError as error:
                log.warning("no grammar can be tried: %s", error)
                break
            if begun and answer not in (b"", FAILED):
                return Verdict(*json.loads(answer))
            if begun and not answer and time.monotonic() - began_s < WALL_S:
                return Verdict("", TOO_MUCH)            # it ended itself at one of its limits
            if begun:
                log.warning("a trial of a grammar failed or took too long")
                break
            with self._starts:                          # the server has ended, or cannot fork
                self._server = None if self._server is server else self._server
        raise Unavailable(retry_after_s=1.0)

    def _started(self) -> Server:
        """Raises OSError."""
        with self._starts:
            self._server = self._server or Server(json.dumps(self._made_of).encode())
            return self._server


class Server:
    """Raises OSError when it cannot be started."""

    def __init__(self, what: bytes) -> None:
        self._door, theirs = socket.socketpair()
        command = "import sys; from shared.trial import serve; serve(int(sys.argv[1]))"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", command, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        self._end = weakref.finalize(self, _end, self._door, self._process)
        if self.ask(what, START_S) != BEGUN:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_S)
            raise ChildProcessError(f"its server does not start (exit code {self._process.returncode})")

    def ask(self, what: bytes, timeout_s: float = WALL_S + 1) -> bytes:
        """The answer, read until the other side closes."""
        ours, theirs = socket.socketpair()
        with ours, contextlib.suppress(OSError):
            with theirs:
                socket.send_fds(self._door, [b"\0"], [theirs.fileno()])
            ours.settimeout(timeout_s)
            ours.sendall(what)
            ours.shutdown(socket.SHUT_WR)
            return _read(ours)
        return b""


def _end(door: socket.socket, process: subprocess.Popen[bytes]) -> None:
    door.close()
    process.kill()                                      # running trials end by themselves
    process.wait()


def serve(door_fd: int) -> None:
    """Receives what makes the tokenizer first, then what to try."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)       # no process waits for trials
    os.nice(NICENESS)
    with socket.socket(fileno=door_fd) as door:
        with _receive(door) as made:
            tokenizer_json, vocab_size, eos_token_ids = json.loads(_read(made))
            grammars = Grammars(tokenizer_json, vocab_size, eos_token_ids)
            grammars.prepare()
            made.sendall(BEGUN)
        with contextlib.suppress(EOFError):
            while True:
                with _receive(door) as asked:
                    _try(grammars, asked)


def _try(grammars: Grammars, asked: socket.socket) -> None:
    with contextlib.suppress(OSError):                  # no room for another process
        if os.fork() != 0:
            return
        try:
            asked.sendall(BEGUN)
            asked.sendall(json.dumps(_judge(grammars, _read(asked))).encode())
        except MemoryError:
            pass                                        # ends as at any other limit
        except Exception:
            asked.sendall(FAILED)
        finally:
            os._exit(0)


def _judge(grammars: Grammars, asked: bytes) -> Verdict:
    before = _data_bytes()
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    signal.setitimer(signal.ITIMER_REAL, WALL_S)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_STACK, STACK_BYTES)
    if before:
        _limit(resource.RLIMIT_DATA, before + HEAP_BYTES)
    try:
        kind, value = json.loads(asked)
        grammar = MAKERS[kind](value)
        _kept = grammars.compile(grammar, TRIAL_STEPS)
        return Verdict("", TOO_MUCH) if _data_bytes() - before > KEPT_BYTES else Verdict(grammar, "")
    except InvalidGrammar as error:
        return Verdict("", str(error))
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError):       # it would be so every time
        return Verdict("", NOT_UNDERSTOOD)


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _data_bytes() -> int:
    """Bytes of the heap and all other private data; 0 where the system does not report it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        return 0


def _receive(door: socket.socket) -> socket.socket:
    """Raises EOFError when the caller has closed the socket."""
    _, fds, _, _ = socket.recv_fds(door, 1, 1)
    if not fds:
        raise EOFError
    return socket.socket(fileno=fds[0])


def _read(source: socket.socket) -> bytes:
    pieces = []
    while piece := source.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)
