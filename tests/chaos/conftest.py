"""One nursery for all tests of this folder: what it costs to import the engine is paid once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.nursery import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery
