"""What cannot be served is refused by name, in one line that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DogeConfig,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhimoeConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from shared import container
from tests.worker.families import SMALL, change_config, computing_by, save
from worker.model import attention, check, cpu, identity, loading
from worker.model.folder import ModelRefused
from worker.model.linear import PackedLinear
from worker.model.loading import choose_device, computes_bfloat16, load
from worker.model.model import SHARED_UNIT


def refusal(folder: Path | str, **options: Any) -> str:
    with pytest.raises(ModelRefused) as error:
        load(str(folder), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "llama")


def test_no_folder(tmp_path: Path) -> None:
    assert "no folder" in refusal(tmp_path / "none")


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)


def test_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder)


def test_code_of_its_own(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert "auto_map" in refusal(folder)


def test_quantized_weights(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq"})
    assert "quantized (gptq)" in refusal(folder)


def test_a_window_that_does_not_reach_our_attention(folder: Path) -> None:
    """Equal on 24 tokens, and wrong after the window: so it is served up to the window, or not at all."""
    change_config(folder, sliding_window=100, layer_types=["full_attention", "sliding_attention"])
    assert "set max_model_len to 100" in refusal(folder)
    assert load(str(folder), max_model_len=100).max_model_len == 100


@pytest.mark.parametrize("config", [
    PhimoeConfig(**SMALL, sliding_window=100, num_local_experts=4), DogeConfig(**SMALL, sliding_window=100),
], ids=["phimoe", "doge"])
def test_a_window_of_all_layers_that_does_not_reach_our_attention(config: Any, tmp_path: Path) -> None:
    """One of the config alone, which names no kinds of layers."""
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    assert "set max_model_len to 100" in refusal(tmp_path)
    model = load(str(tmp_path), max_model_len=100)
    assert model.max_model_len == model.module.config.sliding_window == 100


def test_a_window_that_the_family_does_not_know_is_no_window(folder: Path) -> None:
    change_config(folder, sliding_window=100)
    assert load(str(folder)).max_model_len == 512


@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0,
     "original_max_position_embeddings": 128},
], ids=lambda rope: str(rope["rope_type"]))
def test_rotary_angles_that_change_with_the_longest_row_are_not_reached(folder: Path, rope: dict[str, Any]) -> None:
    """One long neighbour would turn the angles of the whole batch: nobody may be that long."""
    change_config(folder, rope_parameters=rope)
    assert load(str(folder)).max_model_len == 128
    assert "128" in refusal(folder, max_model_len=200)


@pytest.mark.parametrize(("rope", "most"), [
    ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512}, 2048),
    ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}, 512),
    ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}, 512),
    ({"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}, 1280),
    ({"rope_type": "default", "rope_theta": 10000.0}, 512),
], ids=["yarn", "yarn that counts the factor in", "yarn with less", "linear", "default"])
def test_scaled_rotary_angles_reach_further_where_it_is_asked_for(folder: Path, rope: dict[str, Any], most: int
                                                                  ) -> None:
    change_config(folder, rope_parameters=rope)
    assert load(str(folder)).max_model_len == 512
    assert load(str(folder), max_model_len=most).max_model_len == most
    assert f"more than this model's {most}" in refusal(folder, max_model_len=most + 1)


def test_an_unknown_architecture(folder: Path) -> None:
    change_config(folder, model_type="nobody-knows")
    assert "nobody-knows" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b'{"model_type": "llama",', b"[]", b"\xff\xfe\x00", b""], ids=str)
def test_a_file_that_is_no_object(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert f"{name} " in refusal(folder)


@pytest.mark.parametrize(("changes", "says"), [
    ({"hidden_size": "64"}, "'hidden_size' expected int"), ({"num_attention_heads": 0}, "config.json is wrong"),
    ({"max_position_embeddings": None}, "'max_position_embeddings'"),
    ({"max_position_embeddings": 1}, "max_position_embeddings 1"), ({"dtype": "float8"}, "float8"),
    ({"eos_token_id": "</s>"}, "eos_token_id"), ({"model_type": None}, "model_type None"),
    ({"model_type": []}, "model_type"), ({"quantization_config": "awq"}, "quantized"),
    ({"hidden_act": "none"}, "does not load"), ({"rope_parameters": {"rope_type": "none"}}, "does not load"),
], ids=str)
def test_a_wrong_field(folder: Path, changes: dict[str, Any], says: str) -> None:
    change_config(folder, **changes)
    assert says in refusal(folder)


def test_an_end_token_by_its_name(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    assert "eos_token_id is ['</s>'" in refusal(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_may_ask_for_the_type_of_a_weight(tmp_path: Path, dtype: Any) -> None:
    """As the routers of one family do, whose weights lie packed."""
    module = HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**SMALL, head_dim=16, num_experts=4, moe_topk=2))
    module.save_pretrained(tmp_path)
    assert load(str(tmp_path), dtype=dtype).vocab_size == SMALL["vocab_size"]


def test_a_block_that_computes_with_a_packed_weight_is_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for it is not a number, and neither are the logits."""
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) + 0 * self.down_proj.weight.sum())
    monkeypatch.setattr(loading, "fuse_blocks", lambda *_: 0)
    assert "logits differ" in refusal(folder, dtype="bfloat16")


