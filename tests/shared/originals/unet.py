"""The UNet of the latent-diffusion code in plain torch, from its published configs.

Independent of the package and of diffusers: names and shapes of a checkpoint, and its forward,
which reads the tensors by those names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class UNetConfig:
    """As in the yaml of the original code; either `num_heads` or `num_head_channels` is given."""

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    attention_resolutions: tuple[int, ...]
    num_res_blocks: int = 2
    num_heads: int = -1
    num_head_channels: int = -1
    transformer_depth: int = 1
    context_dim: int | None = None
    extra_film_condition_dim: int | None = None

    @property
    def emb_channels(self) -> int:
        """Width of the embedding that residual blocks see: time, and AudioLDM's text beside it."""
        return self.model_channels * 4 * (1 if self.extra_film_condition_dim is None else 2)

    def heads(self, channels: int) -> int:
        if self.num_head_channels == -1:
            return self.num_heads
        return channels // self.num_head_channels


# Text-to-Audio/Make-An-Audio, configs/text_to_audio/txt2audio_args.yaml
MAKE_AN_AUDIO = UNetConfig(4, 4, 320, (1, 2), (1, 2), num_heads=8, context_dim=1024)
# haoheliu/AudioLDM, audioldm/utils.py: default_audioldm_config
AUDIOLDM_S = UNetConfig(
    8, 8, 128, (1, 2, 3, 5), (8, 4, 2), num_head_channels=32, extra_film_condition_dim=512
)


def plan(config: UNetConfig) -> list[tuple[str, str, int, int]]:
    """Every part in the order it runs: (kind, name, channels in, channels out)."""
    mc = config.model_channels
    parts = [("conv", "input_blocks.0.0", config.in_channels, mc)]
    kept, channels, scale, block = [mc], mc, 1, 1
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            parts.append(("res", f"input_blocks.{block}.0", channels, mult * mc))
            channels = mult * mc
            if scale in config.attention_resolutions:
                parts.append(("attn", f"input_blocks.{block}.1", channels, channels))
            parts.append(("keep", "", channels, channels))
            kept.append(channels)
            block += 1
        if level != len(config.channel_mult) - 1:
            parts.append(("down", f"input_blocks.{block}.0", channels, channels))
            parts.append(("keep", "", channels, channels))
            kept.append(channels)
            block += 1
            scale *= 2
    parts.append(("res", "middle_block.0", channels, channels))
    parts.append(("attn", "middle_block.1", channels, channels))
    parts.append(("res", "middle_block.2", channels, channels))
    block = 0
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for i in range(config.num_res_blocks + 1):
            skip = kept.pop()
            parts.append(("join", "", channels, channels + skip))
            parts.append(("res", f"output_blocks.{block}.0", channels + skip, mult * mc))
            channels, last = mult * mc, 1
            if scale in config.attention_resolutions:
                parts.append(("attn", f"output_blocks.{block}.1", channels, channels))
                last = 2
            if level and i == config.num_res_blocks:
                parts.append(("up", f"output_blocks.{block}.{last}", channels, channels))
                scale //= 2
            block += 1
    return parts


def shapes(config: UNetConfig) -> Shapes:
    """Name to shape of every tensor below `model.diffusion_model.`."""
    mc, found = config.model_channels, {}
    found |= _linear("time_embed.0", mc, 4 * mc) | _linear("time_embed.2", 4 * mc, 4 * mc)
    if config.extra_film_condition_dim is not None:
        found |= _linear("film_emb", config.extra_film_condition_dim, 4 * mc)
    for kind, name, c_in, c_out in plan(config):
        if kind == "conv":
            found |= _conv(name, c_in, c_out)
        elif kind == "res":
            found |= _norm(f"{name}.in_layers.0", c_in) | _conv(f"{name}.in_layers.2", c_in, c_out)
            found |= _linear(f"{name}.emb_layers.1", config.emb_channels, c_out)
            found |= _norm(f"{name}.out_layers.0", c_out)
            found |= _conv(f"{name}.out_layers.3", c_out, c_out)
            if c_in != c_out:
                found |= _conv(f"{name}.skip_connection", c_in, c_out, 1)
        elif kind == "down":
            found |= _conv(f"{name}.op", c_in, c_out)
        elif kind == "up":
            found |= _conv(f"{name}.conv", c_in, c_out)
        elif kind == "attn":
            found |= _transformer(name, c_in, config)
    return found | _norm("out.0", mc) | _conv("out.2", mc, config.out_channels)


