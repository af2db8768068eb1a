"""The card of a model: what its folder holds, without running any of it, or one line that says what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from worker import tiny
from worker.announce import make_card
from worker.engine.engine import Engine
from worker.model.folder import ModelRefused
from worker.model.loading import load

TINY = Path(tiny.MODEL_FOLDER)


@pytest.fixture(scope="module")
def whole_engine() -> Engine:
    return Engine(load(str(TINY)), max_num_seqs=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture
def engine(whole_engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """One whose model lies in a folder that a test may spoil."""
    monkeypatch.setattr(whole_engine.model, "folder", folder)
    return whole_engine


def change(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("auto_map", [
    {"AutoTokenizer": ["own.Own", None]}, {"AutoTokenizer": [None, "own.Own"]}, ["own.Own", None], ["own.Own"]],
    ids=str)
def test_a_tokenizer_of_its_own_class_is_read_without_its_code(
        engine: Engine, folder: Path, auto_map: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is asked at the terminal whether to run it; special tokens and template are those of the files."""
    def ask(*_: Any) -> str:
        raise AssertionError("asked at the terminal")

    expected = make_card("m", engine)
    (folder / "own.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n")
    change(folder, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Own")
    monkeypatch.setattr("builtins.input", ask)
    card = make_card("m", engine)
    assert (card.tokenizer_json, card.special_tokens, card.chat_templates) == (
        expected.tokenizer_json, expected.special_tokens, expected.chat_templates)
    assert card.special_tokens and card.chat_templates and not (folder / "ran").exists()


@pytest.mark.parametrize(("name", "content", "says"), [
    ("tokenizer.json", None, "add tokenizer.json"),
    ("tokenizer.json", b"{}", "fetch its tokenizer files again"),
    ("tokenizer.json", b"[]", "fetch its tokenizer files again"),
    ("tokenizer.json", (TINY / "tokenizer.json").read_bytes()[:3000], "fetch its tokenizer files again"),
    ("tokenizer_config.json", b"{", "fetch its tokenizer files again"),
    ("tokenizer_config.json", b"[]", "fetch its tokenizer files again"),
    ("chat_template.jinja", b"\xff\xfe", "fetch its tokenizer files again"),
    ("chat_template.jinja", b"{{ messages", "chat template default"),
    ("generation_config.json", b"{", "fetch it again"),
    ("generation_config.json", b"[]", "fetch it again"),
], ids=lambda value: str(value)[:24])
def test_a_spoilt_file_is_one_line(engine: Engine, folder: Path, name: str, content: bytes | None, says: str
                                        ) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelRefused, match=says) as error:
        make_card("m", engine)
    assert "\n" not in str(error.value)


def test_a_folder_may_have_defaults_for_what_a_request_leaves_open(engine: Engine, folder: Path) -> None:
    """Those that a request may name too; of what else `generate` takes, and of what is no number, nothing."""
    change(folder, "generation_config.json", temperature=0.7, top_k=20, top_p=0.8, min_p=None, repetition_penalty=1.05,
           max_new_tokens=7, do_sample=True)
    assert make_card("m", engine).sampling_defaults == {
        "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
