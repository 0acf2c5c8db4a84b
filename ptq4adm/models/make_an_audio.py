"""Make-An-Audio: a UNet of two levels conditioned by 77 text tokens, through cross-attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq4adm.errors import ConfigError
from ptq4adm.models.conditioning import Conditioning
from ptq4adm.models.make_an_audio_files import TEXT_PREFIX, load_parts
from ptq4adm.models.original import checkpoint_names
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.protocols import SamplingDefaults

_DEFAULTS = SamplingDefaults(steps=100, guidance=3.0)
# latents of the published model: 624 log-mel frames over 8, for 10 s
COLUMNS_A_SECOND = 7.8
COLUMN_STEP = 4


@dataclass
class MakeAnAudio(TextToAudioPipeline):
    """A pipeline of Make-An-Audio's kind, of any size.

    `text_encoder` is a `ClapTokenEncoder`, `vocoder` a `BigVGAN`. Images are on their side here:
    `vae` is an `AutoencoderKL` over [B, 1, mel bins, T], and latents are [B, 4, 10, W].
    """

    defaults: SamplingDefaults = _DEFAULTS

    family = "make-an-audio"
    index_class = "MakeAnAudioPipeline"
    family_defaults = _DEFAULTS

    @classmethod
    def is_original(cls, path: Path) -> bool:
        """Whether a .ckpt file, or the only one of a folder, has this family's text encoder."""
        return any(name.startswith(TEXT_PREFIX) for name in checkpoint_names(path))

    @classmethod
    def from_original(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        tokenizer: str | Path | None = None,
    ) -> MakeAnAudio:
        """Load the published files; see `ptq4adm.models.make_an_audio_files`.

        Args:
            path: the folder, or its .ckpt file.
            dtype: of the modules.
            tokenizer: folder of bert-base-uncased's tokenizer; None for the one in the folder.

        Raises:
            MissingComponentError: if a file is missing.
            CheckpointError: if a file is broken, or they contradict each other; see its children.
        """
        return cls(**load_parts(path, tokenizer=tokenizer, dtype=dtype))

    @property
    def seconds(self) -> float:
        """Length of a clip when a call names none: what the UNet was made for."""
        size = self.unet.config.sample_size
        columns = size if isinstance(size, int) else size[1]
        return float(columns * self.vae_factor * self.hop / self.sampling_rate)

    def latent_shape(self, seconds: float | None = None) -> tuple[int, int, int]:
        """Shape [C, H, W] of the latents of a clip.

        W is 7.8 columns a second, rounded down, then up to a multiple of 4, as published. For
        some lengths that is a little less than the clip, which ends in silence then.

        Raises:
            ConfigError: if the clip would be shorter than one log-mel frame.
        """
        length = self.seconds if seconds is None else seconds
        if not (math.isfinite(length) and length * self.sampling_rate >= self.hop):
            raise ConfigError(
                f"seconds = {seconds}: expected at least {self.hop / self.sampling_rate:.3f}, one "
                "log-mel frame"
            )
        steps = -(-int(length * COLUMNS_A_SECOND) // COLUMN_STEP)
        return (
            int(self.unet.config.in_channels),
            int(self.vocoder.config.num_mels) // self.vae_factor,
            COLUMN_STEP * max(1, steps),
        )

    def decode_mel(self, latents: Tensor) -> Tensor:
        """Log-mel spectrogram [B, T, mel bins], as the model's own vocoder takes it, float32."""
        with torch.no_grad():
            scaled = latents.to(next(self.vae.parameters())) / self.vae.config.scaling_factor
            mel: Tensor = self.vae.decode(scaled).sample
        return mel[:, 0].transpose(1, 2).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Waveform [B, S], float32 on the CPU, in [-1, 1]."""
        mel = self.decode_mel(latents).transpose(1, 2)
        with torch.no_grad():
            waveform: Tensor = self.vocoder(mel.to(next(self.vocoder.parameters())))
        return waveform.float().cpu()

    def _encode(self, texts: list[str]) -> Conditioning:
        """`encoder_hidden_states` [B, 77, D]: all tokens, also those that only fill up."""
        limit = self.text_encoder.config.max_length
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        self._warn_of_cut_prompts(texts, limit)
        device = next(self.text_encoder.parameters()).device
        return Conditioning(
            {"encoder_hidden_states": self.text_encoder(tokens.input_ids.to(device))}
        )

    def _unconditional(self, conditioning: Conditioning) -> Conditioning:  # noqa: ARG002
        return self._encode([""])


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
