"""Removes parts of the protocol, to test the judges: with each of these a chaos run must fail.

Each patches the process that calls it, and fails when the code to patch has changed.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

STEP_S = 0.012                                          # of a slow worker: 500 tokens take six leases


def no_fence() -> None:
    """The log accepts everything: no fence is written, no epoch raised, nothing refused for being late.

    Nor are publishes counted, or asking whether a job is still held answered: each alone may tell a worker that it lost
    its jobs.
    """
    from shared import queue

    module: Any = queue
    script = module._script
    no_refusal = """
      local newest = redis.call('XREVRANGE', out, '+', '-', 'COUNT', 1)[1]
      if newest[2][6] == 'end' then return 'refused' end
      local epoch, k = string.match(newest[1], '(%d+)-(%d+)')
      redis.call('XADD', out, epoch .. '-' .. k + 1,
                 'position', position, 'tokens', tokens, 'kind', kind, 'data', data)
      if added then return 'ok' end
    """
    spoilt = {
        "if string.find(added.err, 'equal or smaller', 1, true) then return 'refused' end": no_refusal,
        "append(job, (epoch + 1) .. '-0', position, tokens, 'fence', '\"' .. QUEUED .. '\"')\n": "\n",
        "if not epoch or append(j.job, (epoch + 1) .. '-0',": "if not epoch or epoch == 0 and append(j.job, '1-0',"}
    assert all(right in script("claim", "PUBLISH") for right in spoilt)
    clues = {"if sequence > 1 and before ~= sequence - 1 and before ~= sequence then return {'behind'} end": "",
             "return is_held and 'ok' or 'refused'": "return 'ok'"}
    assert all(right in script("publish", "PUBLISH") for right in clues)

    def unfenced(verb: str, publish: str) -> str:
        text: str = script(verb, publish)
        for right, wrong in (spoilt | clues).items():
            text = text.replace(right, wrong)
        return text

    module._script = unfenced


def no_positions() -> None:
    """A pod relays whatever is pushed, be it old, repeated or ahead."""
    from api.relay import Stream

    def push(self: Any, entry: Any) -> None:
        self._pending.append(entry)
        self._wake.set()

    Stream.push = push  # type: ignore[method-assign]


def any_tokenizer() -> None:
    """A claim accepts answers begun with another tokenizer."""
    from shared import queue

    module: Any = queue
    script = module._script
    tokenizer = "if f[1] ~= ARGV[5] then return nil end\n"
    weights = "if f[2] ~= ARGV[6] and ARGV[12] ~= '1' and has_started(job) then return nil end\n"
    assert tokenizer in script("claim", "PUBLISH") and weights in script("claim", "PUBLISH")
    module._script = lambda *verb: script(*verb).replace(tokenizer, "").replace(weights, "")


def other_digits() -> None:
    """Not sabotage but a trap: a worker whose vocabulary has other digits, without announcing it."""
    from worker import announce as module
    from worker.worker import Worker

    announce: Any = module
    make_card = announce.make_card

    def odd_card(*args: Any) -> Any:
        card = make_card(*args)
        tokenizer = json.loads(card.tokenizer_json)
        vocab = tokenizer["model"]["vocab"]
        ids = [vocab[digit] for digit in "0123456789"]
        vocab |= dict(zip("0123456789", ids[1:] + ids[:1], strict=True))
        return replace(card, tokenizer_json=json.dumps(tokenizer))

    announce.make_card = odd_card
    Worker._announce = lambda self: None  # type: ignore[method-assign]


def slow_steps() -> None:
    """Nor is this: on any machine an answer lasts long enough for a frozen worker to return while another writes it."""
    from worker.engine.engine import Engine

    step = Engine.step

    def slow(self: Any) -> Any:
        time.sleep(STEP_S)
        return step(self)

    Engine.step = slow  # type: ignore[method-assign]


SABOTAGES = {"fence": no_fence, "position": no_positions, "tokenizer": any_tokenizer, "other digits": other_digits,
             "slow": slow_steps}
