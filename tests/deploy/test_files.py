"""The files that put Baton on machines agree with each other, with their formats, and with the settings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from api.routes.files import DRAINED_BYTES
from api.server import KEEP_ALIVE_S
from shared.settings import PREFIX, Settings
from tests.tools import require_tool

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
BATON_COMMANDS = sorted({tuple(service["command"][1:]) for service in SERVICES.values()
                         if service.get("command", [""])[0] == "baton"})
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
NGINX_CONF = (ROOT / "deploy" / "proxy" / "nginx.conf").read_text()
LOCK = {line.split("==")[0]: line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}

ROOMS_OF_IMAGE = {"api": {"shared/", "api/", "deploy/"}, "worker": {"shared/", "worker/", "deploy/"}}
# An API pod must start without what its image does not hold.
START_API = """
import sys
sys.modules |= dict.fromkeys(("worker", "torch", "transformers"))
sys.path.insert(0, ".")
import api.app
from deploy.cli import main
sys.argv = ["baton", "api", "--help"]
sys.exit(main())
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What the command says; it must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout
    return done.stdout


# ── formats ──

def test_compose_follows_its_schema() -> None:
    run(require_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfile_is_clean(dockerfile: Path) -> None:
    run(require_tool("hadolint"), "--no-color", dockerfile)


@pytest.mark.parametrize("script", ["deploy/tools.sh", ".ci/run"])
def test_script_can_be_read_by_its_shell(script: str) -> None:
    shell = "bash" if "bash" in (ROOT / script).read_text().splitlines()[0] else "sh"
    run(require_tool(shell), "-n", ROOT / script)


# ── the lock ──

def test_the_lock_pins_one_version_of_each_package_and_names_no_place() -> None:
    """An index host would tie it to one machine; a hash or a local version of torch to one build of it."""
    for name, line in LOCK.items():
        assert re.fullmatch(rf"{re.escape(name)}==[\w.]+( ; .+)?", line), line
        assert "://" not in line
    assert not [name for name in LOCK if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_the_lock_holds_what_the_project_asks_for() -> None:
    asked = [*PROJECT["dependencies"], *(line for group in PROJECT["optional-dependencies"].values() for line in group)]
    for requirement in map(Requirement, asked):
        if requirement.name == "triton":                # a CUDA build of torch says which
            continue
        pinned = Requirement(LOCK[requirement.name.replace("_", "-")])
        (pin,) = pinned.specifier
        assert requirement.specifier.contains(pin.version), f"{requirement} is locked as {pin}: make lock"


# ── the images ──

@pytest.mark.parametrize("image", ROOMS_OF_IMAGE)
def test_an_image_holds_its_own_rooms_alone(image: str) -> None:
    assert {source for source in copied(image) if source.endswith("/")} == ROOMS_OF_IMAGE[image]


@pytest.mark.parametrize("image", ROOMS_OF_IMAGE)
def test_what_an_image_copies_is_let_through_to_docker(image: str) -> None:
    let_through = (ROOT / ".dockerignore").read_text().split()
    for source in copied(image):
        assert (ROOT / source).exists()
        assert f"!{source}" in let_through or f"!{source}*.py" in let_through, source


def test_an_api_pod_starts_without_worker_and_torch(tmp_path: Path) -> None:
    for room in ROOMS_OF_IMAGE["api"]:
        shutil.copytree(ROOT / room, tmp_path / room)
    run(sys.executable, "-c", START_API, cwd=tmp_path)


def copied(image: str) -> list[str]:
    """What a Dockerfile takes from the tree, the packages of an earlier stage left out."""
    lines = (ROOT / "deploy" / "docker" / f"{image}.Dockerfile").read_text().splitlines()
    return [word for line in lines if re.match(r"COPY (?!--from)", line) for word in line.split()[1:-1]]


# ── compose ──

@pytest.mark.parametrize("command", BATON_COMMANDS, ids=" ".join)
def test_a_command_of_compose_is_one_that_baton_knows(command: tuple[str, ...]) -> None:
    code = "import sys; from deploy.cli import main; sys.exit(main())"
    text = run(sys.executable, "-c", code, command[0], "--help")
    for flag in (word for word in command if word.startswith("--")):
        assert flag in text


def test_a_variable_of_compose_is_a_setting() -> None:
    variables = {name for service in SERVICES.values() for name in service.get("environment", {})}
    names = {name for name in variables if name.startswith(PREFIX)}
    assert names <= {PREFIX + name.upper() for name in Settings.model_fields}
    assert PREFIX + "REDIS_URL" in names


def test_redis_keeps_what_it_acknowledged_and_evicts_nothing() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    for option in ("--appendonly yes", "--appendfsync everysec", "--maxmemory-policy noeviction", "--maxmemory 1gb"):
        assert option in command


def test_redis_is_a_version_without_the_eviction_flaw() -> None:
    """CVE-2026-23479: 7.2.0 to 8.6.2."""
    version = Version(SERVICES["redis"]["image"].split(":")[1])
    assert not Version("7.2.0") <= version <= Version("8.6.2")


def test_every_image_from_elsewhere_has_an_exact_version() -> None:
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    images += [image for path in DOCKERFILES for image in re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE)]
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+", image), image


def test_a_stopping_pod_may_finish_its_streams() -> None:
    """Docker kills after the grace period: above what a pod takes for itself, and the proxy outlives its pods."""
    assert seconds(SERVICES["api"]["stop_grace_period"]) > DEFAULTS["drain_s"]
    assert seconds(SERVICES["proxy"]["stop_grace_period"]) > seconds(SERVICES["api"]["stop_grace_period"])
    assert seconds(SERVICES["worker"]["stop_grace_period"]) > DEFAULTS["lease_s"]


# ── nginx ──

def test_the_proxy_is_wider_than_the_api() -> None:
    """So that the API, which knows more, is the one that refuses and the one that gives up."""
    megabytes = int(directive("client_max_body_size").removesuffix("m"))
    assert megabytes << 20 > DEFAULTS["max_body_bytes"]
    uploads = directive("client_max_body_size", NGINX_CONF[NGINX_CONF.index("location = /v1/files"):])
    assert int(uploads.removesuffix("m")) << 20 > DEFAULTS["max_file_bytes"] + DRAINED_BYTES
    assert seconds(directive("proxy_read_timeout")) > DEFAULTS["request_deadline_s"]


def test_the_proxy_closes_an_idle_connection_before_a_pod_does() -> None:
    """The other way round a POST now and then meets a closed connection, and may not be sent again."""
    of_the_pods = NGINX_CONF[NGINX_CONF.index("upstream api"):]
    assert seconds(directive("keepalive_timeout", of_the_pods)) < KEEP_ALIVE_S


def test_the_proxy_keeps_nothing_for_a_slow_reader() -> None:
    """Buffered, a gigabyte of each stream would lie on its disk, and no pod would ever see who is slow."""
    assert directive("proxy_buffering") == "off"


def test_the_proxy_asks_the_pods_of_compose() -> None:
    assert directive("server api:30000")
    assert directive("listen") == str(DEFAULTS["port"])
    assert SERVICES["proxy"]["ports"] == ["30000:30000"]


def directive(name: str, conf: str = NGINX_CONF) -> str:
    match = re.search(rf"^\s*{name} ([^;]+);", conf, re.MULTILINE)
    assert match, name
    return match[1].strip()


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))
