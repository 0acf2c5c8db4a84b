"""Packed folders of the tiny pipeline, and how its UNet is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ptq4adm
from ptq4adm import Calibration, PTQ4ADMConfig, QuantConfig, TextToAudioPipeline

FAST = {"weight_observer": "absmax"}


@pytest.fixture(scope="session")
def run() -> Callable[..., Tensor]:
    """The tiny UNet's result for fixed latents and labels."""

    def call(unet: nn.Module, timestep: int = 300, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        sample = torch.randn(2, 8, 8, 8, generator=generator).to(dtype)
        labels = torch.randn(2, 64, generator=generator).to(dtype)
        with torch.no_grad():
            result: Tensor = unet(
                sample, torch.tensor(timestep), encoder_hidden_states=None, class_labels=labels
            ).sample
        return result

    return call


@pytest.fixture(scope="session")
def packed(
    tiny_pipeline: Path, tiny_calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the tiny pipeline, W4A8 with static scales and groups; read it."""
    pipe: TextToAudioPipeline = ptq4adm.load_pipeline(tiny_pipeline)
    config = QuantConfig(group_size=64, overrides={"mid_block.*": "w8a8"}, **FAST)
    ptq4adm.quantize(pipe, config, Calibration.load(tiny_calibration), progress=False)
    return ptq4adm.save_pipeline(pipe, tmp_path_factory.mktemp("packed") / "pipe")


@pytest.fixture
def fast() -> PTQ4ADMConfig:
    """Dynamic W4A8 whose scales take no search."""
    return PTQ4ADMConfig(**FAST)


@pytest.fixture
def load_packed(packed: Path) -> Callable[..., nn.Module]:
    """The packed UNet through diffusers."""
    from diffusers import UNet2DConditionModel

    def load(**arguments: object) -> nn.Module:
        unet: nn.Module = UNet2DConditionModel.from_pretrained(
            packed, subfolder="unet", **arguments
        )
        return unet

    return load
