"""AudioLDM: a UNet conditioned by one CLAP text vector, concatenated to the time embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import ConfigError
from ptq4adm.models.components import COMPONENTS
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.models.unet2d import UNet2DAdapter
from ptq4adm.protocols import SamplingDefaults, StepCallback

# block_out_channels of the published models: model_channels 128, 192, 256 times 1, 2, 3, 5
_REAL_CHANNELS = {
    "audioldm-s": (128, 256, 384, 640),
    "audioldm-m": (192, 384, 576, 960),
    "audioldm-l": (256, 512, 768, 1280),
}


class AudioLDMAdapter(UNet2DAdapter):
    """Pipelines of AudioLDM's kind, of this package or of diffusers."""

    family = "audioldm"

    def denoiser(self, pipe: Any) -> nn.Module:
        """The pipeline's UNet."""
        unet: nn.Module = pipe.unet
        return unet

    def num_train_timesteps(self, pipe: Any) -> int:
        """The scheduler's number."""
        return int(pipe.scheduler.config.num_train_timesteps)

    def sampling_defaults(self, pipe: Any) -> SamplingDefaults:
        """The pipeline's own steps and guidance."""
        return as_pipeline(pipe).defaults

    def run(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        seed: int,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """Encode and denoise; see `TextToAudioPipeline.denoise`."""
        ours = as_pipeline(pipe)
        embeds = ours.encode_prompts(prompts)
        return ours.denoise(
            embeds, steps=steps, guidance=guidance, seed=seed, callback=on_step
        ).float()


def as_pipeline(pipe: Any) -> TextToAudioPipeline:
    """The same components as a pipeline of this package; no weight is copied."""
    if isinstance(pipe, TextToAudioPipeline):
        return pipe
    return TextToAudioPipeline(**{name: getattr(pipe, name) for name in COMPONENTS})


def real_unet(name: str, *, device: str | torch.device = "cpu") -> nn.Module:
    """The UNet of a published AudioLDM, with random weights: for sizes, shapes and speed.

    Args:
        name: "audioldm-s", "audioldm-m" or "audioldm-l" (185, 416 and 739 million parameters).
        device: "meta" makes it without memory.

    Returns:
        A `UNet2DConditionModel` in evaluation mode, float32.

    Raises:
        ConfigError: if the name is unknown.

    Source: huggingface/diffusers, scripts/convert_original_audioldm_to_diffusers.py. Its 8 heads a
        level are kept, although the original code has heads 32 wide.
    """
    if name not in _REAL_CHANNELS:
        raise ConfigError(f"UNet {name!r} is unknown: expected one of {', '.join(_REAL_CHANNELS)}")
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet: nn.Module = UNet2DConditionModel(
            sample_size=128,
            in_channels=8,
            out_channels=8,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            block_out_channels=_REAL_CHANNELS[name],
            layers_per_block=2,
            cross_attention_dim=_REAL_CHANNELS[name],
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=512,
            class_embeddings_concat=True,
        )
    return unet.requires_grad_(False).eval()
