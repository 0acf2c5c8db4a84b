"""AudioLDM: a UNet conditioned by one CLAP text vector, concatenated to the time embedding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from ptq4adm.errors import ConfigError
from ptq4adm.models.audioldm_files import load_parts
from ptq4adm.models.conditioning import Conditioning
from ptq4adm.models.openai_unet import PREFIX as UNET_PREFIX
from ptq4adm.models.original import checkpoint_names
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.protocols import SamplingDefaults

_DEFAULTS = SamplingDefaults(steps=25, guidance=2.5)
# of the original code, which samples with eta 1; here eta is 0, as in diffusers
_ORIGINAL_DEFAULTS = SamplingDefaults(steps=200, guidance=2.5)

# block_out_channels of the published models: model_channels 128, 192, 256 times 1, 2, 3, 5
_REAL_CHANNELS = {
    "audioldm-s": (128, 256, 384, 640),
    "audioldm-m": (192, 384, 576, 960),
    "audioldm-l": (256, 512, 768, 1280),
}


@dataclass
class AudioLDM(TextToAudioPipeline):
    """A pipeline of AudioLDM's kind, of any size.

    The same arithmetic as `diffusers.AudioLDMPipeline` (deprecated there; a test compares the two).
    `text_encoder` is a `ClapTextModelWithProjection`, `vocoder` a `SpeechT5HifiGan`.
    """

    defaults: SamplingDefaults = _DEFAULTS

    family = "audioldm"
    index_class = "AudioLDMPipeline"
    family_defaults = _DEFAULTS

    @classmethod
    def is_original(cls, path: Path) -> bool:
        """Whether a .ckpt file, or the only one of a folder, has a UNet with a text vector."""
        return f"{UNET_PREFIX}film_emb.weight" in checkpoint_names(path)

    @classmethod
    def from_original(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        tokenizer: str | Path | None = None,
        heads: str = "diffusers",
        ema: bool = False,
    ) -> AudioLDM:
        """Load an original .ckpt file; see `ptq4adm.models.audioldm_files`.

        Args:
            path: the file.
            dtype: of the modules.
            tokenizer: folder of roberta-base's tokenizer; None for the one beside the file.
            heads: "diffusers" for 8 attention heads at every level, as diffusers' conversion has
                them; "original" for heads of the original width.
            ema: whether to take the averaged weights of the UNet, as the original code does.

        Raises:
            ConfigError: if `heads` is unknown.
            MissingComponentError: if a file is missing.
            CheckpointError: if a file is broken, or of another model; see its children.
        """
        parts = load_parts(path, tokenizer=tokenizer, heads=heads, ema=ema, dtype=dtype)
        return cls(**parts, defaults=_ORIGINAL_DEFAULTS)

    def _encode(self, texts: list[str]) -> Conditioning:
        """`class_labels` [B, D]: text vectors, each of unit length."""
        limit = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        self._warn_of_cut_prompts(texts, limit)
        device = next(self.text_encoder.parameters()).device
        vectors = self.text_encoder(
            tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)
        ).text_embeds
        labels = functional.normalize(vectors, dim=-1)
        # attention sees no text: both layers of a block attend to the image itself
        return Conditioning({"encoder_hidden_states": None, "class_labels": labels})

    def _unconditional(self, conditioning: Conditioning) -> Conditioning:  # noqa: ARG002
        return self._encode([""])


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