def test_weights_that_are_cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(folder) in refusal(folder)


def test_more_weights_than_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_bytes = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(container, "num_free_bytes", lambda: 0.75 * num_bytes)
    assert "does not fit" in refusal(folder, dtype="float32")
    load(str(folder), dtype="bfloat16")                 # half as many


def test_too_long_a_context(folder: Path) -> None:
    assert "max_model_len" in refusal(folder, max_model_len=10**6)


@pytest.mark.parametrize("module", [
    lambda: BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=2)),
    lambda: MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)),
], ids=["bloom", "mamba"])
def test_another_kind_of_attention(module: Any, tmp_path: Path) -> None:
    module().save_pretrained(tmp_path)
    assert "not supported" in refusal(tmp_path)


def test_a_model_whose_batched_path_differs_is_not_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The equality check sees a wrong scale in our attention, which no exception would betray."""
    right = attention.attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs | {"scaling": 0.5})

    AttentionInterface.register("baton", wrong)
    try:
        assert "differ" in refusal(folder)
    finally:
        AttentionInterface.register("baton", right)
    load(str(folder))


def test_like_folders_have_like_names_and_others_others(folder: Path, tmp_path: Path) -> None:
    """`weights_id` is of the content, wherever it lies."""
    same, other = load(str(save("llama", tmp_path / "again"))), load(str(save("mistral", tmp_path / "other")))
    first = load(str(folder))
    assert (first.weights_id, first.numerics_id) == (same.weights_id, same.numerics_id)
    assert first.weights_id != other.weights_id
    half = load(str(folder), dtype="bfloat16")
    assert half.weights_id == first.weights_id
    assert half.numerics_id != first.numerics_id


@pytest.mark.parametrize("place", [0.2, 0.5, 0.77, 1.0])
def test_one_changed_weight_is_another_model(place: float, folder: Path, tmp_path: Path) -> None:
    """Wherever it is, in a file of several blocks and a rest."""
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(2.5 * identity.BLOCK_WORDS + 3, dtype=torch.float32)}, path)
    first = identity.weights_id(tmp_path, {})
    assert identity.weights_id(tmp_path, {}) == first
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    assert identity.weights_id(tmp_path, {}) != first


def test_who_computes_otherwise_has_another_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions side by side: a worker whose code may give other bits does not continue as an equal."""
    first = load(str(folder))
    monkeypatch.setattr(identity, "ARITHMETIC", identity.ARITHMETIC + 1)
    other = load(str(folder))
    assert (other.weights_id, other.numerics_id != first.numerics_id) == (first.weights_id, True)


