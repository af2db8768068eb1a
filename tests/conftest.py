"""What all tests share: a real Redis. `REDIS_URL`, else testcontainers where a Docker engine answers, else a binary."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from redis.asyncio import Redis
from xdist.scheduler import LoadFileScheduling

from deploy.redis import RedisServer, binaries, major
from shared import connection
from shared.connection import MIN_CLUSTER_VERSION
from shared.threads import num_cores
from tests.clients.sdk import python_with
from tests.cluster import cluster
from tests.nursery import Nursery
from tests.system import System

REPORT: list[str] = []
MAX_PROCESSES = 4                                       # each holds a Redis and torch, some 1 GiB

OLDER_SDK = "openai>=2,<3"
FORMS = ("redis", "cluster")


def can_be(binary: Path, form: str) -> bool:
    return form == "redis" or major(binary) >= MIN_CLUSTER_VERSION[0]


@pytest.fixture(scope="session")
def report() -> list[str]:
    """Lines that are shown at the end of the run."""
    return REPORT


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes that share the tests of `make test`: one more than cores, since many tests wait for time to pass. With
    a given Redis one, since its key names are shared."""
    return 0 if os.environ.get("REDIS_URL") else min(num_cores() + 1, MAX_PROCESSES)


class Lanes(LoadFileScheduling):  # type: ignore[misc]
    """Keeps a file's tests together, and all that start whole systems: two of those at once would need four cores."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "systems" if "nursery" in (self.config.rootpath / file).read_text() else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    return Lanes(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if output := getattr(session.config, "workeroutput", None):
        output["report"] = REPORT


def pytest_testnodedown(node: Any) -> None:
    """A process of several has ended: its measurements are shown with the rest."""
    REPORT.extend(getattr(node, "workeroutput", {}).get("report", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if REPORT:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(REPORT))


# The speed of a machine is not a property under test.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Before torch is loaded: two teams of threads on the same cores collapse, and other processes use them too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# And before Triton is: it runs kernels on a CPU only in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for the whole run; tests that break one start their own."""
    if url := os.environ.get("REDIS_URL"):
        yield url
    elif docker_answers():
        from testcontainers.community.redis import RedisContainer

        with RedisContainer("redis:8.8").with_command("redis-server --appendonly yes") as container:
            yield f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
    else:
        server = RedisServer(short_folder(tmp_path_factory)).start()
        yield server.url
        server.stop()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """For tests that end many processes: the import of the engine is paid once."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="session")
def system(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One pod and one worker on the built-in model, for all tests that break nothing."""
    system = System(tmp_path_factory.mktemp("system"), redis_url, allow_no_aof=True)
    system.start_all(1)
    yield system
    system.stop()


@pytest.fixture(scope="session")
def older_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the SDK of the previous major version."""
    return python_with(tmp_path_factory.mktemp("older"), OLDER_SDK, "httpx")


def docker_answers() -> bool:
    try:
        import docker

        return bool(docker.from_env(timeout=2).ping())
    except Exception:                                   # whatever a client without an engine raises
        return False


def short_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder for a unix socket, whose path may have at most 107 bytes."""
    return factory.mktemp("r")


@pytest.fixture(scope="session", params=[pytest.param((path, form), id=f"{path.parent.name}-{form}")
                                         for path in binaries() for form in FORMS if can_be(path, form)])
def each_redis_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Every Redis that this machine has, alone and as a cluster: the protocol must hold on each."""
    binary, form = request.param
    folder = short_folder(tmp_path_factory)
    if form == "cluster":
        with cluster(folder, binary) as servers:
            yield servers[0].url.replace("redis://", "redis+cluster://")
        return
    server = RedisServer(folder, binary=binary).start()
    yield server.url
    server.stop()


@pytest.fixture
async def each_redis(each_redis_url: str) -> AsyncIterator[Redis]:
    redis = connection.connect(each_redis_url)
    await redis.flushall()
    yield redis
    await redis.aclose()
