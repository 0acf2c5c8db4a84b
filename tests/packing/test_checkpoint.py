"""The quantized denoiser on disk: equal after a round trip, refused when anything is off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ptq4adm.calibration import Calibration
from ptq4adm.config import QuantConfig
from ptq4adm.errors import (
    CheckpointError,
    CheckpointShapeError,
    CheckpointVersionError,
    ConfigError,
    MissingComponentError,
    OutputError,
    TruncatedCheckpointError,
)
from ptq4adm.nn import W4A8Linear, find_step, resident_bytes
from ptq4adm.packing.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_denoiser,
    quantization_config,
    save_denoiser,
)
from ptq4adm.quantization import load_pipeline, quantize

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FAST: dict[str, Any] = {"weight_observer": "absmax", "activation_observer": "absmax"}
CONFIGS = {
    "static": QuantConfig(**FAST),
    "groups": QuantConfig(group_size=64, **FAST),
    "w8a8": QuantConfig(scheme="w8a8", **FAST),
    "mixed": QuantConfig(
        overrides={"mid_block.*": "w8a8", "*.to_q": "float", "up_blocks.0.*.to_v": "w8"}, **FAST
    ),
    "dynamic": QuantConfig(activation="dynamic", **FAST),
    "weight only": QuantConfig(scheme="w8", **FAST),
}


def _run(unet: nn.Module, timestep: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 8, 8, 8, generator=generator)
    labels = torch.randn(2, 64, generator=generator)
    with torch.no_grad():
        return unet(sample, timestep, encoder_hidden_states=None, class_labels=labels).sample


def _quantized(folder: Path, calibration: Path, config: QuantConfig) -> nn.Module:
    unet: nn.Module = load_pipeline(folder).unet
    is_static = config.activation == "static"
    quantize(unet, config, Calibration.load(calibration) if is_static else None, progress=False)
    return unet


@pytest.fixture(scope="module")
def unet(tiny_pipeline: Path, tiny_calibration: Path) -> nn.Module:
    return _quantized(tiny_pipeline, tiny_calibration, CONFIGS["static"])


@pytest.fixture(scope="module")
def saved(unet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "unet"
    save_denoiser(unet, folder)
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "unet"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_are_bit_equal_after_a_round_trip(
    tiny_pipeline: Path, tiny_calibration: Path, tmp_path: Path, config: QuantConfig
) -> None:
    unet = _quantized(tiny_pipeline, tiny_calibration, config)
    save_denoiser(unet, tmp_path)
    loaded = load_denoiser(tmp_path)
    for timestep in (0, 999):
        assert torch.equal(_run(unet, timestep), _run(loaded, timestep))
    assert quantization_config(loaded) == quantization_config(unet)
    assert resident_bytes(loaded) == resident_bytes(unet)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert not loaded.training
    # and once more from what was loaded: nothing drifts
    save_denoiser(loaded, tmp_path / "again")
    first, second = load_file(tmp_path / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_weights_do_not_depend_on_the_backend_that_saved_them(
    tiny_pipeline: Path, tiny_calibration: Path, tmp_path: Path
) -> None:
    # without clipping no value of this model lies so near a tie that float sums decide it
    config = QuantConfig(activation_observer="absmax")
    unet = _quantized(tiny_pipeline, tiny_calibration, config)
    saved = tmp_path / "saved"
    save_denoiser(unet, saved)
    save_denoiser(load_denoiser(saved, backend="reference"), tmp_path / "again")
    a, b = load_file(saved / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "backend=reference" in repr(load_denoiser(saved, backend="reference"))
    torch.testing.assert_close(
        _run(load_denoiser(saved, backend="reference")), _run(unet), rtol=1e-3, atol=1e-4
    )


def test_another_dtype_leaves_scales_in_float32(saved: Path) -> None:
    half = load_denoiser(saved, dtype=torch.float16)
    assert half.get_submodule("conv_norm_out").weight.dtype == torch.float16
    layer = half.get_submodule(LAYER)
    assert isinstance(layer, W4A8Linear)
    assert layer.w_scale.dtype == layer.x_scale.dtype == torch.float32  # type: ignore[union-attr]


def test_the_config_is_small_json_without_prompts(saved: Path) -> None:
    text = (saved / CONFIG_FILE).read_text()
    described = json.loads(text)["quantization_config"]
    assert set(described) == {
        "quant_method", "format_version", "config", "schemes", "segments", "dynamic", "buckets",
        "calibration", "rows",
    }  # fmt: skip
    assert described["quant_method"] == "ptq4adm"
    assert described["format_version"] == 1
    assert len(described["calibration"]) == 16
    assert "dog" not in text
    step = find_step(load_denoiser(saved))
    assert step is not None
    assert list(step.buckets.calibrated) == described["buckets"]["calibrated"]


def test_disk_holds_what_memory_holds_and_others_may_read_it(unet: nn.Module, saved: Path) -> None:
    size = (saved / WEIGHTS_FILE).stat().st_size
    assert resident_bytes(unet) <= size <= resident_bytes(unet) * 1.05
    assert (saved / WEIGHTS_FILE).stat().st_mode == (saved / CONFIG_FILE).stat().st_mode


def test_a_folder_written_by_diffusers_itself_loads_too(unet: nn.Module, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path)  # type: ignore[operator]
    assert torch.equal(_run(load_denoiser(tmp_path)), _run(unet))


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


class TestRefused:
    """Each kind of damage has its own error, and the message says where."""

    @pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
    def test_missing_files(self, damaged: Path, name: str) -> None:
        (damaged / name).unlink()
        with pytest.raises(MissingComponentError, match=f"{name}: missing"):
            load_denoiser(damaged)

    @pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_files(self, damaged: Path, name: str, share: float) -> None:
        content = (damaged / name).read_bytes()
        (damaged / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(TruncatedCheckpointError, match="cut short"):
            load_denoiser(damaged)

    @pytest.mark.parametrize("version", [0, 2, "1", None])
    def test_other_versions(self, damaged: Path, version: object) -> None:
        _edit(damaged, lambda c: c["quantization_config"].update(format_version=version))
        with pytest.raises(CheckpointVersionError, match=f"format {version!r}.* reads 1"):
            load_denoiser(damaged)

    def test_other_methods(self, damaged: Path) -> None:
        _edit(damaged, lambda c: c["quantization_config"].update(quant_method="torchao"))
        with pytest.raises(CheckpointVersionError, match="'torchao'"):
            load_denoiser(damaged)

    def test_a_model_that_is_not_quantized(self, damaged: Path) -> None:
        _edit(damaged, lambda c: c.pop("quantization_config"))
        with pytest.raises(CheckpointError, match="not quantized"):
            load_denoiser(damaged)

    @pytest.mark.parametrize("name", ["UNet9D", "os", "DDIMScheduler", None])
    def test_unknown_classes(self, damaged: Path, name: object) -> None:
        _edit(damaged, lambda c: c.update(_class_name=name))
        with pytest.raises(CheckpointError, match="not a model of the installed diffusers"):
            load_denoiser(damaged)

    @pytest.mark.parametrize(
        "change",
        [
            lambda q: q.pop("schemes"),
            lambda q: q.update(schemes={"w3a8": [LAYER]}),
            lambda q: q.update(config={"scheme": "w3a8"}),
            lambda q: q.update(config=None),
            lambda q: q.update(buckets={"num_train_timesteps": 3}),
            lambda q: q.update(segments=None),
            lambda q: q.update(schemes={"w8": ["conv_in"]}),
        ],
    )
    def test_broken_descriptions(self, damaged: Path, change: Callable[[Any], object]) -> None:
        _edit(damaged, lambda c: change(c["quantization_config"]))
        with pytest.raises(CheckpointError):
            load_denoiser(damaged)

    def test_layers_the_model_does_not_have(self, damaged: Path) -> None:
        _edit(damaged, lambda c: c["quantization_config"]["schemes"]["w4a8"].append("up.9"))
        with pytest.raises(CheckpointError, match=r"layer 'up\.9'"):
            load_denoiser(damaged)

    def test_missing_and_unexpected_tensors(self, damaged: Path) -> None:
        _edit_tensors(damaged, lambda t: t.pop(f"{LAYER}.w_scale"))
        with pytest.raises(CheckpointError, match=rf"lacks '{LAYER}\.w_scale' \(1 tensors"):
            load_denoiser(damaged)
        _edit_tensors(
            damaged, lambda t: t.update({f"{LAYER}.w_scale": torch.ones(128), "x": torch.ones(1)})
        )
        with pytest.raises(CheckpointError, match="holds 'x'"):
            load_denoiser(damaged)

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            (f"{LAYER}.qweight", torch.zeros(128, 63, dtype=torch.uint8)),
            (f"{LAYER}.qweight", torch.zeros(128, 64, dtype=torch.int8)),
            (f"{LAYER}.w_scale", torch.ones(128, dtype=torch.float16)),
            (f"{LAYER}.x_scale", torch.ones(1, 3)),
            ("conv_norm_out.weight", torch.ones(63)),
        ],
    )
    def test_other_shapes_and_dtypes(self, damaged: Path, name: str, tensor: Tensor) -> None:
        _edit_tensors(damaged, lambda t: t.update({name: tensor}))
        with pytest.raises(CheckpointShapeError, match=f"{name} is .* needs"):
            load_denoiser(damaged)

    def test_saving_what_is_not_quantized(self, tiny_pipeline: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="not quantized"):
            save_denoiser(load_pipeline(tiny_pipeline).unet, tmp_path)

    def test_saving_below_a_file(self, unet: nn.Module, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="cannot be written"):
            save_denoiser(unet, tmp_path / "file" / "unet")
