"""The first stage of the latent-diffusion code in plain torch, from its published configs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class VaeConfig:
    """`ddconfig` of the original yaml."""

    z_channels: int
    ch: int
    ch_mult: tuple[int, ...]
    resolution: int
    attn_resolutions: tuple[int, ...] = ()
    num_res_blocks: int = 2

    def has_attention(self, level: int) -> bool:
        return self.resolution // 2**level in self.attn_resolutions


MAKE_AN_AUDIO = VaeConfig(4, 128, (1, 2, 2, 4), 624, (78, 156))
AUDIOLDM = VaeConfig(8, 128, (1, 2, 4), 256)


def shapes(config: VaeConfig) -> Shapes:
    """Name to shape of every tensor below `first_stage_model.`, without a vocoder."""
    widths, z = [config.ch * mult for mult in config.ch_mult], config.z_channels
    last = len(widths) - 1
    found = _conv("encoder.conv_in", 1, config.ch)
    channels = config.ch
    for level, width in enumerate(widths):
        for i in range(config.num_res_blocks):
            found |= _res_shapes(f"encoder.down.{level}.block.{i}", channels, width)
            channels = width
            if config.has_attention(level):
                found |= _attn_shapes(f"encoder.down.{level}.attn.{i}", width)
        if level != last:
            found |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
    found |= _mid_shapes("encoder.mid", channels) | _norm("encoder.norm_out", channels)
    found |= _conv("encoder.conv_out", channels, 2 * z)
    found |= _conv("quant_conv", 2 * z, 2 * z, 1) | _conv("post_quant_conv", z, z, 1)
    found |= _conv("decoder.conv_in", z, channels) | _mid_shapes("decoder.mid", channels)
    for level, width in reversed(list(enumerate(widths))):
        for i in range(config.num_res_blocks + 1):
            found |= _res_shapes(f"decoder.up.{level}.block.{i}", channels, width)
            channels = width
            if config.has_attention(level):
                found |= _attn_shapes(f"decoder.up.{level}.attn.{i}", width)
        if level:
            found |= _conv(f"decoder.up.{level}.upsample.conv", width, width)
    return found | _norm("decoder.norm_out", channels) | _conv("decoder.conv_out", channels, 1)


def decode(w: dict[str, Tensor], config: VaeConfig, z: Tensor) -> Tensor:
    """Spectrogram of latents, which are divided by the scale factor already."""
    x = _convolve(w, "decoder.conv_in", _convolve(w, "post_quant_conv", z))
    x = _mid(w, "decoder.mid", x)
    for level in reversed(range(len(config.ch_mult))):
        for i in range(config.num_res_blocks + 1):
            x = _res(w, f"decoder.up.{level}.block.{i}", x)
            if config.has_attention(level):
                x = _attn(w, f"decoder.up.{level}.attn.{i}", x)
        if level:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = _convolve(w, f"decoder.up.{level}.upsample.conv", x)
    return _convolve(w, "decoder.conv_out", functional.silu(_group_norm(w, "decoder.norm_out", x)))


def encode(w: dict[str, Tensor], config: VaeConfig, x: Tensor) -> Tensor:
    """Mean of the latents of a spectrogram."""
    x = _convolve(w, "encoder.conv_in", x)
    for level in range(len(config.ch_mult)):
        for i in range(config.num_res_blocks):
            x = _res(w, f"encoder.down.{level}.block.{i}", x)
            if config.has_attention(level):
                x = _attn(w, f"encoder.down.{level}.attn.{i}", x)
        if level != len(config.ch_mult) - 1:
            name = f"encoder.down.{level}.downsample.conv"
            x = functional.pad(x, (0, 1, 0, 1))
            x = functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
    x = functional.silu(_group_norm(w, "encoder.norm_out", _mid(w, "encoder.mid", x)))
    moments = _convolve(w, "quant_conv", _convolve(w, "encoder.conv_out", x))
    return moments.chunk(2, dim=1)[0]


def _mid(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = _attn(w, f"{name}.attn_1", _res(w, f"{name}.block_1", x))
    return _res(w, f"{name}.block_2", x)


def _res(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    h = _convolve(w, f"{name}.conv1", functional.silu(_group_norm(w, f"{name}.norm1", x)))
    h = _convolve(w, f"{name}.conv2", functional.silu(_group_norm(w, f"{name}.norm2", h)))
    if f"{name}.nin_shortcut.weight" in w:
        x = _convolve(w, f"{name}.nin_shortcut", x)
    return x + h


def _attn(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    h = _group_norm(w, f"{name}.norm", x)
    q, k, v = (_convolve(w, f"{name}.{part}", h).flatten(2) for part in "qkv")
    scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1])
    h = torch.einsum("bij,bcj->bci", scores.softmax(dim=-1), v).unflatten(2, x.shape[2:])
    return x + _convolve(w, f"{name}.proj_out", h)


def _convolve(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return functional.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _group_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def _res_shapes(name: str, c_in: int, c_out: int) -> Shapes:
    found = _norm(f"{name}.norm1", c_in) | _conv(f"{name}.conv1", c_in, c_out)
    found |= _norm(f"{name}.norm2", c_out) | _conv(f"{name}.conv2", c_out, c_out)
    return found if c_in == c_out else found | _conv(f"{name}.nin_shortcut", c_in, c_out, 1)


def _attn_shapes(name: str, channels: int) -> Shapes:
    found = _norm(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        found |= _conv(f"{name}.{part}", channels, channels, 1)
    return found


def _mid_shapes(name: str, channels: int) -> Shapes:
    found = _res_shapes(f"{name}.block_1", channels, channels)
    found |= _attn_shapes(f"{name}.attn_1", channels)
    return found | _res_shapes(f"{name}.block_2", channels, channels)


def _conv(name: str, c_in: int, c_out: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, size, size), f"{name}.bias": (c_out,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