def forward(
    w: dict[str, Tensor],
    config: UNetConfig,
    x: Tensor,
    t: Tensor,
    *,
    context: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """Prediction for latents [B, C, H, W] at timesteps [B]."""
    half = config.model_channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
    angles = t[:, None].float() * frequencies
    emb = torch.cat([angles.cos(), angles.sin()], dim=-1)
    emb = _lin(w, "time_embed.2", functional.silu(_lin(w, "time_embed.0", emb)))
    if y is not None:
        emb = torch.cat([emb, _lin(w, "film_emb", y)], dim=-1)
    kept: list[Tensor] = []
    for kind, name, c_in, c_out in plan(config):
        if kind == "conv":
            x = functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
            kept.append(x)
        elif kind == "res":
            x = _res(w, name, x, emb)
        elif kind == "attn":
            x = _spatial_transformer(w, name, x, context, config.heads(c_in), config)
        elif kind == "keep":
            kept.append(x)
        elif kind == "down":
            name = f"{name}.op"
            x = functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)
        elif kind == "up":
            name = f"{name}.conv"
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
        else:
            x = torch.cat([x, kept.pop()], dim=1)
            assert x.shape[1] == c_out
    x = functional.silu(_group_norm(w, "out.0", x))
    return functional.conv2d(x, w["out.2.weight"], w["out.2.bias"], padding=1)


def _res(w: dict[str, Tensor], name: str, x: Tensor, emb: Tensor) -> Tensor:
    h = functional.silu(_group_norm(w, f"{name}.in_layers.0", x))
    h = functional.conv2d(
        h, w[f"{name}.in_layers.2.weight"], w[f"{name}.in_layers.2.bias"], padding=1
    )
    h = h + _lin(w, f"{name}.emb_layers.1", functional.silu(emb))[:, :, None, None]
    h = functional.silu(_group_norm(w, f"{name}.out_layers.0", h))
    h = functional.conv2d(
        h, w[f"{name}.out_layers.3.weight"], w[f"{name}.out_layers.3.bias"], padding=1
    )
    if f"{name}.skip_connection.weight" in w:
        name = f"{name}.skip_connection"
        x = functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"])
    return x + h


def _spatial_transformer(
    w: dict[str, Tensor],
    name: str,
    x: Tensor,
    context: Tensor | None,
    heads: int,
    config: UNetConfig,
) -> Tensor:
    height, width = x.shape[2:]
    h = _group_norm(w, f"{name}.norm", x, eps=1e-6)
    h = functional.conv2d(h, w[f"{name}.proj_in.weight"], w[f"{name}.proj_in.bias"])
    h = h.flatten(2).transpose(1, 2)
    for d in range(config.transformer_depth):
        block = f"{name}.transformer_blocks.{d}"
        normed = _layer_norm(w, f"{block}.norm1", h)
        h = h + _attention(w, f"{block}.attn1", normed, normed, heads)
        normed = _layer_norm(w, f"{block}.norm2", h)
        h = h + _attention(
            w, f"{block}.attn2", normed, normed if context is None else context, heads
        )
        gated = _lin(w, f"{block}.ff.net.0.proj", _layer_norm(w, f"{block}.norm3", h))
        value, gate = gated.chunk(2, dim=-1)
        h = h + _lin(w, f"{block}.ff.net.2", value * functional.gelu(gate))
    h = h.transpose(1, 2).unflatten(2, (height, width))
    return x + functional.conv2d(h, w[f"{name}.proj_out.weight"], w[f"{name}.proj_out.bias"])


def _attention(w: dict[str, Tensor], name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    q, k, v = (
        functional.linear(source, w[f"{name}.to_{part}.weight"]).unflatten(-1, (heads, -1))
        for part, source in (("q", x), ("k", context), ("v", context))
    )
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    h = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v).flatten(2)
    return _lin(w, f"{name}.to_out.0", h)


def _transformer(name: str, channels: int, config: UNetConfig) -> Shapes:
    found = _norm(f"{name}.norm", channels) | _conv(f"{name}.proj_in", channels, channels, 1)
    context = config.context_dim or channels
    for d in range(config.transformer_depth):
        block = f"{name}.transformer_blocks.{d}"
        for attention, width in (("attn1", channels), ("attn2", context)):
            start = f"{block}.{attention}"
            found[f"{start}.to_q.weight"] = (channels, channels)
            found[f"{start}.to_k.weight"] = (channels, width)
            found[f"{start}.to_v.weight"] = (channels, width)
            found |= _linear(f"{start}.to_out.0", channels, channels)
        found |= _linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
        found |= _linear(f"{block}.ff.net.2", 4 * channels, channels)
        for i in (1, 2, 3):
            found |= _norm(f"{block}.norm{i}", channels)
    return found | _conv(f"{name}.proj_out", channels, channels, 1)


def _lin(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _group_norm(w: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return functional.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _layer_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    return functional.layer_norm(x, weight.shape, weight, w[f"{name}.bias"])


def _conv(name: str, c_in: int, c_out: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, size, size), f"{name}.bias": (c_out,)}


def _linear(name: str, c_in: int, c_out: int) -> Shapes:
    return {f"{name}.weight": (c_out, c_in), f"{name}.bias": (c_out,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
