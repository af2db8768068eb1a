"""Real clients, unmodified: what each scenario must come to, whichever SDK plays it.

player.py and player.mjs play them, as applications have them; here stands what they must say. Of the SDKs the test run
tries those for Python; with BATON_TEST_CLIENTS=all, as `make test-clients` sets it, those for node as well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from api.limits import MIN_RETRY_S
from shared.job import Finish
from tests.clients.sdk import node_with
from tests.nursery import Nursery
from tests.system import MODEL, System, eventually

FOLDER = Path(__file__).parent
PLAY_S = 60.0
KEY = "sesame"
TWELVE = ", ".join(map(str, range(1, 13)))
IN_PARIS = {"called": [{"city": "Paris"}], "text": "It is sunny in Paris, 21 degrees."}
ANNA = {"name": "Anna", "age": 30}


@pytest.fixture(scope="module")
def system(redis_url: str, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A worker, a pod that is open to all, and one that wants a key and grants it one answer at once."""
    system = System(tmp_path_factory.mktemp("clients"), redis_url, allow_no_aof=True, disconnect_grace_s=0.1,
                    served_model_name=f"{MODEL}-clients", start=nursery.start)
    system.start_worker()
    system.start_pod()
    system.start_pod(api_key=KEY, max_tenant_choices=1)
    system.await_workers(1)
    yield system
    system.stop()


# ── the clients ──


class Client:
    """A player's process: it is told a scenario in a line, and answers in one."""

    def __init__(self, language: str, command: list[str], system: System) -> None:
        url, locked_url = system.pods
        self._process = subprocess.Popen([*command, f"{url}/v1", f"{locked_url}/v1", KEY, system.model],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = f"openai-{language} {self._read()['version']}"

    def play(self, scenario: str) -> Any:
        """What the player tells, or its trace."""
        assert self._process.stdin
        self._process.stdin.write(f"{scenario}\n")
        self._process.stdin.flush()
        answer = self._read()
        assert "failed" not in answer, f"{self.name} failed:\n{answer['failed']}"
        return answer["told"]

    def _read(self) -> Any:
        assert self._process.stdout
        patience = Timer(PLAY_S, self._process.kill)
        patience.start()
        line = self._process.stdout.readline()
        patience.cancel()
        assert line, f"the player has ended, or said nothing for {PLAY_S:.0f} s"
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def node(folder: Path, *packages: str) -> list[str]:
    program = node_with(folder, "zod@4", *packages)
    return [program, shutil.copy(str(FOLDER / "player.mjs"), str(folder))]


def python(fixture: str | None, request: pytest.FixtureRequest) -> list[str]:
    return [request.getfixturevalue(fixture) if fixture else sys.executable, str(FOLDER / "player.py")]


PYTHONS = {"python": None, "python, openai 2": "older_python"}
# 7 asks for a newer node than 6; npm has that too.
NODES = {"node, openai 7": ("openai@^7", "node@22"), "node, openai 6": ("openai@^6",)}
CLIENTS = [*PYTHONS, *(NODES if os.environ.get("BATON_TEST_CLIENTS") == "all" else ())]


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest, system: System, tmp_path_factory: pytest.TempPathFactory
           ) -> Iterator[Client]:
    if request.param in PYTHONS:
        client = Client("python", python(PYTHONS[request.param], request), system)
    else:
        client = Client("node", node(tmp_path_factory.mktemp("node"), *NODES[request.param]), system)
    yield client
    client.close()


# ── what a scenario must come to ──