def test_the_rows_of_a_forward_are_probed(folder: Path) -> None:
    """Within the limits found, a row's logits are the same bits in a forward of any size."""
    with computing_by("torch"):
        model = load(str(folder))
        assert 2 <= model.min_rows <= 8 <= model.max_rows <= 32
        assert check.probe_row_limit(model, 64) == (model.min_rows, model.max_rows)


def test_a_forward_takes_more_of_prompts_where_matrices_are_multiplied(folder: Path) -> None:
    """And has room beside it for as many rows as ever."""
    for dtype in ("float32", "bfloat16"):
        model = load(str(folder), dtype=dtype)
        assert model.prefill_budget == (512 if cpu.has_matrices(model.dtype) else 256) == model.most_rows - 64
        assert not model.program or model.program.max_rows == model.max_shared_rows == model.most_rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_our_kernels_a_token_has_the_same_bits_in_every_forward(folder: Path, dtype: Any,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried: a product that rounds otherwise in a few rows more is found out."""
    if not cpu.computes(getattr(torch, dtype)):
        pytest.skip("not on this processor")
    from worker.model.cpu.linear import PanelLinear

    model = load(str(folder), dtype=dtype)
    assert model.is_uniform
    plain = PanelLinear.forward
    monkeypatch.setattr(PanelLinear, "forward", lambda self, x: plain(self, x) * (1 + (x.shape[-2] > 12) / 64))
    assert not load(str(folder), dtype=dtype).is_uniform
    assert not load(str(save("mixtral", folder.parent / "experts"))).is_uniform


def test_a_forward_is_shared_only_by_as_many_rows_as_were_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                 ) -> None:
    """Where the processor's products are alike for any number of rows; one more that are not, and it ends there."""
    with computing_by("torch"):
        model = load(str(save("llama", tmp_path, torch.bfloat16)), dtype="bfloat16")
        assert model.max_shared_rows in (0, *range(2 * SHARED_UNIT, model.most_rows + 1, SHARED_UNIT))
        plain = PackedLinear.forward
        monkeypatch.setattr(PackedLinear, "forward", lambda self, x: plain(self, x) * (1 + (x.shape[-2] > 100) / 64))
        assert check.probe_shared_rows(model) == min(model.max_shared_rows, 96)
        assert load(str(save("mixtral", tmp_path / "experts", torch.bfloat16))).max_shared_rows == 0


def test_a_hub_name_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "hub" in refusal("nobody/none")


def test_weights_are_float32_only_when_they_were_saved_so_or_nothing_else_is_fast(folder: Path, tmp_path: Path) -> None:
    assert load(str(folder)).dtype == torch.float32
    half = torch.bfloat16 if computes_bfloat16() else torch.float32
    assert load(str(save("llama", tmp_path / "half", torch.bfloat16))).dtype == half


@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_where_the_config_says_no_type_the_weights_do(tmp_path: Path, saved: torch.dtype) -> None:
    """Integers among them say nothing."""
    folder = save("gpt2", tmp_path, saved)
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps({name: value for name, value in json.loads(config.read_text()).items()
                                  if name not in ("dtype", "torch_dtype")}))
    save_file(load_file(weights) | {"a_table": torch.arange(4)}, weights, metadata={"format": "pt"})
    half = torch.bfloat16 if computes_bfloat16() else torch.float32
    assert load(str(folder)).dtype == (torch.float32 if saved == torch.float32 else half)


def test_a_gpu_is_taken_where_one_is_and_its_tools_are(monkeypatch: pytest.MonkeyPatch,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    """Asked for in vain it is a line that says what to do; by itself a worker does without, and says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(ModelRefused, match="a GPU that torch can use"):
        choose_device("cuda")
    assert not caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("worker.model.loading.find_spec", lambda name: None)
    with pytest.raises(ModelRefused, match="pip install triton"):
        choose_device("cuda")
    monkeypatch.setattr("worker.model.loading.find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert choose_device("auto").type == "cpu"
    assert "stays unused: it needs a C compiler" in caplog.text
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_device("cpu").type == "cpu"
