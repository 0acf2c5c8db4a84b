"""First stages of the latent-diffusion code, as `AutoencoderKL`.

    encoder.conv_in, .down.i.{block.j, attn.j, downsample.conv}, .mid.{block_1, attn_1, block_2}
    encoder.norm_out, .conv_out        then quant_conv
    post_quant_conv                    then decoder, with .up.i, the finest level first

Attention is a 1x1 convolution to queries, keys and values there, and a linear in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import CheckpointError
from ptq4adm.models.assign import build

PREFIX = "first_stage_model."
_OTHER_PARTS = ("vocoder.", "loss.")

_PARTS = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "downsamplers.0.conv": "downsample.conv",
    "upsamplers.0.conv": "upsample.conv",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_LAYER = re.compile(r"\.(resnets|attentions)\.(\d+)\.")


def load_vae(
    tensors: Mapping[str, Tensor],
    scaling_factor: float,
    source: str,
    *,
    prefix: str = PREFIX,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The first stage.

    Args:
        tensors: those below `prefix`, without it; a vocoder or a loss among them is left out.
        scaling_factor: latents of the UNet over those of the decoder.
        source: the file, for messages.
        prefix: of the names in the file, for messages.
        dtype: of the weights.

    Returns:
        An `AutoencoderKL` in evaluation mode.

    Raises:
        CheckpointError: if tensors are missing or unknown, or contradict each other; see children.
    """
    from diffusers import AutoencoderKL

    own = {name: t for name, t in tensors.items() if not name.startswith(_OTHER_PARTS)}
    config = _config(own, source, prefix)
    levels = len(config["block_out_channels"])
    vae: nn.Module = build(
        lambda: AutoencoderKL(**config, scaling_factor=scaling_factor),
        {prefix + name: tensor for name, tensor in own.items()},
        source,
        dtype=dtype,
        file_name=lambda name: prefix + file_name(name, levels),
    )
    return vae


def file_name(name: str, levels: int) -> str:
    """Name in the file, without a prefix, of a tensor of the `AutoencoderKL`."""
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return name
    for part, there in _PARTS.items():
        rest = re.sub(rf"(^|\.){re.escape(part)}\.", rf"\g<1>{there}.", rest)
    rest = re.sub(r"^down_blocks\.", "down.", rest)
    rest = re.sub(r"^up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", rest)
    rest = _LAYER.sub(lambda m: f".{'block' if m[1] == 'resnets' else 'attn'}.{m[2]}.", rest)
    return f"{side}.{rest}"


def _config(tensors: Mapping[str, Tensor], source: str, prefix: str) -> dict[str, Any]:
    """Arguments of the `AutoencoderKL`, out of names and shapes."""
    channels: list[int] = []
    attention: list[bool] = []
    while (conv := tensors.get(f"encoder.down.{len(channels)}.block.0.conv2.weight")) is not None:
        attention.append(f"encoder.down.{len(channels)}.attn.0.norm.weight" in tensors)
        channels.append(int(conv.shape[0]))
    needed = ("encoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight")
    missing = [name for name in needed if name not in tensors]
    if missing or not channels:
        lacking = missing[0] if missing else "encoder.down.0.block.0.conv2.weight"
        raise CheckpointError(
            f"{source}: lacks {prefix}{lacking}; it holds no first stage of a known family"
        )
    layers = 0
    while f"encoder.down.0.block.{layers}.conv1.weight" in tensors:
        layers += 1
    kinds = ["Attn" if has else "" for has in attention]
    return {
        "in_channels": int(tensors["encoder.conv_in.weight"].shape[1]),
        "out_channels": int(tensors["decoder.conv_out.weight"].shape[0]),
        "latent_channels": int(tensors["post_quant_conv.weight"].shape[1]),
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in tensors,
    }