def says_twelve(told: Any) -> None:
    assert (told["text"], told["finish_reason"]) == (TWELVE, "stop")
    usage = told["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len(TWELVE) + 1, "a byte is a token, and so is the end"


def says_twelve_in_snapshots(told: Any) -> None:
    says_twelve(told)
    assert told["snapshot"] == TWELVE


def responds_twelve(told: Any) -> None:
    assert (told["status"], told["text"], told["num_tokens"]) == ("completed", TWELVE, len(TWELVE) + 1)


def responds_twelve_in_events(told: Any) -> None:
    responds_twelve(told)
    assert told["streamed"] == TWELVE
    assert told["numbers"] == list(range(len(told["numbers"])))


def responds_twelve_later(told: Any) -> None:
    responds_twelve(told)
    assert told["began"] == "queued"


def comes_back_when_told(told: Any) -> None:
    """No sooner than the header says, which is longer than an SDK waits by itself."""
    says_twelve(told)
    assert told["retries"] >= 1
    assert told["waited_s"] >= MIN_RETRY_S * told["retries"]


def calls_what_fits(told: Any) -> None:
    assert told["finish_reason"] == "tool_calls"
    ((name, arguments),) = told["calls"]
    assert set(arguments) == {"get_weather": {"city"}, "add": {"a", "b"}}[name]


def calls_what_was_named(told: Any) -> None:
    assert told["finish_reason"] == "stop"
    ((name, arguments),) = told["calls"]
    assert (name, set(arguments)) == ("add", {"a", "b"})
    assert all(isinstance(value, int) for value in arguments.values())


def goes_on_with_the_text(told: Any) -> None:
    assert told["text"] == told["streamed"] == "4, 5, 6,"
    assert told["num_tokens"] == 8


def lists_the_model(told: Any) -> None:
    assert told["retrieved"] == f"{MODEL}-clients" and told["retrieved"] in told["listed"]


def comes_to(expected: Any) -> Callable[[Any], None]:
    def judge(told: Any) -> None:
        assert told == expected

    return judge


SCENARIOS: dict[str, Callable[[Any], None]] = {
    "chat_whole": says_twelve,
    "chat_stream": says_twelve,
    "chat_stream_helper": says_twelve_in_snapshots,
    "chat_parse": comes_to(ANNA),
    "chat_stored": comes_to({"is_same": True, "is_listed": True, "messages": ["Count from 1 to 12."],
                             "metadata": {"of": "nobody"}, "deleted": True,
                             "then": ["NotFoundError", 404, "completion_not_found", None]}),
    "tools_run": comes_to(IN_PARIS),
    "tools_run_stream": comes_to(IN_PARIS),
    "tool_required": calls_what_fits,
    "tool_named": calls_what_was_named,
    "refused": comes_to({"model": ["NotFoundError", 404, "model_not_found", "model"],
                         "value": ["BadRequestError", 400, "invalid_value", "temperature"],
                         "key": ["AuthenticationError", 401, "invalid_api_key", None]}),
    "retry": comes_back_when_told,
    "text": goes_on_with_the_text,
    "models": lists_the_model,
    "response": responds_twelve,
    "response_stream_helper": responds_twelve_in_events,
    "response_parse": comes_to(ANNA),
    "response_background": responds_twelve_later,
    "response_follows": comes_to({"text": "Your name is Anna.", "is_linked": True, "items": [
        ["user", "My name is Anna."], ["assistant", "Nice to meet you, Anna!"], ["user", "What is my name?"]]}),
    "response_deleted": comes_to(["NotFoundError", 404, "response_not_found", None]),
    "response_tools": comes_to(IN_PARIS),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_real_client_has_what_it_expects(scenario: str, client: Client, record_property: Callable[..., None]) -> None:
    record_property("client", client.name)
    record_property("scenario", scenario)
    SCENARIOS[scenario](client.play(scenario))


MAX_TRIALS = 5              # to leave while an answer runs


@pytest.mark.parametrize("scenario", ["chat_abort", "response_abort"])
def test_who_leaves_in_mid_stream_ends_the_job(scenario: str, client: Client, system: System,
                                               record_property: Callable[..., None]) -> None:
    """It is cancelled, and nobody computes it any more. The longest answer takes a second: some end before that."""
    record_property("client", client.name)
    record_property("scenario", scenario)

    def error_of_one() -> str | None:
        completion_id = client.play(scenario)["id"]
        eventually("no job lives", lambda: system.num_live_jobs() == 0)
        _, terminal = system.log_entries(completion_id)[-1]
        return Finish.decode(terminal["data"]).error

    assert "cancelled" in (error_of_one() for _ in range(MAX_TRIALS))
