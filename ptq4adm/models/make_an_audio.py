"""Make-An-Audio: a UNet of two levels conditioned by 77 text tokens, through cross-attention."""

from __future__ import annotations

import torch
from torch import nn


def make_an_audio_unet(*, device: str | torch.device = "cpu") -> nn.Module:
    """The UNet of Make-An-Audio with random weights, 160 million parameters.

    It takes latents [B, 4, 10, 80] for 10 s and `encoder_hidden_states` [B, 77, 1024], no mask.

    Args:
        device: "meta" makes it without memory.

    Returns:
        A `UNet2DConditionModel` in evaluation mode, float32.

    Source: Text-to-Audio/Make-An-Audio, configs/text_to_audio/txt2audio_args.yaml (the numbers), in
        the form that diffusers' converter of latent-diffusion checkpoints gives them.
    """
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet: nn.Module = UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=(320, 640),
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=1024,
        )
    return unet.requires_grad_(False).eval()
