"""AudioLDM's HiFi-GAN in plain torch, from its published config, without weight norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class HifiGanConfig:
    """`HIFIGAN_16K_64` of audioldm/hifigan/utilities.py."""

    num_mels: int = 64
    upsample_initial_channel: int = 1024
    upsample_rates: tuple[int, ...] = (5, 4, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (16, 16, 8, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)


def shapes(config: HifiGanConfig) -> Shapes:
    """Name to shape below `first_stage_model.vocoder.`"""
    width = config.upsample_initial_channel
    found = _conv("conv_pre", config.num_mels, width, 7)
    count = len(config.resblock_kernel_sizes)
    for i, size in enumerate(config.upsample_kernel_sizes):
        found[f"ups.{i}.weight"] = (width, width // 2, size)
        width //= 2
        found[f"ups.{i}.bias"] = (width,)
        for j, kernel in enumerate(config.resblock_kernel_sizes):
            for part in ("convs1", "convs2"):
                for d in range(len(config.dilations)):
                    name = f"resblocks.{i * count + j}.{part}.{d}"
                    found |= _conv(name, width, width, kernel)
    return found | _conv("conv_post", width, 1, 7)


def forward(w: dict[str, Tensor], config: HifiGanConfig, mel: Tensor) -> Tensor:
    """Waveform [B, T] of [B, mels, frames]."""
    x = functional.conv1d(mel, w["conv_pre.weight"], w["conv_pre.bias"], padding=3)
    count = len(config.resblock_kernel_sizes)
    for i, (rate, size) in enumerate(
        zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)
    ):
        x = functional.conv_transpose1d(
            functional.leaky_relu(x, 0.1),
            w[f"ups.{i}.weight"],
            w[f"ups.{i}.bias"],
            stride=rate,
            padding=(size - rate) // 2,
        )
        outputs = [_block(w, f"resblocks.{i * count + j}", config, x) for j in range(count)]
        x = torch.stack(outputs).mean(dim=0)
    x = functional.leaky_relu(x, 0.01)
    return torch.tanh(functional.conv1d(x, w["conv_post.weight"], w["conv_post.bias"], padding=3))[
        :, 0
    ]


def _block(w: dict[str, Tensor], name: str, config: HifiGanConfig, x: Tensor) -> Tensor:
    for d, dilation in enumerate(config.dilations):
        y = x
        for part, step in (("convs1", dilation), ("convs2", 1)):
            weight, bias = w[f"{name}.{part}.{d}.weight"], w[f"{name}.{part}.{d}.bias"]
            padding = (weight.shape[-1] - 1) * step // 2
            y = functional.conv1d(
                functional.leaky_relu(y, 0.1), weight, bias, padding=padding, dilation=step
            )
        x = x + y
    return x


def _conv(name: str, c_in: int, c_out: int, size: int) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, size), f"{name}.bias": (c_out,)}
