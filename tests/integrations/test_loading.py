"""Folders through diffusers: quantized on the way in, packed, sharded; broken ones are refused."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ptq4adm
from ptq4adm import Calibration, PTQ4ADMConfig, QuantConfig, TextToAudioPipeline
from ptq4adm.errors import (
    CalibrationError,
    CalibrationMismatchError,
    CheckpointError,
    CheckpointShapeError,
    CheckpointVersionError,
    ConfigError,
    DependencyError,
    MissingComponentError,
    TruncatedCheckpointError,
    UnsupportedModelError,
)
from ptq4adm.nn import QuantizedLayer, find_step, fusion_report
from ptq4adm.packing.checkpoint import WEIGHTS_FILE, load_denoiser, quantization_config

Load = Callable[..., nn.Module]
Run = Callable[..., Tensor]
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def _assert_same_files(first: Path, second: Path) -> None:
    a, b = _tensors(first), _tensors(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    other.pop("_name_or_path", None)  # diffusers' note on where it found the model
    assert one == other


@pytest.fixture
def damaged(packed: Path, tmp_path: Path) -> Path:
    """A copy of the packed UNet's folder that a test may break."""
    return Path(shutil.copytree(packed / "unet", tmp_path / "unet"))


# --- a float folder ------------------------------------------------------------------------------


def test_a_float_folder_is_quantized_while_it_is_loaded(
    tiny_pipeline: Path, run: Run, fast: PTQ4ADMConfig
) -> None:
    unet = UNet2DConditionModel.from_pretrained(
        tiny_pipeline, subfolder="unet", quantization_config=fast
    )
    pipe: TextToAudioPipeline = ptq4adm.load_pipeline(tiny_pipeline)
    ptq4adm.quantize(pipe.unet, fast.quant_config, progress=False)
    assert torch.equal(run(unet), run(pipe.unet))
    assert unet.hf_quantizer.quantization_config.is_description
    assert unet.quantization_method == "ptq4adm"
    assert not unet.training
    assert not any(p.requires_grad for p in unet.parameters())


def test_a_dictionary_is_as_good_as_the_class(tiny_pipeline: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(
        tiny_pipeline,
        subfolder="unet",
        quantization_config={"quant_method": "ptq4adm", "weight_observer": "absmax"},
    )
    assert unet.hf_quantizer.quantization_config.quant_config.activation == "dynamic"


def test_static_scales_come_from_a_calibration(
    tiny_pipeline: Path, tiny_calibration: Path, run: Run
) -> None:
    config = PTQ4ADMConfig(
        weight_observer="absmax", activation="static", calibration=tiny_calibration
    )
    unet = UNet2DConditionModel.from_pretrained(
        tiny_pipeline, subfolder="unet", quantization_config=config
    )
    pipe = ptq4adm.load_pipeline(tiny_pipeline)
    ptq4adm.quantize(pipe, config.quant_config, Calibration.load(tiny_calibration), progress=False)
    assert torch.equal(run(unet), run(pipe.unet))


def test_static_scales_without_a_calibration_are_refused_before_anything_is_read(
    tiny_pipeline: Path, other_tiny_pipeline: Path, tiny_calibration: Path
) -> None:
    config = PTQ4ADMConfig(activation="static")
    with pytest.raises(CalibrationError, match="calibration=FILE"):
        UNet2DConditionModel.from_pretrained(
            tiny_pipeline, subfolder="unet", quantization_config=config
        )
    config = PTQ4ADMConfig(activation="static", calibration=tiny_calibration)
    with pytest.raises(CalibrationMismatchError):
        UNet2DConditionModel.from_pretrained(
            other_tiny_pipeline, subfolder="unet", quantization_config=config
        )


def test_a_model_of_no_known_structure_is_refused(tiny_pipeline: Path) -> None:
    from diffusers import AutoencoderKL

    with pytest.raises(UnsupportedModelError, match="AutoencoderKL"):
        AutoencoderKL.from_pretrained(
            tiny_pipeline, subfolder="vae", quantization_config=PTQ4ADMConfig()
        )


def test_a_description_does_not_quantize_a_float_folder(tiny_pipeline: Path, packed: Path) -> None:
    config = json.loads((packed / "unet" / "config.json").read_text())["quantization_config"]
    with pytest.raises(ConfigError, match="holds a float one"):
        UNet2DConditionModel.from_pretrained(
            tiny_pipeline, subfolder="unet", quantization_config=PTQ4ADMConfig.from_dict(config)
        )


# --- a packed folder -----------------------------------------------------------------------------


def test_both_loaders_give_one_model(packed: Path, load_packed: Load, run: Run) -> None:
    theirs, ours = load_packed(), load_denoiser(packed / "unet")
    for timestep in (0, 999):
        assert torch.equal(run(theirs, timestep), run(ours, timestep))
    assert quantization_config(theirs) == quantization_config(ours)
    assert fusion_report(theirs).to_dict() == fusion_report(ours).to_dict()
    assert not any(t.is_meta for t in (*theirs.parameters(), *theirs.buffers()))
    assert repr(theirs) == repr(ours)


def test_save_pretrained_and_the_package_write_one_format(
    packed: Path, load_packed: Load, tmp_path: Path, run: Run
) -> None:
    unet = load_packed()
    unet.save_pretrained(tmp_path / "theirs")
    _assert_same_files(packed / "unet", tmp_path / "theirs")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "theirs")
    assert torch.equal(run(again), run(unet))
    # and the package saves what diffusers loaded: `_pre_quantization_dtype` is no JSON
    pipe = ptq4adm.load_pipeline(packed)
    pipe.unet = unet
    ptq4adm.save_pipeline(pipe, tmp_path / "ours")
    _assert_same_files(packed / "unet", tmp_path / "ours" / "unet")


