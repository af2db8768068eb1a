"""A model is served with all of its weights, or refused with a line that names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.worker.families import SMALL, change_config, save
from worker.model.folder import ModelRefused
from worker.model.loading import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "llama")


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(ModelRefused) as error:
        load(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_lost_weight_is_named(folder: Path, lost: str) -> None:
    """Transformers would draw it at random, anew in every worker."""
    change_weights(folder, lambda weights: {name: weight for name, weight in weights.items() if name != lost})
    assert f"{lost} is not among its weights" in refusal(folder)


def test_weights_under_other_names_are_lost(folder: Path) -> None:
    change_weights(folder, lambda weights: {f"other.{name}": weight for name, weight in weights.items()})
    assert "nor are 20 others" in refusal(folder)


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    change_config(folder, intermediate_size=80)
    assert "down_proj.weight has shape [64, 96], and config.json says [64, 80]" in refusal(folder)


@pytest.mark.parametrize(("num_layers", "says"), [
    (3, "model.layers.2.input_layernorm.weight is not among"), (1, "makes no use of layer model.layers.1:")])
def test_files_and_config_have_as_many_layers(folder: Path, num_layers: int, says: str) -> None:
    change_config(folder, num_hidden_layers=num_layers)
    assert says in refusal(folder)


def test_weights_are_not_lost_where_they_are_another(tmp_path: Path) -> None:
    """A head that is the embedding, in files that have only one of them."""
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"tie_word_embeddings": True})).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load(str(tmp_path))


def test_weights_that_have_no_use_are_let_through(folder: Path) -> None:
    """Tables that are computed today, another modality's tower, heads for further tokens, however they are named."""
    one = torch.ones(4)
    change_weights(folder, lambda weights: weights | {name: one.clone() for name in (
        "model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.layers.7.mlp.up_proj.weight",
        "mtp.layers.5.mlp.up_proj.weight", "model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight",
        "score.weight")})
    load(str(folder))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_weights_of_eight_bits_are_refused_where_no_config_tells_of_them(folder: Path, dtype: torch.dtype) -> None:
    """Without the scales beside them, of which transformers says nothing, they are other numbers."""
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda weights: weights | {
        name: (100 * weights[name]).to(dtype), f"{name}_scale": torch.tensor(0.01)})
    assert f"is quantized ({name} is " in refusal(folder)
