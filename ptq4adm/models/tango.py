"""TANGO: a UNet conditioned by the tokens of a T5 text encoder, through cross-attention."""

from __future__ import annotations

import torch
from torch import nn


def tango_unet(*, device: str | torch.device = "cpu") -> nn.Module:
    """The UNet of TANGO with random weights, 866 million parameters: for sizes, shapes and speed.

    It takes latents [B, 8, 256, 16] for 10.24 s, `encoder_hidden_states` [B, L, 1024] and their
    mask as `encoder_attention_mask` [B, L].

    Args:
        device: "meta" makes it without memory.

    Returns:
        A `UNet2DConditionModel` in evaluation mode, float32.

    Source: declare-lab/tango, configs/diffusion_model_config.json (the numbers).
    """
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet: nn.Module = UNet2DConditionModel(
            sample_size=(32, 2),
            in_channels=8,
            out_channels=8,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            # numbers of heads, in spite of the name: every head is 64 wide
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
            upcast_attention=True,
        )
    return unet.requires_grad_(False).eval()
