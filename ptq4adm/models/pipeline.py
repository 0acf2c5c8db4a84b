"""Text to audio: prompt -> CLAP text vector -> latents denoised by the UNet -> log-mel -> waveform.

The same arithmetic as `diffusers.AudioLDMPipeline` (deprecated there; a test compares the two),
with one noise generator per sample, so that a sample depends on its own seed and not on the batch
it was made in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.errors import (
    BackendUnavailableError,
    ConfigError,
    NonFiniteError,
    PromptError,
    ShapeError,
)
from ptq4adm.models.components import (
    COMPONENTS,
    DOMAIN_ENTRY,
    GUIDANCE_ENTRY,
    STEPS_ENTRY,
    component_folder,
    load_component,
    read_index,
    read_json,
    save_components,
)
from ptq4adm.nn.hoist import can_prepare, prepared
from ptq4adm.protocols import SamplingDefaults, StepCallback

logger = logging.getLogger(__name__)

DEFAULTS = SamplingDefaults(steps=25, guidance=2.5)


@dataclass
class TextToAudioPipeline:
    """A latent diffusion pipeline of AudioLDM's kind, of any size.

    Attributes:
        unet: `UNet2DConditionModel` conditioned by class embeddings.
        vae: `AutoencoderKL` over [B, 1, T, mel bins] log-mel.
        text_encoder: `ClapTextModelWithProjection`.
        tokenizer: its tokenizer.
        scheduler: a diffusers scheduler; DDIM runs with eta 0.
        vocoder: `SpeechT5HifiGan`.
        defaults: steps and guidance used when a call names none.
        prompt_domain: what it can be asked for, by the name of a `ptq4adm.prompts.Domain`; None if
            its folder does not say.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    vocoder: Any
    defaults: SamplingDefaults = DEFAULTS
    prompt_domain: str | None = None

    family = "audioldm"

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> TextToAudioPipeline:
        """Load a folder in diffusers' layout, with a float or a packed UNet.

        Args:
            path: the folder.
            device: where the modules go.
            dtype: of the float modules and of the computation between layers.
            backend: which kernels a packed UNet runs on.

        Raises:
            MissingComponentError: if the folder or a component is missing.
            CheckpointError: if a file is broken; see its children.
            BackendUnavailableError: if there is no such device here.
        """
        check_device(device)
        folder = Path(path)
        index = read_index(folder)
        for name in COMPONENTS:
            component_folder(folder, name)
        # the UNet first: it is the part whose format can be refused
        parts: dict[str, Any] = {"unet": _load_unet(folder, index["unet"], dtype, backend)}
        for name in COMPONENTS:
            if name not in parts:
                parts[name] = load_component(folder, name, index[name], dtype)
        domain = index.get(DOMAIN_ENTRY)
        return cls(
            **parts,
            defaults=_read_defaults(index),
            prompt_domain=None if domain is None else str(domain),
        ).to(device)

    @property
    def device(self) -> torch.device:
        """Where the UNet computes."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the values between the UNet's layers: its norms', which no scheme changes."""
        norms = (m for m in self.unet.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm)))
        return next((norm.weight.dtype for norm in norms), torch.float32)

    @property
    def sampling_rate(self) -> int:
        """Samples a second of the waveform."""
        return int(self.vocoder.config.sampling_rate)

    @property
    def hop(self) -> int:
        """Samples a log-mel frame."""
        return math.prod(self.vocoder.config.upsample_rates)

    @property
    def vae_factor(self) -> int:
        """Log-mel frames a latent row."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def seconds(self) -> float:
        """Length of a clip when a call names none: what the UNet was made for."""
        size = self.unet.config.sample_size
        rows = size if isinstance(size, int) else size[0]
        return rows * self.vae_factor * self.hop / self.sampling_rate

    def to(self, device: str | torch.device) -> TextToAudioPipeline:
        """Move every module; returns the pipeline."""
        for module in (self.unet, self.vae, self.text_encoder, self.vocoder):
            module.to(device)
        return self

    def latent_shape(self, seconds: float | None = None) -> tuple[int, int, int]:
        """Shape [C, H, W] of the latents of a clip, rounded up to whole latent rows.

        Raises:
            ConfigError: if the clip would be shorter than one latent row.
        """
        length = self.seconds if seconds is None else seconds
        frames = round(length * self.sampling_rate) // self.hop if math.isfinite(length) else 0
        if frames < 1:
            raise ConfigError(
                f"seconds = {seconds}: expected at least {self.hop / self.sampling_rate:.3f}, one "
                "log-mel frame"
            )
        rows = -(-frames // self.vae_factor)
        return (
            int(self.unet.config.in_channels),
            rows,
            int(self.vocoder.config.model_in_dim) // self.vae_factor,
        )

    def encode_prompts(self, prompts: str | Sequence[str]) -> Tensor:
        """Text vectors of prompts, each of unit length.

        Returns:
            [B, D] in the text encoder's dtype.

        Raises:
            PromptError: if there is none, or one is empty or not a string.
        """
        return self._encode(check_prompts(prompts))

    @torch.no_grad()
    def denoise(
        self,
        embeds: Tensor,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        seconds: float | None = None,
        latents: Tensor | None = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Run the denoising loop.

        With guidance above 1, the unconditional and the conditional half of the batch go through
        the UNet together, in this order.

        Args:
            embeds: [B, D] of `encode_prompts`.
            steps: denoising steps; default `defaults.steps`.
            guidance: classifier-free guidance scale; default `defaults.guidance`.
            seed: sample i starts from the noise of seed + i.
            seconds: length of a clip; default `seconds`.
            latents: start from this unit noise [B, C, H, W] instead.
            callback: called after every step.

        Returns:
            Latents [B, C, H, W].

        Raises:
            ConfigError: if steps, guidance, seed or seconds are out of range.
            ShapeError: if `latents` is not of the right shape.
            NonFiniteError: if the UNet's result is not finite.
        """
        steps = self.defaults.steps if steps is None else steps
        guidance = self.defaults.guidance if guidance is None else guidance
        self._check_sampling(steps, guidance, seed)
        device = self.device
        batch, shape = embeds.shape[0], self.latent_shape(seconds)
        if latents is None:
            latents = initial_noise(batch, shape, seed)
        elif tuple(latents.shape) != (batch, *shape):
            raise ShapeError(f"latents: expected {(batch, *shape)}, got {tuple(latents.shape)}")
        is_guided = guidance > 1.0
        conditions = embeds.to(device, self.dtype)
        if is_guided:
            conditions = torch.cat(
                [self._encode([""]).to(conditions).expand(batch, -1), conditions]
            )
        self.scheduler.set_timesteps(steps, device=device)
        latents = latents.to(conditions) * self.scheduler.init_noise_sigma
        with self._constants(conditions):
            for i, t in enumerate(self.scheduler.timesteps):
                doubled = torch.cat([latents, latents]) if is_guided else latents
                prediction = self.unet(
                    self.scheduler.scale_model_input(doubled, t),
                    t,
                    encoder_hidden_states=None,
                    class_labels=conditions,
                ).sample
                if is_guided:
                    unconditional, conditional = prediction.chunk(2)
                    prediction = unconditional + guidance * (conditional - unconditional)
                latents = self.scheduler.step(prediction, t, latents).prev_sample
                if callback is not None:
                    callback(i, int(t), latents)
        if not bool(torch.isfinite(latents).all()):
            raise NonFiniteError(
                f"latents after {steps} steps hold NaN or infinity: the UNet's weights or the "
                "text vectors are "
                "broken, or float16 overflowed; try dtype float32"
            )
        return latents

    @torch.no_grad()
    def decode_mel(self, latents: Tensor) -> Tensor:
        """Log-mel spectrogram [B, T, mel bins], natural logarithm of magnitudes, float32."""
        scaled = latents.to(next(self.vae.parameters())) / self.vae.config.scaling_factor
        mel: Tensor = self.vae.decode(scaled).sample
        return mel[:, 0].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Waveform [B, S], float32 on the CPU, nominally in [-1, 1]."""
        mel = self.decode_mel(latents)
        waveform: Tensor = self.vocoder(mel.to(next(self.vocoder.parameters())))
        return waveform.float().cpu()

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        seconds: float | None = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Make one clip a prompt; arguments as in `denoise`.

        Returns:
            Waveform float32 [B, S] on the CPU, cut to `seconds`.
        """
        embeds = self.encode_prompts(prompts)
        latents = self.denoise(
            embeds, steps=steps, guidance=guidance, seed=seed, seconds=seconds, callback=callback
        )
        length = self.seconds if seconds is None else seconds
        return self.decode(latents)[:, : round(length * self.sampling_rate)]

    def save_components(self, folder: str | Path, *, skip: Sequence[str] = ()) -> None:
        """Write every component but `skip`, and the index."""
        save_components(self, Path(folder), skip=skip)

    def _constants(self, conditions: Tensor) -> AbstractContextManager[None]:
        """Projections of the timesteps and of the conditions, computed before the loop."""
        if can_prepare(self.unet):
            return prepared(self.unet, self.scheduler.timesteps, class_labels=conditions)
        logger.info("%s: every step computes its own projections", type(self.unet).__name__)
        return nullcontext()

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Tensor:
        limit = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        for text, ids in zip(texts, self.tokenizer(texts)["input_ids"], strict=True):
            if len(ids) > limit:
                logger.warning("prompt cut to %d tokens, the text encoder's limit: %r", limit, text)
        device = next(self.text_encoder.parameters()).device
        vectors = self.text_encoder(
            tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)
        ).text_embeds
        return functional.normalize(vectors, dim=-1)

    def _check_sampling(self, steps: int, guidance: float, seed: int) -> None:
        limit = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= limit:
            raise ConfigError(
                f"steps = {steps}: expected 1 to {limit}, the timesteps the model was trained with"
            )
        if not (math.isfinite(guidance) and guidance >= 0.0):
            raise ConfigError(
                f"guidance = {guidance}: expected a finite number, at least 0 (1 is no guidance)"
            )
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed = {seed}: expected 0 to 2^63 - 1")


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as a list.

    Raises:
        PromptError: if there is none, or one is empty or not a string.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise PromptError("no prompt given: expected at least one sentence")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise PromptError(f"prompt {i}: expected a string, got {type(text).__name__}")
        if not text.strip():
            raise PromptError(
                f"prompt {i} is empty: describe the sound in words, such as 'a dog barks'"
            )
    return texts


