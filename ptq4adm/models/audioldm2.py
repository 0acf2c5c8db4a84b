"""AudioLDM2: two texts for two kinds of cross-attention layers.

The eight vectors that a GPT-2 continues from CLAP's and T5's view of the prompt, and T5's own
tokens with their mask. diffusers' `AudioLDM2Pipeline`, which is maintained there, makes them; the
denoising loop is this package's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.models.components import COMPONENTS
from ptq4adm.models.conditioning import Conditioning
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.protocols import SamplingDefaults

_DEFAULTS = SamplingDefaults(steps=200, guidance=3.5)

GENERATED = "encoder_hidden_states"  # of the language model
TOKENS, TOKEN_MASK = "encoder_hidden_states_1", "encoder_attention_mask_1"  # of T5


@dataclass
class AudioLDM2(TextToAudioPipeline):
    """A pipeline of AudioLDM2's kind, of any size, with the components of `AudioLDM2Pipeline`.

    Each prompt is encoded by itself, so a sample does not depend on the others of its batch:
    diffusers pads all prompts of a batch to one length before the language model sees them. A
    prompt alone gives what `AudioLDM2Pipeline` gives.

    Attributes:
        text_encoder: `ClapModel`; its audio half is not used here.
        text_encoder_2: `T5EncoderModel`.
        tokenizer_2: its tokenizer.
        projection_model: `AudioLDM2ProjectionModel`.
        language_model: `GPT2LMHeadModel`.
        feature_extractor: of CLAP's audio half, kept for saving.
    """

    text_encoder_2: Any = None
    tokenizer_2: Any = None
    projection_model: Any = None
    language_model: Any = None
    feature_extractor: Any = None
    defaults: SamplingDefaults = _DEFAULTS

    family = "audioldm2"
    index_class = "AudioLDM2Pipeline"
    family_defaults = _DEFAULTS
    component_names = (
        *COMPONENTS,
        "text_encoder_2",
        "tokenizer_2",
        "projection_model",
        "language_model",
        "feature_extractor",
    )

    def as_diffusers(self) -> Any:
        """The same components as a `diffusers.AudioLDM2Pipeline`; no weight is copied."""
        from diffusers import AudioLDM2Pipeline

        return AudioLDM2Pipeline(**{name: getattr(self, name) for name in self.component_names})

    def _encode(self, texts: list[str]) -> Conditioning:
        """`encoder_hidden_states` [B, 8, D], `encoder_hidden_states_1` [B, L, D'], its mask."""
        pipe = self.as_diffusers()
        device = next(self.text_encoder_2.parameters()).device
        parts = [pipe.encode_prompt(text, device, 1, False) for text in texts]
        return _join(parts)

    def _unconditional(self, conditioning: Conditioning) -> Conditioning:
        """One empty prompt a sample: diffusers pads it to the length of the sample's own text."""
        pipe = self.as_diffusers()
        device = next(self.text_encoder_2.parameters()).device
        given = conditioning.tensors
        parts = []
        for i, length in enumerate(given[TOKEN_MASK].sum(dim=1).tolist()):
            both = pipe.encode_prompt(
                None,
                device,
                1,
                True,
                prompt_embeds=given[TOKENS][i : i + 1, :length],
                attention_mask=given[TOKEN_MASK][i : i + 1, :length],
                generated_prompt_embeds=given[GENERATED][i : i + 1],
            )
            parts.append(tuple(tensor[:1] for tensor in both))
        return _join(parts, int(given[TOKENS].shape[1]))


def _join(parts: list[Any], length: int = 0) -> Conditioning:
    """One batch of diffusers' (tokens, mask, generated), all of one length, at least `length`."""
    length = max([length, *(int(tokens.shape[1]) for tokens, _, _ in parts)])
    return Conditioning(
        {
            GENERATED: torch.cat([generated for _, _, generated in parts]),
            TOKENS: torch.cat([_pad(tokens, length) for tokens, _, _ in parts]),
            TOKEN_MASK: torch.cat([_pad(mask[..., None], length)[..., 0] for _, mask, _ in parts]),
        }
    )


def _pad(tokens: Tensor, length: int) -> Tensor:
    """Zeros after the tokens [B, L, D], up to a length; the mask is 0 there."""
    return functional.pad(tokens, (0, 0, 0, length - tokens.shape[1]))


def audioldm2_unet(*, device: str | torch.device = "cpu") -> nn.Module:
    """The UNet of AudioLDM2 with random weights, 347 million parameters: for sizes and shapes.

    It takes latents [B, 8, 256, 16] for 10.24 s, `encoder_hidden_states` [B, 8, 768],
    `encoder_hidden_states_1` [B, L, 1024] and their mask `encoder_attention_mask_1` [B, L].

    Args:
        device: "meta" makes it without memory.

    Returns:
        An `AudioLDM2UNet2DConditionModel` in evaluation mode, float32.

    Source: cvssp/audioldm2 on the Hugging Face hub, unet/config.json (the numbers).
    """
    from diffusers import AudioLDM2UNet2DConditionModel

    with torch.device(device):
        unet: nn.Module = AudioLDM2UNet2DConditionModel(
            sample_size=256,
            in_channels=8,
            out_channels=8,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            block_out_channels=(128, 256, 384, 640),
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=[[None, 768, 1024]] * 4,
            transformer_layers_per_block=1,
        )
    return unet.requires_grad_(False).eval()
