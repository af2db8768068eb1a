"""Logging: one line per event on stderr, the same shape in every process. Never prompts, never keys."""

from __future__ import annotations

import logging
import sys


def configure(process: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
