"""The socket that the API listens on: of a single pod, or shared by all pods of a machine."""

from __future__ import annotations

import socket

from shared.errors import BrokenEnvironment

BACKLOG = 1024                                          # connections that wait to be accepted


def bind(host: str, port: int) -> socket.socket:
    """Raises BrokenEnvironment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise BrokenEnvironment(f"cannot listen on {host}:{port} ({error.strerror}): change it with --port") from None
    listening.setblocking(False)
    return listening
