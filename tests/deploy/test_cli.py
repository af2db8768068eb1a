"""The command as a person meets it: it starts, it chats, it stops, and it says in one line what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.nursery import Nursery
from tests.system import BATON, REPOSITORY, System, eventually


def baton(*arguments: str, stdin: str = "", environment: dict[str, str] | None = None
          ) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BATON, *arguments], cwd=REPOSITORY, env=os.environ | (environment or {}), input=stdin,
                          capture_output=True, text=True, timeout=60, check=False)


def refusal(*arguments: str, **variables: str) -> str:
    """The one line that a broken environment gets."""
    ended = baton(*arguments, environment=variables)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    *_, line = ended.stderr.strip().splitlines()
    return line


def test_no_redis_is_one_line(tmp_path: Path) -> None:
    nowhere = f"unix://{tmp_path}/none.sock"
    assert "no Redis answers" in refusal("api", "--port", "0", "--redis-url", nowhere)
    assert "no Redis answers" in refusal("worker", "--redis-url", nowhere)


def test_a_wrong_setting_is_one_line() -> None:
    assert "did you mean BATON_MAX_NUM_SEQS" in refusal("api", BATON_MAX_NUM_SEQ="1")
    assert "BATON_PORT (--port)" in refusal("api", "--port", "none")


def test_a_model_is_not_taken_for_a_key() -> None:
    for model in ("/no/such/model", "owner/name"):
        line = refusal("serve", "--api-key", "k1", model)
        assert "put MODEL before the flags" in line and model not in line   # it may be a key after all
    assert "BATON_PORT" in refusal("serve", "owner/name", "--api-key", "k1", "k/2", "--port", "none")
    assert "BATON_PORT" in refusal("serve", "--api-key", "k/1,k/2", "--port", "none")


def test_a_missing_model_is_one_line(redis_url: str, tmp_path: Path) -> None:
    options = ("--redis-url", redis_url, "--allow-no-aof")
    assert str(tmp_path / "none") in refusal("worker", str(tmp_path / "none"), *options)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal("worker", str(tmp_path / "empty"), *options)


def test_a_pod_says_where_it_listens(redis_url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [*BATON, "api", "--port", "0", "--redis-url", redis_url, "--allow-no-aof"]
    with log.open("w") as stderr, subprocess.Popen(command, cwd=REPOSITORY, stderr=stderr) as pod:
        try:
            said = eventually("it says where", lambda: re.search(r"listening on (http://127\S+)", log.read_text()))
            assert httpx.get(f"{said[1]}/health").status_code == 200
        finally:
            pod.terminate()


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refusal("serve", "--port", port)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (str(tmp_path / "file"), "~nouser/x"):
        line = refusal("serve", "--port", "0", "--data-dir", folder, REDIS_URL="")
        assert folder in line and "--data-dir" in line


@pytest.mark.parametrize("command", ["serve", "api", "worker", "chat"])
def test_every_command_has_help(command: str) -> None:
    helped = baton(command, "--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith(f"usage: baton {command}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`baton serve` as it stands in the README, but on a free port and with two pods."""
    data = tmp_path_factory.mktemp("s")
    log = (data / "log").open("w+")
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    command = [*BATON, "serve", "--port", "0", "--apis", "2", "--data-dir", str(data)]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                               stderr=subprocess.STDOUT, text=True)

    def ready() -> re.Match[str] | None:
        text = Path(log.name).read_text()
        assert process.poll() is None, text
        return re.search(r"Baton is ready at (\S+)", text)

    url = eventually("baton serve is ready", ready, 90)[1]
    yield process, url
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_serve_starts_everything_and_chat_talks_to_it(served: tuple[subprocess.Popen[str], str]) -> None:
    _, url = served
    talk = baton("chat", "--url", url, stdin="Count from 1 to 10.\n/quit\n")
    assert talk.returncode == 0, talk.stderr
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9, 10" in talk.stdout


def test_the_only_model_needs_no_name_to_count_tokens(served: tuple[subprocess.Popen[str], str]) -> None:
    for path, fields in (("tokenize", {"prompt": "a", "add_special_tokens": None}), ("detokenize", {"tokens": [97]})):
        assert httpx.post(f"{served[1]}/{path}", json=fields).status_code == 200


def test_a_worker_that_dies_is_started_again(served: tuple[subprocess.Popen[str], str]) -> None:
    process, url = served
    (worker,) = [child for child in psutil.Process(process.pid).children() if "worker" in child.cmdline()]
    worker.kill()
    eventually("another worker runs", lambda: [
        child for child in psutil.Process(process.pid).children()
        if child.pid != worker.pid and "worker" in child.cmdline()])
    body = {"model": "baton-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200


def test_a_redis_that_dies_is_started_again_and_no_stream_is_lost(served: tuple[subprocess.Popen[str], str]) -> None:
    process, url = served
    body = {"model": "baton-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        lines = filter(None, answer.iter_lines())
        begun = [next(lines), next(lines)]
        (redis,) = [child for child in psutil.Process(process.pid).children() if "redis" in child.name()]
        redis.kill()
        rest = list(lines)
    assert begun and rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 400
    asked = body | {"max_tokens": 4, "stream": False, "stream_options": None}
    assert httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).status_code == 200
    children = psutil.Process(process.pid).children()
    assert redis.pid not in {child.pid for child in children} and len(children) >= 4


def test_ctrl_c_ends_every_child(served: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = served
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 4                           # Redis, two pods, a worker
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    eventually("no child is left", lambda: not any(child.is_running() for child in children))


def test_chat_without_a_service_is_one_line() -> None:
    assert "baton serve" in refusal("chat", "--url", "http://127.0.0.1:9")


def test_other_names_and_keys_are_served(redis_url: str, nursery: Nursery, tmp_path: Path) -> None:
    """`--served-model-name` takes several names, the first is the canonical one; `--api-key` closes the door."""
    name = "meta-llama/Llama-3.1-8B-Instruct"
    system = System(tmp_path, redis_url, allow_no_aof=True, served_model_name=f"{name},alias", api_key="k1,k2",
                    start=nursery.start)
    try:
        system.start_worker()
        url = system.start_pod()
        eventually("the model is announced", lambda: name in httpx.get(f"{url}/ready").json().get("models", []), 60)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        with httpx.Client(base_url=url, headers={"authorization": "Bearer k2"}, timeout=30) as client:
            assert {m["id"] for m in client.get("/v1/models").json()["data"]} >= {"alias", name}
            assert client.get(f"/v1/models/{name}").json()["id"] == name
            for asked in (name, "alias"):
                body = {"model": asked, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
                assert client.post("/v1/chat/completions", json=body).json()["model"] == asked
    finally:
        system.stop()


def test_an_idle_pod_is_small(system: System) -> None:
    """The goal is 120 MB with the built-in model; torch is never imported."""
    pod = psutil.Process(system.pods[system.url].popen.pid)
    assert pod.memory_info().rss < 120 << 20
    maps = {Path(mapped.path).name for mapped in pod.memory_maps()}
    assert not any(name.startswith("libtorch") for name in maps)


