"""The walls between the rooms, read from the imports: what may know what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("shared", "api", "worker", "deploy")

# folder or file → what nothing in it may import; the longest match counts besides every shorter one
WALLS = {
    "shared": {"api", "worker", "deploy", "torch", "transformers", "fastapi", "starlette", "uvicorn", "numpy"},
    "shared/job.py": {"redis"},
    "shared/template.py": {"redis", "tokenizers"},
    "api": {"worker", "deploy", "torch", "transformers", "numpy"},
    "api/wire": {"redis", "fastapi", "starlette", "uvicorn", "tokenizers"},
    "worker": {"api", "deploy", "fastapi", "starlette", "uvicorn"},
    "worker/engine": {"redis", "pydantic", "tokenizers"},
    "worker/model": {"redis", "pydantic"},
    "worker/model/folder.py": {"torch", "transformers"},
    "worker/output": {"redis", "torch", "transformers"},
    "worker/answer.py": {"torch", "transformers"},
}
FORBIDDEN_FOLDERS = {"core", "utils", "common", "helpers", "base", "managers"}


def modules() -> Iterator[Path]:
    for room in ROOMS:
        yield from (ROOT / room).rglob("*.py")


def imported(path: Path) -> Iterator[str]:
    """Full names of what a module imports, except what only the type checker sees."""
    tree = ast.parse(path.read_text())
    unseen = {id(inner) for node in ast.walk(tree)
              if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide which room they mean"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("place", WALLS)
def test_nothing_reaches_through_a_wall(place: str) -> None:
    members = [path for path in modules() if path.relative_to(ROOT).as_posix().startswith(place)]
    assert members, f"{place} is no place any more"
    for path in members:
        for name in imported(path):
            assert name.partition(".")[0] not in WALLS[place], f"{path.relative_to(ROOT)} imports {name}"


def test_wire_knows_jobs_errors_and_grammars_alone() -> None:
    for path in (ROOT / "api" / "wire").rglob("*.py"):
        for name in imported(path):
            if name.startswith("shared."):
                assert name.split(".")[1] in ("job", "errors", "grammar", "schemas"), f"{path.name} imports {name}"


def test_redis_is_known_to_one_file_of_the_engine_room() -> None:
    speakers = {path.name for path in (ROOT / "worker").rglob("*.py")
                if any(name.partition(".")[0] == "redis" for name in imported(path))}
    assert speakers == {"worker.py"}


def loaded_by(*modules: str) -> set[str]:
    """The modules that a new Python has loaded after importing these."""
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True,
                              text=True).stdout.split())


def test_a_pod_never_loads_torch() -> None:
    assert not {"torch", "transformers", "numpy"} & loaded_by("api.server", "shared.queue", "shared.tokenizer")


def test_the_engine_runs_where_nothing_of_the_service_is_installed() -> None:
    loaded = loaded_by("worker.engine.engine", "worker.model.loading")
    assert not {"redis", "pydantic", "pydantic_settings", "fastapi", "shared.queue"} & loaded


def test_no_folder_has_a_name_that_says_nothing() -> None:
    folders = {path.name for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*") if path.is_dir()}
    assert not folders & FORBIDDEN_FOLDERS
