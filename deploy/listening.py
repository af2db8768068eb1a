"""The socket that the API listens on, of a single pod or shared by all pods of a machine, and how many it accepts."""

from __future__ import annotations

import contextlib
import logging
import resource
import socket

from shared.errors import BrokenEnvironment

log = logging.getLogger(__name__)

BACKLOG = 1024                                          # connections that wait to be accepted
MAX_FILES = 65_536                                      # open ones, each connection is one
FEW_FILES = 4096


def bind(host: str, port: int) -> socket.socket:
    """Raises BrokenEnvironment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise BrokenEnvironment(f"cannot listen on {host}:{port} ({error.strerror}): change it with --port") from None
    listening.setblocking(False)
    return listening


def raise_file_limit() -> None:
    """As far as it goes without root. A pod that has reached it resets connections, and nothing says why."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some systems take less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        log.warning("at most %d connections at once: raise the limit of open files (ulimit -Hn)", soft)