def initial_noise(batch: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Unit noise float32 [B, C, H, W] on the CPU, the same for every device.

    Sample i is the noise of seed + i.
    """
    generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def check_device(device: str | torch.device) -> None:
    """Refuse a device that does not exist here.

    Raises:
        BackendUnavailableError: naming it.
    """
    try:
        torch.empty(0, device=device)
    # torch says it with either: an assertion where it was built without CUDA
    except (RuntimeError, AssertionError) as error:
        raise BackendUnavailableError(
            f"device {str(device)!r} cannot be used here ({error}); use 'cpu'"
        ) from error


def _load_unet(folder: Path, entry: list[str], dtype: torch.dtype, backend: str) -> nn.Module:
    config = component_folder(folder, "unet") / "config.json"
    if config.is_file() and "quantization_config" in read_json(config):
        from ptq4adm.packing.checkpoint import load_denoiser

        return load_denoiser(folder / "unet", backend=backend, dtype=dtype)
    unet: nn.Module = load_component(folder, "unet", entry, dtype)
    return unet


def _read_defaults(index: dict[str, Any]) -> SamplingDefaults:
    return SamplingDefaults(
        steps=int(index.get(STEPS_ENTRY, DEFAULTS.steps)),
        guidance=float(index.get(GUIDANCE_ENTRY, DEFAULTS.guidance)),
    )
