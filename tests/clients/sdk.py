"""SDKs that the environment does not hold, each in a folder of its own, and what runs an application that uses them.

It knows how they are installed; it does not know what they are asked.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tools import lack, require_tool

MIN_NODE = 20
INSTALL_S = 240.0


def python_with(folder: Path, *requirements: str) -> str:
    """A Python that has these packages and no other."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = str(folder / "bin" / "python")
    _install([sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet",
              *requirements], requirements)
    return python


def node_with(folder: Path, *packages: str) -> str:
    """A node for programs in this folder, where these packages are: one of them, or the machine's."""
    node, npm = require_tool("node"), require_tool("npm")
    version = subprocess.run([node, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < MIN_NODE:
        lack(f"node {MIN_NODE} is not installed: {node} is {version}")
    _install([npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--no-package-lock", "--silent",
              *packages], packages)
    own = folder / "node_modules" / ".bin" / "node"
    return str(own) if own.exists() else node


def _install(command: list[str], packages: tuple[str, ...]) -> None:
    if subprocess.run(command, check=False, capture_output=True, timeout=INSTALL_S).returncode:
        lack(f"{' '.join(packages)} cannot be installed: no package index answers")
