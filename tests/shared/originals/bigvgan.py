"""BigVGAN in plain torch, from the published code's form: weight norm, filters as grouped convs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class BigVGANConfig:
    """`args.yml` of the published vocoder."""

    num_mels: int = 80
    upsample_rates: tuple[int, ...] = (4, 4, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (8, 8, 4, 4, 4, 4)
    upsample_initial_channel: int = 1536
    resblock: str = "1"
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    activation: str = "snakebeta"
    snake_logscale: bool = True


def shapes(config: BigVGANConfig) -> Shapes:
    """Name to shape of every tensor of the entry "generator"."""
    width = config.upsample_initial_channel
    found = _normed("conv_pre", width, config.num_mels, 7)
    block = 0
    for i, size in enumerate(config.upsample_kernel_sizes):
        name = f"ups.{i}.0"
        found[f"{name}.weight_g"] = (width, 1, 1)
        found[f"{name}.weight_v"] = (width, width // 2, size)
        width //= 2
        found[f"{name}.bias"] = (width,)
        for kernel, dilations in zip(
            config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
        ):
            lists = ("convs1", "convs2") if config.resblock == "1" else ("convs",)
            for part in lists:
                for j in range(len(dilations)):
                    found |= _normed(f"resblocks.{block}.{part}.{j}", width, width, kernel)
            for j in range(len(dilations) * len(lists)):
                found |= _activation(f"resblocks.{block}.activations.{j}", width, config)
            block += 1
    found |= _activation("activation_post", width, config)
    return found | _normed("conv_post", 1, width, 7)


def fill(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random weights with the buffers that a published file holds beside them."""
    return {
        name: kaiser_filter().view(1, 1, -1) if name.endswith("filter") else tensor
        for name, tensor in w.items()
    }


def forward(w: dict[str, Tensor], config: BigVGANConfig, mel: Tensor) -> Tensor:
    """Waveform [B, 1, T] of [B, mels, frames]."""
    x = functional.conv1d(mel, _weight(w, "conv_pre"), w["conv_pre.bias"], padding=3)
    count = len(config.resblock_kernel_sizes)
    for i, (rate, size) in enumerate(
        zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)
    ):
        name = f"ups.{i}.0"
        x = functional.conv_transpose1d(
            x, _weight(w, name), w[f"{name}.bias"], stride=rate, padding=(size - rate) // 2
        )
        outputs = [_block(w, f"resblocks.{i * count + j}", config, j, x) for j in range(count)]
        x = sum(outputs) / count
    x = functional.conv1d(
        _activate(w, "activation_post", config, x),
        _weight(w, "conv_post"),
        w["conv_post.bias"],
        padding=3,
    )
    return torch.tanh(x)


def kaiser_filter() -> Tensor:
    """The published filter for a ratio of 2: cutoff 0.25, half width 0.3, 12 taps."""
    cutoff, half_width, size = 0.25, 0.3, 12
    attenuation = 2.285 * (size // 2 - 1) * math.pi * 4 * half_width + 7.95
    assert attenuation > 50
    window = torch.kaiser_window(size, beta=0.1102 * (attenuation - 8.7), periodic=False)
    time = torch.arange(-size // 2, size // 2) + 0.5
    taps = 2 * cutoff * window * torch.sinc(2 * cutoff * time)
    return taps / taps.sum()


def _block(w: dict[str, Tensor], name: str, config: BigVGANConfig, which: int, x: Tensor) -> Tensor:
    kernel = config.resblock_kernel_sizes[which]
    for j, dilation in enumerate(config.resblock_dilation_sizes[which]):
        first = f"{name}.convs1.{j}" if config.resblock == "1" else f"{name}.convs.{j}"
        steps = [(first, dilation)]
        if config.resblock == "1":
            steps.append((f"{name}.convs2.{j}", 1))
        y = x
        for k, (conv, d) in enumerate(steps):
            y = _activate(w, f"{name}.activations.{j * len(steps) + k}", config, y)
            padding = (kernel * d - d) // 2
            y = functional.conv1d(
                y, _weight(w, conv), w[f"{conv}.bias"], dilation=d, padding=padding
            )
        x = x + y
    return x


def _activate(w: dict[str, Tensor], name: str, config: BigVGANConfig, x: Tensor) -> Tensor:
    channels = x.shape[1]
    x = functional.pad(x, (5, 5), mode="replicate")
    taps = w[f"{name}.upsample.filter"].expand(channels, 1, -1)
    x = 2 * functional.conv_transpose1d(x, taps, stride=2, groups=channels)
    x = x[..., 15:-15]
    alpha = w[f"{name}.act.alpha"]
    beta = w[f"{name}.act.beta"] if config.activation == "snakebeta" else alpha
    if config.snake_logscale:
        alpha, beta = alpha.exp(), beta.exp()
    x = x + (1.0 / (beta + 1e-9))[:, None] * torch.sin(x * alpha[:, None]) ** 2
    x = functional.pad(x, (5, 6), mode="replicate")
    taps = w[f"{name}.downsample.lowpass.filter"].expand(channels, 1, -1)
    return functional.conv1d(x, taps, stride=2, groups=channels)


def _weight(w: dict[str, Tensor], name: str) -> Tensor:
    g, v = w[f"{name}.weight_g"], w[f"{name}.weight_v"]
    return g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1)


def _normed(name: str, c_out: int, c_in: int, size: int) -> Shapes:
    return {
        f"{name}.weight_g": (c_out, 1, 1),
        f"{name}.weight_v": (c_out, c_in, size),
        f"{name}.bias": (c_out,),
    }


def _activation(name: str, channels: int, config: BigVGANConfig) -> Shapes:
    found: Shapes = {f"{name}.act.alpha": (channels,)}
    if config.activation == "snakebeta":
        found[f"{name}.act.beta"] = (channels,)
    found[f"{name}.upsample.filter"] = (1, 1, 12)
    found[f"{name}.downsample.lowpass.filter"] = (1, 1, 12)
    return found