def test_the_header_says_the_method_and_the_version(load_packed: Load, tmp_path: Path) -> None:
    load_packed().save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "quant_method": "ptq4adm", "format_version": "1"}


def test_the_in_place_api_leaves_a_model_that_diffusers_saves(
    tiny_pipeline: Path, tmp_path: Path, run: Run
) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    ptq4adm.quantize(
        unet, QuantConfig(activation="dynamic", weight_observer="absmax"), progress=False
    )
    assert type(unet.hf_quantizer).__name__ == "PTQ4ADMQuantizer"
    unet.save_pretrained(tmp_path)
    assert torch.equal(run(UNet2DConditionModel.from_pretrained(tmp_path)), run(unet))
    assert torch.equal(run(load_denoiser(tmp_path)), run(unet))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_another_dtype_leaves_every_tensor_of_a_layer_as_stored(
    packed: Path, load_packed: Load, run: Run, dtype: torch.dtype
) -> None:
    unet, exact = load_packed(dtype=dtype), load_denoiser(packed / "unet", dtype=dtype)
    assert unet.dtype == dtype == unet.conv_norm_out.weight.dtype
    for name, layer in exact.named_modules():
        if isinstance(layer, QuantizedLayer):
            twin = unet.get_submodule(name)
            assert twin.w_scale.dtype == torch.float32
            assert torch.equal(twin.w_scale, layer.w_scale)
            assert torch.equal(twin.x_scale, layer.x_scale)
    assert torch.equal(run(unet, dtype=dtype), run(exact, dtype=dtype))
    # conv_in is stored in float16: neither half of it is widened, nor rounded to bfloat16
    assert unet.conv_in.weight.dtype == torch.float16


