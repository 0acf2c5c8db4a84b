"""TANGO: a UNet conditioned by the tokens of a T5 text encoder, through cross-attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ptq4adm.models.conditioning import Conditioning
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.models.tango_files import UNET_CONFIG, is_published, load_parts
from ptq4adm.protocols import SamplingDefaults

_DEFAULTS = SamplingDefaults(steps=200, guidance=3.0)


@dataclass
class Tango(TextToAudioPipeline):
    """A pipeline of TANGO's kind, of any size.

    `text_encoder` is a `T5EncoderModel`, `scheduler` a `DDPMScheduler` for v-prediction, `vae` and
    `vocoder` are AudioLDM's. The text encoder stays float32: its activations leave float16's range.
    """

    defaults: SamplingDefaults = _DEFAULTS

    family = "tango"
    index_class = "TangoPipeline"
    family_defaults = _DEFAULTS
    float32_components = frozenset({"text_encoder"})

    @classmethod
    def is_original(cls, path: Path) -> bool:
        """Whether a folder holds main_config.json or the weights that go with it."""
        return is_published(path)

    @classmethod
    def from_original(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        tokenizer: str | Path | None = None,
    ) -> Tango:
        """Load the published files; see `ptq4adm.models.tango_files`.

        Args:
            path: the folder.
            dtype: of all modules but the text encoder.
            tokenizer: folder of FLAN-T5's tokenizer; None for the one in the folder, or in the
                cache of the Hugging Face hub.

        Raises:
            MissingComponentError: if a file is missing.
            CheckpointError: if a file is broken, or they contradict each other; see its children.
            UnsupportedModelError: if the configs ask for parts that are not TANGO's.
        """
        return cls(**load_parts(Path(path), tokenizer=tokenizer, dtype=dtype))

    def _encode(self, texts: list[str]) -> Conditioning:
        """`encoder_hidden_states` [B, L, D] and their mask, L the tokens of the longest prompt."""
        limit = self.tokenizer.model_max_length
        self._warn_of_cut_prompts(texts, limit)
        return self._run_text_encoder(texts, padding="longest", max_length=limit)

    def _unconditional(self, conditioning: Conditioning) -> Conditioning:
        length = conditioning.tensors["encoder_hidden_states"].shape[1]
        return self._run_text_encoder([""], padding="max_length", max_length=length)

    def _run_text_encoder(self, texts: list[str], *, padding: str, max_length: int) -> Conditioning:
        tokens = self.tokenizer(
            texts, padding=padding, max_length=max_length, truncation=True, return_tensors="pt"
        )
        device = next(self.text_encoder.parameters()).device
        mask = tokens.attention_mask.to(device)
        states = self.text_encoder(
            input_ids=tokens.input_ids.to(device), attention_mask=mask
        ).last_hidden_state
        return Conditioning({"encoder_hidden_states": states, "encoder_attention_mask": mask == 1})


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
        unet: nn.Module = UNet2DConditionModel(**UNET_CONFIG)
    return unet.requires_grad_(False).eval()
