"""Whole models: which blocks are fused, and that the result is that of the unfused model."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptq4adm import Calibration, QuantConfig, TextToAudioPipeline, quantize
from ptq4adm.models import UNet2DAdapter
from ptq4adm.nn import QuantizedLayer
from ptq4adm.nn.fuse import fuse_blocks, fusion_report, unfuse_blocks
from ptq4adm.packing.checkpoint import load_denoiser, save_denoiser

Quantize = Callable[..., Any]
# one integer that differs spreads over a random model: see test_hoist
LEAST_SQNR_DB = 26.0


def _audioldm(**options: Any) -> UNet2DConditionModel:
    settings = {
        "cross_attention_dim": (32, 64),
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 24,
        "class_embeddings_concat": True,
        "attention_head_dim": 4,
        **options,
    }
    return _unet(**settings)


def _tango(**options: Any) -> UNet2DConditionModel:
    settings = {
        "cross_attention_dim": 40,
        "use_linear_projection": True,
        "upcast_attention": True,
        "attention_head_dim": (2, 4),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    }
    return _unet(**settings)


def _unet(**options: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        **options,
    }
    return UNet2DConditionModel(**settings).eval().requires_grad_(False)


def _arguments(unet: Any, height: int, width: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(height * width)
    has_text = isinstance(unet.config.cross_attention_dim, int)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]) if has_text else None
    return {
        "sample": torch.randn(2, 4, height, width, generator=generator),
        "class_labels": None if has_text else torch.randn(2, 24, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 40, generator=generator) if has_text else None,
        "encoder_attention_mask": mask,
    }


def _run(unet: nn.Module, gain: float, height: int = 6, width: int = 8) -> Tensor:
    given = _arguments(unet, height, width)
    given["sample"] = gain * given["sample"]  # type: ignore[operator]
    with torch.no_grad():
        return unet(timestep=10, **given).sample


def _sqnr_db(value: Tensor, expected: Tensor) -> float:
    noise = (value - expected).double().square().sum().clamp_min(1e-30)
    return float(10 * (expected.double().square().sum() / noise).log10())


@pytest.mark.parametrize("make", [_audioldm, _tango])
def test_the_whole_unet(
    quantize_block: Quantize, compiled_recipe: Any, make: Callable[[], Any]
) -> None:
    unet = make()
    pair = quantize_block(unet, _run, compiled_recipe, UNet2DAdapter().segments(unet))
    # every block, and 8 resnets, 1 upsampler, 4 (AudioLDM) or 3 (TANGO) transformers among them
    transformers = sum(row.kind == "Transformer2DModel" for row in pair.report.blocks)
    assert pair.report.count() == {"all": 9 + 2 * transformers, "some": 0, "none": 0}
    for bucket, size in enumerate([(6, 8), (5, 78), (7, 3)]):
        pair.set_bucket(bucket)
        fused, unfused = _run(pair.fused, 1.0, *size), _run(pair.unfused, 1.0, *size)
        assert fused.shape == (2, 4, *size)
        assert _sqnr_db(fused, unfused) >= LEAST_SQNR_DB


def test_the_whole_unet_on_triton_equals_the_reference(
    pipe: TextToAudioPipeline, calibration: Calibration
) -> None:
    """Loaded packed, moved nowhere: the same integers, so the same numbers but for float attention.

    A fused quantizer may differ by a step somewhere, which the layers behind it amplify.
    """
    twin = copy.copy(pipe)
    twin.unet = copy.deepcopy(pipe.unet)
    x, labels = torch.randn(2, 8, 8, 8), torch.randn(2, 64)
    results = []
    for one, backend in ((pipe, "reference"), (twin, "triton")):
        config = QuantConfig(weight_observer="absmax", backend=backend)
        quantize(one, config, calibration, progress=False)
        layers = [m for m in one.unet.modules() if isinstance(m, QuantizedLayer)]
        assert {layer.backend for layer in layers} == {backend}
        assert fusion_report(one.unet).count()["none"] == 0
        with torch.no_grad():
            results.append(one.unet(x, 700, None, class_labels=labels).sample)
    expected, got = results
    assert float((got - expected).norm() / expected.norm()) < 1e-2


def test_quantize_fuses_and_a_checkpoint_brings_it_back(
    pipe: TextToAudioPipeline, calibration: Calibration, tmp_path: Path
) -> None:
    config = QuantConfig(weight_observer="absmax", backend="reference")
    quantize(pipe, config, calibration, progress=False)
    report = fusion_report(pipe.unet)
    assert report.count()["none"] == report.count()["some"] == 0
    save_denoiser(pipe.unet, tmp_path / "unet")
    loaded = load_denoiser(tmp_path / "unet", backend="reference")
    assert fusion_report(loaded) == report
    x, labels = torch.randn(2, 8, 8, 8), torch.randn(2, 64)
    twins = [loaded, copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))]
    with torch.no_grad():
        y = pipe.unet(x, 300, encoder_hidden_states=None, class_labels=labels).sample
        for twin in twins:
            z = twin(x, 300, encoder_hidden_states=None, class_labels=labels).sample
            assert torch.equal(y, z)


def test_fusing_leaves_the_state_dict_and_the_config_alone(
    quantize_block: Quantize, make_recipe: Any
) -> None:
    unet = _audioldm()
    pair = quantize_block(unet, _run, make_recipe(), UNet2DAdapter().segments(unet))
    fused, unfused = pair.fused.state_dict(), pair.unfused.state_dict()
    assert list(fused) == list(unfused)
    assert all(torch.equal(fused[name], unfused[name]) for name in fused)
    assert pair.fused.config == unet.config
    assert type(pair.fused) is UNet2DConditionModel


def test_fusing_twice_and_back(quantize_block: Quantize, make_recipe: Any) -> None:
    pair = quantize_block(_tango(), _run, make_recipe())
    expected = _run(pair.fused, 1.0)
    classes = [type(m) for m in pair.fused.modules()]
    assert fuse_blocks(pair.fused) == pair.report
    assert [type(m) for m in pair.fused.modules()] == classes
    assert torch.equal(_run(pair.fused, 1.0), expected)
    unfuse_blocks(pair.fused)
    assert fusion_report(pair.fused).count()["none"] == len(pair.report.blocks)
    assert torch.equal(_run(pair.fused, 1.0), _run(pair.unfused, 1.0))


def test_a_float_model_has_nothing_to_fuse() -> None:
    unet = _audioldm()
    report = fuse_blocks(unet)
    assert report.count()["none"] == len(report.blocks) > 0
    assert "it is Conv2d, not W4A8 or W8A8" in str(report)
    assert report.to_dict()["count"] == report.count()


def test_a_subclass_has_a_forward_of_its_own(quantize_block: Quantize, make_recipe: Any) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    class Mine(ResnetBlock2D):
        pass

    pair = quantize_block(
        Mine(in_channels=64, temb_channels=None),
        lambda block, gain: block(gain * torch.randn(1, 64, 3, 3), None),
        make_recipe(),
    )
    assert type(pair.fused) is Mine
    assert pair.report.blocks == ()


class Formats(TorchDispatchMode):
    """What copies or reads images in another format than channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        name = func.name()
        is_image = isinstance(result, Tensor) and result.dim() == 4 and result.is_floating_point()
        if is_image and name.startswith(("aten::clone", "aten::copy", "aten::_to_copy")):
            self.copies.append(f"{name} {list(result.shape)}")
        if is_image and name in ("aten::cat", "aten::native_group_norm", "aten::silu"):
            assert result.is_contiguous(memory_format=torch.channels_last), name
        return result


@pytest.mark.parametrize("make", [_audioldm, _tango])
def test_images_stay_channels_last_and_are_not_copied(
    quantize_block: Quantize, make_recipe: Any, backend: str, make: Callable[[], Any]
) -> None:
    unet = make()
    recipe = make_recipe(backend=backend)
    pair = quantize_block(unet, _run, recipe, UNet2DAdapter().segments(unet))
    with Formats() as fused:
        y = _run(pair.fused, 1.0)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert fused.copies == []  # the quantizer reads the halves of a skip concatenation in place


def test_fusing_does_not_import_diffusers() -> None:
    code = (
        "import sys, torch, ptq4adm.nn.fuse as f; f.fuse_blocks(torch.nn.Linear(2, 2)); "
        "assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
