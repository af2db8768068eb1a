"""The protocol steps at which a process may die: each named here once, and reached by wrapping the call.

An armed process kills itself at the nth passage of one point, as the kernel would: no handler runs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Room = Literal["api", "worker"]
HANG_S = 3600.0


@dataclass(frozen=True, slots=True)
class Point:
    """Before or after a call. `counts(arguments)`: whether it is a passage; `passages`: which ones are tried."""

    name: str
    room: Room
    method: str                                         # module:Class.method
    moment: Literal["before", "after"]
    counts: Callable[..., bool] = lambda *_: True
    passages: tuple[int, ...] = (1, 2, 3)


def _both(verb: str, room: Room, method: str, counts: Callable[..., bool] = lambda *_: True,
          passages: tuple[int, ...] = (1, 2, 3)) -> Iterator[Point]:
    """The points before the verb is sent, and after its reply."""
    yield Point(f"{verb}: not sent", room, method, "before", counts, passages)
    yield Point(f"{verb}: executed", room, method, "after", counts, passages)


def _writes(kind: str, *, first: bool = False) -> Callable[..., bool]:
    return lambda _, __, writes, *___: any(
        write.kind == kind and (kind == "end" or (write.position == 1) is first) for write in writes)


POINTS = {point.name: point for point in (
    *_both("submit", "api", "shared.queue:Queue.submit"),
    *_both("subscribe", "api", "api.relay:Relay.hear"),
    *_both("attend", "api", "shared.queue:Queue.attend"),
    *_both("leave", "api", "shared.queue:Queue.leave"),
    *_both("cancel", "api", "shared.queue:Queue.cancel"),
    *_both("reap by a pod", "api", "shared.queue:Queue.reap"),
    *_both("read of a log by a pod", "api", "shared.queue:Queue.read"),
    *_both("first event to the client", "api", "starlette.responses:Response.send first"),
    *_both("[DONE] to the client", "api", "starlette.responses:Response.send last"),
    *_both("claim", "worker", "shared.queue:Queue.claim"),
    *_both("first delta", "worker", "shared.queue:Queue.publish", _writes("delta", first=True)),
    *_both("delta", "worker", "shared.queue:Queue.publish", _writes("delta")),
    *_both("end", "worker", "shared.queue:Queue.publish", _writes("end")),
    *_both("read of a log that goes on", "worker", "shared.queue:Queue.read"),
    *_both("reap by a worker", "worker", "shared.queue:Queue.reap"),
    *_both("release", "worker", "shared.queue:Queue.release", passages=(1,)),    # a worker leaves once
)}


def arm(name: str, passage: int) -> None:
    """From now on this process dies at that passage of that point."""
    point = POINTS[name]
    left = passage

    def pass_by() -> None:
        nonlocal left
        left -= 1
        if not left:
            die()

    if point.method.startswith("starlette"):
        _wrap_send(point, pass_by)
    else:
        _wrap(point, pass_by)


def die_of(seed: int) -> None:
    """From now on this process dies on any job with this seed, like a prompt that breaks the engine."""
    from worker.worker import Worker

    begin = Worker._begin

    async def dying(self: Worker, claimed: Any) -> None:
        if claimed.job.sampling.seed == seed:
            die()
        await begin(self, claimed)

    Worker._begin = dying  # type: ignore[method-assign]


def hang_at(step: int) -> None:
    """The engine's nth step hangs, in this process."""
    def hang(_: Any) -> None:
        time.sleep(HANG_S)

    _before_step(step, hang)


def go_bad_at(step: int) -> None:
    """From the engine's nth step on the model's logits are NaN, in this process."""
    import torch

    def go_bad(engine: Any) -> None:
        with torch.inference_mode():
            for weight in engine.model.module.parameters():
                weight.fill_(float("nan"))

    _before_step(step, go_bad)


def _before_step(step: int, deed: Callable[[Any], None]) -> None:
    from worker.engine.engine import Engine

    left, take_step = step, Engine.step

    def after_deed(self: Engine) -> Any:
        nonlocal left
        left -= 1
        if not left:
            deed(self)
        return take_step(self)

    Engine.step = after_deed  # type: ignore[method-assign]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(point: Point, pass_by: Callable[[], None]) -> None:
    module, _, path = point.method.partition(":")
    owner_name, _, method = path.partition(".")
    owner = getattr(import_module(module), owner_name)
    wrapped = getattr(owner, method)

    async def passing(*args: Any, **kwargs: Any) -> Any:
        counts = point.counts(*args)
        if counts and point.moment == "before":
            pass_by()
        result = await wrapped(*args, **kwargs)
        if counts and point.moment == "after":
            pass_by()
        return result

    setattr(owner, method, passing)


def _wrap_send(point: Point, pass_by: Callable[[], None]) -> None:
    """What an event stream passes to the server: its first body, or its last."""
    from api.sse import EventStream

    call = EventStream.__call__

    async def passing(self: EventStream, scope: Any, receive: Any, send: Any) -> None:
        began = False

        async def sending(message: Any) -> None:
            nonlocal began
            event = message["type"] == "http.response.body" and b"data: " in message.get("body", b"")
            counts = event and (not began if point.method.endswith("first") else b"data: [DONE]" in message["body"])
            began = began or event
            if counts and point.moment == "before":
                pass_by()
            await send(message)
            if counts and point.moment == "after":
                pass_by()

        await call(self, scope, receive, sending)

    EventStream.__call__ = passing  # type: ignore[method-assign, assignment]
