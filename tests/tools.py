"""Tools that a machine may lack. Without one a test names it and is skipped; if all are required, it fails."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

# Beside our own Python, and where Debian keeps servers, which is not on everyone's PATH.
MORE_PLACES = (str(Path(sys.executable).parent), "/usr/sbin", "/usr/local/sbin")


def require_tool(name: str) -> str:
    """The path of the program `name`; else the test is skipped, or fails when BATON_TEST_REQUIRE=all."""
    places = os.pathsep.join((*MORE_PLACES, os.environ.get("PATH", os.defpath)))
    if path := shutil.which(name, path=places):
        return path
    lack(f"{name} is not installed")


def require_package(name: str) -> None:
    """At the head of a module: without the package all its tests are skipped, or fail when BATON_TEST_REQUIRE=all."""
    if find_spec(name) is None:
        lack(f"the package {name} is not installed")


def lack(reason: str) -> NoReturn:
    """Skips the test, or the module, or fails it where everything is required."""
    if os.environ.get("BATON_TEST_REQUIRE") == "all":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)
