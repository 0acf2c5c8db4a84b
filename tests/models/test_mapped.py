"""Components whose weights stay in their file, and those that their library has to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from ptq4adm.models.components import load_component
from ptq4adm.models.mapped import load_mapped


def _vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)


def _t5() -> T5EncoderModel:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 1}
    return T5EncoderModel(T5Config(vocab_size=20, feed_forward_proj="gated-gelu", **sizes))


MODELS = {"diffusers": (_vae, "AutoencoderKL"), "transformers": (_t5, "T5EncoderModel")}


def _files(tensor: torch.Tensor) -> list[str]:
    """The file that a tensor's memory is mapped from, if there is one."""
    found = []
    for row in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = row.split()[0].partition("-")
        if int(start, 16) <= tensor.data_ptr() < int(end, 16) and "/" in row:
            found.append(row[row.index("/") :])
    return found


@pytest.mark.parametrize("library", MODELS)
def test_weights_of_the_same_dtype_stay_in_the_file(tmp_path: Path, library: str) -> None:
    make, name = MODELS[library]
    model = make()
    model.save_pretrained(tmp_path / "part")
    loaded = load_component(tmp_path, "part", [library, name], torch.float32)
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
        assert _files(state[key])[0].endswith(".safetensors"), key


def test_one_tensor_of_two_names_is_one_tensor(tmp_path: Path) -> None:
    _t5().save_pretrained(tmp_path / "part")
    assert list(load_file(tmp_path / "part" / "model.safetensors")).count("shared.weight") == 1
    loaded: Any = load_mapped(T5EncoderModel, tmp_path / "part", torch.float32)
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight


def test_another_dtype_is_a_copy(tmp_path: Path) -> None:
    _vae().to(torch.float16).save_pretrained(tmp_path)
    loaded = load_mapped(AutoencoderKL, tmp_path, torch.float32)
    assert loaded is not None
    weight = loaded.get_parameter("encoder.conv_in.weight")
    assert weight.dtype == torch.float32
    assert not _files(weight)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "shards"])
def test_what_takes_more_is_left_to_the_library(tmp_path: Path, change: str) -> None:
    _vae().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["encoder.conv_in.bias"]
    elif change == "unknown":
        tensors["another"] = torch.zeros(2)
    elif change == "shape":
        tensors["encoder.conv_in.bias"] = torch.zeros(3)
    save_file(tensors, path)
    if change == "shards":
        path.rename(tmp_path / "diffusion_pytorch_model-00001-of-00001.safetensors")
        (tmp_path / f"{path.name}.index.json").write_text(json.dumps({"weight_map": {}}))
    assert load_mapped(AutoencoderKL, tmp_path, torch.float32) is None


class _WithConstant(ModelMixin, ConfigMixin):
    """A model with a tensor that is made, not stored."""

    config_name = "config.json"

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.register_buffer("constant", torch.arange(3.0), persistent=False)


def test_tensors_that_are_in_no_file_are_left_to_the_library(tmp_path: Path) -> None:
    _WithConstant().save_pretrained(tmp_path)
    assert load_mapped(_WithConstant, tmp_path, torch.float32) is None
