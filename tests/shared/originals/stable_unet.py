"""TANGO's UNet in plain torch, from its published config: Stable Diffusion 2's, for 8 channels.

Names are those of the published file: `UNet2DConditionModel` as it was in diffusers 0.15.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]
GROUPS, EPS, EPS_TRANSFORMER = 32, 1e-5, 1e-6


@dataclass(frozen=True)
class StableConfig:
    """The entries of diffusion_model_config.json that vary."""

    channels: int = 8
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (5, 10, 20, 20)
    layers: int = 2
    text: int = 1024
    sample_size: tuple[int, int] = (32, 2)

    def to_json(self) -> dict[str, object]:
        levels = len(self.widths)
        return {
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": "0.10.0.dev0",
            "act_fn": "silu",
            "attention_head_dim": list(self.heads),
            "block_out_channels": list(self.widths),
            "cross_attention_dim": self.text,
            "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "layers_per_block": self.layers,
            "mid_block_scale_factor": 1,
            "norm_eps": EPS,
            "norm_num_groups": GROUPS,
            "sample_size": list(self.sample_size),
            "use_linear_projection": True,
            "upcast_attention": True,
        }


def shapes(config: StableConfig) -> Shapes:
    """Name to shape of every tensor below `unet.`."""
    first = config.widths[0]
    time = 4 * first
    found = _pair("conv_in", first, (config.channels, 3, 3))
    found |= _pair("time_embedding.linear_1", time, (first,))
    found |= _pair("time_embedding.linear_2", time, (time,))
    for name, kind, c_in, c_out, text in plan(config):
        if kind == "res":
            found |= _pair(f"{name}.norm1", c_in) | _pair(f"{name}.conv1", c_out, (c_in, 3, 3))
            found |= _pair(f"{name}.time_emb_proj", c_out, (time,))
            found |= _pair(f"{name}.norm2", c_out) | _pair(f"{name}.conv2", c_out, (c_out, 3, 3))
            if c_in != c_out:
                found |= _pair(f"{name}.conv_shortcut", c_out, (c_in, 1, 1))
        elif kind == "attn":
            found |= _transformer_shapes(name, c_out, text)
        else:
            found |= _pair(name, c_out, (c_in, 3, 3))
    found |= _pair("conv_norm_out", first)
    return found | _pair("conv_out", config.channels, (first, 3, 3))


def plan(config: StableConfig) -> Iterator[tuple[str, str, int, int, int]]:
    """Every block in order: name, kind, channels in and out, width of the text."""
    widths, text = config.widths, config.text
    channels, skips = widths[0], [widths[0]]
    for i, width in enumerate(widths):
        for j in range(config.layers):
            yield f"down_blocks.{i}.resnets.{j}", "res", channels, width, text
            channels = width
            if i < len(widths) - 1:
                yield f"down_blocks.{i}.attentions.{j}", "attn", width, width, text
            skips.append(width)
        if i < len(widths) - 1:
            yield f"down_blocks.{i}.downsamplers.0.conv", "down", width, width, text
            skips.append(width)
    yield "mid_block.resnets.0", "res", channels, channels, text
    yield "mid_block.attentions.0", "attn", channels, channels, text
    yield "mid_block.resnets.1", "res", channels, channels, text
    for i, width in enumerate(reversed(widths)):
        for j in range(config.layers + 1):
            yield f"up_blocks.{i}.resnets.{j}", "res", channels + skips.pop(), width, text
            channels = width
            if i > 0:
                yield f"up_blocks.{i}.attentions.{j}", "attn", width, width, text
        if i < len(widths) - 1:
            yield f"up_blocks.{i}.upsamplers.0.conv", "up", width, width, text


def forward(
    w: dict[str, Tensor], config: StableConfig, x: Tensor, t: int, text: Tensor, mask: Tensor
) -> Tensor:
    """Prediction for latents [B, C, H, W] at one timestep; `mask` [B, L] is true for tokens."""
    half = config.widths[0] // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    angles = t * rates
    emb = torch.cat([angles.cos(), angles.sin()]).to(x.dtype)[None]
    emb = _lin(
        w, "time_embedding.linear_2", functional.silu(_lin(w, "time_embedding.linear_1", emb))
    )
    bias = (1 - mask.to(x.dtype)) * -10000.0
    h = _conv(w, "conv_in", x)
    skips = [h]
    heads_of = dict(zip(config.widths, config.heads, strict=True))
    for name, kind, _, width, _ in plan(config):
        if kind == "res":
            if name.startswith("up_blocks"):
                h = torch.cat([h, skips.pop()], dim=1)
            h = _res(w, name, h, emb)
        elif kind == "attn":
            h = _transformer(w, name, h, text, bias, heads_of[width])
        elif kind == "down":
            h = functional.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)
        else:
            h = _conv(w, name, h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        if name.startswith("down_blocks") and _ends_a_layer(name, config):
            skips.append(h)
    h = functional.silu(_group_norm(w, "conv_norm_out", h, EPS))
    return _conv(w, "conv_out", h)


def _ends_a_layer(name: str, config: StableConfig) -> bool:
    level = int(name.split(".")[1])
    kind = "attentions" if level < len(config.widths) - 1 else "resnets"
    return kind in name or "downsamplers" in name


def _res(w: dict[str, Tensor], name: str, x: Tensor, emb: Tensor) -> Tensor:
    h = _conv(w, f"{name}.conv1", functional.silu(_group_norm(w, f"{name}.norm1", x, EPS)))
    h = h + _lin(w, f"{name}.time_emb_proj", functional.silu(emb))[:, :, None, None]
    h = _conv(w, f"{name}.conv2", functional.silu(_group_norm(w, f"{name}.norm2", h, EPS)))
    if f"{name}.conv_shortcut.weight" in w:
        x = functional.conv2d(x, w[f"{name}.conv_shortcut.weight"], w[f"{name}.conv_shortcut.bias"])
    return x + h


def _transformer(
    w: dict[str, Tensor], name: str, x: Tensor, text: Tensor, bias: Tensor, heads: int
) -> Tensor:
    height, width = x.shape[2:]
    tokens = _group_norm(w, f"{name}.norm", x, EPS_TRANSFORMER).flatten(2).transpose(1, 2)
    tokens = _lin(w, f"{name}.proj_in", tokens)
    block = f"{name}.transformer_blocks.0"
    n = _layer_norm(w, f"{block}.norm1", tokens)
    tokens = tokens + _attention(w, f"{block}.attn1", n, n, torch.zeros(n.shape[:2]).to(n), heads)
    n = _layer_norm(w, f"{block}.norm2", tokens)
    tokens = tokens + _attention(w, f"{block}.attn2", n, text, bias, heads)
    n = _layer_norm(w, f"{block}.norm3", tokens)
    value, gate = _lin(w, f"{block}.ff.net.0.proj", n).chunk(2, dim=-1)
    tokens = tokens + _lin(w, f"{block}.ff.net.2", value * functional.gelu(gate))
    tokens = _lin(w, f"{name}.proj_out", tokens)
    return x + tokens.transpose(1, 2).unflatten(2, (height, width))


def _attention(
    w: dict[str, Tensor], name: str, x: Tensor, context: Tensor, bias: Tensor, heads: int
) -> Tensor:
    """`bias` [B, L] is added to the scores of every head and query."""
    q, k, v = (
        functional.linear(source, w[f"{name}.{part}.weight"]).unflatten(2, (heads, -1))
        for part, source in (("to_q", x), ("to_k", context), ("to_v", context))
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = (scores + bias[:, None, None]).softmax(-1)
    return _lin(w, f"{name}.to_out.0", torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def _transformer_shapes(name: str, width: int, text: int) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    found = _pair(f"{name}.norm", width)
    for part in ("proj_in", "proj_out"):
        found |= _pair(f"{name}.{part}", width, (width,))
    for i, source in ((1, width), (2, text)):
        found |= _pair(f"{block}.norm{i}", width)
        found[f"{block}.attn{i}.to_q.weight"] = (width, width)
        found[f"{block}.attn{i}.to_k.weight"] = (width, source)
        found[f"{block}.attn{i}.to_v.weight"] = (width, source)
        found |= _pair(f"{block}.attn{i}.to_out.0", width, (width,))
    found |= _pair(f"{block}.norm3", width)
    found |= _pair(f"{block}.ff.net.0.proj", 8 * width, (width,))
    return found | _pair(f"{block}.ff.net.2", width, (4 * width,))


def _lin(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _conv(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)


def _group_norm(w: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return functional.group_norm(x, GROUPS, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _layer_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return functional.layer_norm(x, weight.shape, weight, w[f"{name}.bias"], EPS)


def _pair(name: str, c_out: int, rest: tuple[int, ...] = ()) -> Shapes:
    return {f"{name}.weight": (c_out, *rest), f"{name}.bias": (c_out,)}