def test_the_old_name_of_dtype_works_too(load_packed: Load) -> None:
    assert load_packed(torch_dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("variant", [None, "w4a8"])
def test_shards_and_variants_load_bit_equal_in_both_loaders(
    packed: Path, load_packed: Load, tmp_path: Path, run: Run, variant: str | None
) -> None:
    unet = load_packed()
    unet.save_pretrained(tmp_path, max_shard_size="200KB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    theirs = UNet2DConditionModel.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(run(theirs), run(unet))
    assert torch.equal(run(load_denoiser(tmp_path, variant=variant)), run(unet))
    _assert_same_files(packed / "unet", tmp_path)


def test_a_variant_of_one_file_is_asked_for_by_name(
    load_packed: Load, tmp_path: Path, run: Run
) -> None:
    unet = load_packed()
    unet.save_pretrained(tmp_path, variant="w4a8")
    assert torch.equal(run(load_denoiser(tmp_path, variant="w4a8")), run(unet))
    with pytest.raises(MissingComponentError, match=r"it has .*w4a8\.safetensors: name their"):
        load_denoiser(tmp_path)


def test_a_config_for_a_packed_folder_is_passed_over_with_a_warning(
    load_packed: Load, fast: PTQ4ADMConfig
) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        unet = load_packed(quantization_config=fast)
    assert find_step(unet) is not None


def test_one_device_is_taken_and_several_are_refused(load_packed: Load, run: Run) -> None:
    assert torch.equal(run(load_packed(device_map="cpu")), run(load_packed()))
    with pytest.raises(ConfigError, match="runs on one device"):
        load_packed(device_map={"conv_in": "cpu", "": "meta"})


def test_without_accelerate_the_error_says_what_to_do(
    load_packed: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    with pytest.raises(DependencyError, match="pip install accelerate, or use ptq4adm"):
        load_packed()


def test_loading_into_all_memory_at_once_is_refused_by_diffusers(load_packed: Load) -> None:
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        load_packed(low_cpu_mem_usage=False)


# --- what is broken ------------------------------------------------------------------------------


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def test_a_missing_tensor_is_named_and_not_made_up(damaged: Path) -> None:
    _edit(damaged, lambda tensors: tensors.pop(f"{LAYER}.w_scale"))
    with pytest.raises(CheckpointError, match=rf"lacks '{LAYER}\.w_scale' \(1 tensors missing, 0"):
        UNet2DConditionModel.from_pretrained(damaged)


def test_an_unexpected_tensor_is_named(damaged: Path) -> None:
    _edit(damaged, lambda tensors: tensors.update({"extra.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"holds 'extra\.weight', which"):
        UNet2DConditionModel.from_pretrained(damaged)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{LAYER}.w_scale", torch.ones(127)),
        (f"{LAYER}.w_scale", torch.ones(128, dtype=torch.float16)),
        (f"{LAYER}.qweight", torch.zeros(128, 64, dtype=torch.int8)),
    ],
    ids=["size", "scale dtype", "weight dtype"],
)
def test_a_tensor_of_another_shape_or_dtype_is_named(
    damaged: Path, name: str, value: Tensor
) -> None:
    _edit(damaged, lambda tensors: tensors.update({name: value}))
    with pytest.raises(CheckpointShapeError, match=name.replace(".", r"\.")):
        UNet2DConditionModel.from_pretrained(damaged)


def test_group_multipliers_out_of_range_are_refused(damaged: Path) -> None:
    name = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.w_mult"
    _edit(damaged, lambda tensors: tensors[name].fill_(16))
    with pytest.raises(CheckpointShapeError, match=r"w_mult: got values in 16 \.\. 16"):
        UNet2DConditionModel.from_pretrained(damaged)


def test_a_truncated_file_is_refused(damaged: Path) -> None:
    path = damaged / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="Unable to load weights from checkpoint file"):
        UNet2DConditionModel.from_pretrained(damaged)
    with pytest.raises(TruncatedCheckpointError, match="cut short"):
        load_denoiser(damaged)


def test_a_missing_or_broken_shard_is_refused(load_packed: Load, tmp_path: Path) -> None:
    load_packed().save_pretrained(tmp_path, max_shard_size="200KB")
    shard = sorted(tmp_path.glob("*-00002-of-*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(TruncatedCheckpointError, match=shard.name):
        load_denoiser(tmp_path)
    shard.unlink()
    with pytest.raises(MissingComponentError, match=f"{shard.name}: missing, one of"):
        load_denoiser(tmp_path)
    with pytest.raises(OSError, match="00002"):
        UNet2DConditionModel.from_pretrained(tmp_path)
    index = tmp_path / f"{WEIGHTS_FILE}.index.json"
    index.write_text(index.read_text()[:-20])
    with pytest.raises(TruncatedCheckpointError, match="not an index of shards"):
        load_denoiser(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a file beside it"):
        load_denoiser(tmp_path)


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_an_unknown_version_is_refused(damaged: Path) -> None:
    _edit_config(damaged, lambda config: config["quantization_config"].update(format_version=2))
    with pytest.raises(CheckpointVersionError, match="upgrade ptq4adm"):
        UNet2DConditionModel.from_pretrained(damaged)


def test_a_config_of_another_model_is_refused(damaged: Path) -> None:
    _edit_config(damaged, lambda config: config.update(block_out_channels=[64, 64]))
    with pytest.raises(CheckpointError, match="conv_shortcut', which the model does not have"):
        UNet2DConditionModel.from_pretrained(damaged)
    _edit_config(damaged, lambda config: config.update(block_out_channels=[64, 192]))
    with pytest.raises(ValueError, match=r"expected shape torch.Size\(\[192\]\)"):
        UNet2DConditionModel.from_pretrained(damaged)


class _Marker:
    """What a pickle with code in it does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_nothing_of_it_runs(damaged: Path, tmp_path: Path) -> None:
    tensors = load_file(damaged / WEIGHTS_FILE)
    (damaged / WEIGHTS_FILE).unlink()
    marker = tmp_path / "executed"
    pickled = damaged / "diffusion_pytorch_model.bin"
    pickled.write_bytes(pickle.dumps({"a": _Marker(marker)}))
    with pytest.raises(OSError, match="Unable to load weights"):
        UNet2DConditionModel.from_pretrained(damaged)
    assert not marker.exists()
    torch.save(tensors, pickled)
    with pytest.raises(CheckpointError, match="read from safetensors only"):
        UNet2DConditionModel.from_pretrained(damaged)
    with pytest.raises(MissingComponentError, match="missing"):
        load_denoiser(damaged)


def test_no_pickle_is_written(load_packed: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="written as safetensors only"):
        load_packed().save_pretrained(tmp_path, safe_serialization=False)
