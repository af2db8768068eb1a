"""A Redis Cluster of three primaries on this machine, for tests: started, joined, and waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from redis import Redis

from deploy.redis import RedisServer
from tests.system import eventually, free_port

NUM_PRIMARIES = 3
NUM_SLOTS = 16384


@contextmanager
def cluster(folder: Path, binary: Path) -> Iterator[list[RedisServer]]:
    """The primaries, each with a third of the slots. Needs Redis 7."""
    bus_ports = [free_port() for _ in range(NUM_PRIMARIES)]
    servers = [RedisServer(folder / str(i), binary, free_port(),
                           ("--cluster-enabled", "yes", "--cluster-port", str(bus_port))).start()
               for i, bus_port in enumerate(bus_ports)]
    try:
        for i, server in enumerate(servers):
            begin, end = NUM_SLOTS * i // NUM_PRIMARIES, NUM_SLOTS * (i + 1) // NUM_PRIMARIES - 1
            ask(server, f"CLUSTER ADDSLOTSRANGE {begin} {end}")
            ask(servers[0], f"CLUSTER MEET 127.0.0.1 {server.port} {bus_ports[i]}")
        for server in servers:
            eventually("the cluster is whole", partial(is_whole, server))
        yield servers
    finally:
        for server in servers:
            server.stop()


def ask(server: RedisServer, command: str) -> Any:
    with Redis.from_url(server.url) as client:
        client_of_any: Any = client
        return client_of_any.execute_command(*command.split())


def is_whole(server: RedisServer) -> bool:
    info: bytes = ask(server, "CLUSTER INFO")
    return b"cluster_state:ok" in info and b"cluster_known_nodes:%d\r" % NUM_PRIMARIES in info
