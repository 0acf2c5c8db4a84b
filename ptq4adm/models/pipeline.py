"""Text to audio, what all model families share: the denoising loop, checks, folders.

    prompts -> conditioning -> latents denoised by the UNet -> log-mel -> waveform

A family (`ptq4adm.models.audioldm`, ...) says what its conditioning is, the shape of its latents
and how they are decoded. Every sample has its own noise generator, also for the noise that a
stochastic scheduler adds at each step: a sample depends on its own seed and not on the batch it was
made in.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ptq4adm.errors import (
    ConfigError,
    NonFiniteError,
    ShapeError,
    UnsupportedModelError,
)
from ptq4adm.models.components import (
    COMPONENTS,
    DOMAIN_ENTRY,
    INDEX_FILE,
    check_device,
    component_folder,
    load_component,
    load_unet,
    read_defaults,
    read_index,
    save_components,
)
from ptq4adm.models.conditioning import Conditioning, check_prompts
from ptq4adm.models.correction import GuidedCall, PredictionCorrection, read_correction
from ptq4adm.models.noise import draw_noise, noise_generators, step_options
from ptq4adm.nn.hoist import can_prepare, prepared
from ptq4adm.protocols import SamplingDefaults, StepCallback

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="TextToAudioPipeline")


@dataclass
class TextToAudioPipeline(ABC):
    """A latent diffusion pipeline; its subclasses are the model families.

    Attributes:
        unet: `UNet2DConditionModel`, float or packed.
        vae: `AutoencoderKL` over [B, 1, T, mel bins] log-mel, unless the family says otherwise.
        text_encoder: what turns tokens into the conditioning.
        tokenizer: its tokenizer.
        scheduler: a diffusers scheduler; DDIM runs with eta 0.
        vocoder: log-mel to waveform.
        defaults: steps and guidance used when a call names none.
        prompt_domain: what it can be asked for, by the name of a `ptq4adm.prompts.Domain`; None if
            its folder does not say.
        correction: of a quantized UNet's predictions; see `ptq4adm.fit_correction`.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    vocoder: Any
    defaults: SamplingDefaults
    prompt_domain: str | None = None
    correction: PredictionCorrection | None = None

    family: ClassVar[str]
    """Name of the family, written into quantized checkpoints."""
    index_class: ClassVar[str]
    """`_class_name` of the family's `model_index.json`."""
    family_defaults: ClassVar[SamplingDefaults]
    """Steps and guidance of a folder that names none."""
    component_names: ClassVar[tuple[str, ...]] = COMPONENTS
    """Attributes and subfolders; a family may have more."""
    float32_components: ClassVar[frozenset[str]] = frozenset()
    """Modules that stay float32 whatever dtype is asked for."""

    # --- what a family says ---------------------------------------------------------------------

    @classmethod
    def is_original(cls, path: Path) -> bool:  # noqa: ARG003 - a family without one needs no path
        """Whether a folder or file is a model in the layout that the family was published in."""
        return False

    @classmethod
    def from_original(
        cls: type[Self],
        path: Path,
        *,
        dtype: torch.dtype = torch.float32,  # noqa: ARG003
    ) -> Self:
        """Load what `is_original` recognised, onto the CPU.

        Raises:
            UnsupportedModelError: if the family has no layout of its own.
        """
        raise UnsupportedModelError(
            f"{path}: {cls.__name__} has no layout but diffusers'; give a folder with {INDEX_FILE}"
        )

    @abstractmethod
    def _encode(self, texts: list[str]) -> Conditioning:
        """Conditioning of checked prompts."""

    @abstractmethod
    def _unconditional(self, conditioning: Conditioning) -> Conditioning:
        """Conditioning of the empty prompt, for one sample, of the same shapes but the batch."""

    @classmethod
    def from_folder(
        cls: type[Self],
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> Self:
        """Load a folder in diffusers' layout, with a float or a packed UNet.

        `ptq4adm.load_pipeline` finds the family by itself.

        Args:
            path: the folder.
            device: where the modules go.
            dtype: of the float modules and of the computation between layers.
            backend: which kernels a packed UNet runs on.

        Raises:
            MissingComponentError: if the folder or a component is missing.
            CheckpointError: if a file is broken; see its children.
            UnsupportedModelError: if the folder is of another family.
            BackendUnavailableError: if there is no such device here.
        """
        check_device(device)
        folder = Path(path)
        index = read_index(folder, cls.component_names)
        if index.get("_class_name") != cls.index_class:
            raise UnsupportedModelError(
                f"{folder / INDEX_FILE}: is a {index.get('_class_name')!r}, {cls.__name__} reads "
                f"{cls.index_class!r}; load it with ptq4adm.load_pipeline, which knows every family"
            )
        for name in cls.component_names:
            component_folder(folder, name)
        # the UNet first: it is the part whose format can be refused
        parts: dict[str, Any] = {"unet": load_unet(folder, index["unet"], dtype, backend)}
        for name in cls.component_names:
            if name not in parts:
                kept = torch.float32 if name in cls.float32_components else dtype
                parts[name] = load_component(folder, name, index[name], kept)
        domain = index.get(DOMAIN_ENTRY)
        return cls(
            **parts,
            defaults=read_defaults(index, cls.family_defaults),
            prompt_domain=None if domain is None else str(domain),
            correction=read_correction(folder),
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

    def to(self: Self, device: str | torch.device) -> Self:
        """Move every module; returns the pipeline."""
        for name in self.component_names:
            component = getattr(self, name)
            if isinstance(component, nn.Module):
                component.to(device)
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

    @torch.no_grad()
    def encode_prompts(self, prompts: str | Sequence[str]) -> Conditioning:
        """What the denoiser is told about prompts, in the text encoder's dtype.

        Raises:
            PromptError: if there is none, or one is empty or not a string.
        """
        return self._encode(check_prompts(prompts))

    @torch.no_grad()
    def denoise(
        self,
        conditioning: Conditioning,
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
            conditioning: of `encode_prompts`.
            steps: denoising steps; default `defaults.steps`.
            guidance: classifier-free guidance scale; default `defaults.guidance`.
            seed: all noise of sample i is that of seed + i.
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
        batch, shape = conditioning.batch, self.latent_shape(seconds)
        generators = noise_generators(batch, seed)
        # drawn in any case: the noise of the steps is the same whoever gives the first one
        noise = draw_noise(shape, generators)
        if latents is None:
            latents = noise
        elif tuple(latents.shape) != (batch, *shape):
            raise ShapeError(f"latents: expected {(batch, *shape)}, got {tuple(latents.shape)}")
        conditioning = conditioning.to(self.device, self.dtype)
        if guidance > 1.0:
            empty = self._unconditional(conditioning).to(self.device, self.dtype)
            conditioning = Conditioning.cat([empty.expand(batch), conditioning])
        self.scheduler.set_timesteps(steps, device=self.device)
        latents = latents.to(self.device, self.dtype) * self.scheduler.init_noise_sigma
        options = step_options(self.scheduler, generators)
        with self._constants(conditioning):
            for i, t in enumerate(self.scheduler.timesteps):
                call = GuidedCall(latents, t, conditioning, guidance)
                prediction = self.predict(call)
                if self.correction is not None:
                    prediction = self.correction.correct(prediction, call)
                latents = self.scheduler.step(prediction, t, latents, **options).prev_sample
                if callback is not None:
                    callback(i, int(t), latents)
        if not bool(torch.isfinite(latents).all()):
            raise NonFiniteError(
                f"latents after {steps} steps hold NaN or infinity: the UNet's weights or the "
                "text encoder's are broken, or float16 overflowed; try dtype float32"
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
            Waveform float32 [B, S] on the CPU, cut to `seconds`, or filled up with silence.
        """
        latents = self.denoise(
            self.encode_prompts(prompts),
            steps=steps,
            guidance=guidance,
            seed=seed,
            seconds=seconds,
            callback=callback,
        )
        length = self.seconds if seconds is None else seconds
        samples = round(length * self.sampling_rate)
        waveform = self.decode(latents)[:, :samples]
        return nn.functional.pad(waveform, (0, samples - waveform.shape[1]))

    def save_components(self, folder: str | Path, *, skip: Sequence[str] = ()) -> None:
        """Write every component but `skip`, and the index."""
        save_components(self, Path(folder), skip=skip)

    @torch.no_grad()
    def predict(self, call: GuidedCall) -> Tensor:
        """What the UNet predicts, guidance applied: one call, on both halves if there are two."""
        latents, is_guided = call.latents, call.guidance > 1.0
        doubled = torch.cat([latents, latents]) if is_guided else latents
        scaled = self.scheduler.scale_model_input(doubled, call.timestep)
        found: Tensor = self.unet(scaled, call.timestep, **call.conditioning.arguments).sample
        if not is_guided:
            return found
        unconditional, conditional = found.chunk(2)
        return unconditional + call.guidance * (conditional - unconditional)

    def _constants(self, conditioning: Conditioning) -> AbstractContextManager[None]:
        """What depends on timesteps or conditioning alone, computed before the loop."""
        if can_prepare(self.unet):
            return prepared(
                self.unet,
                self.scheduler.timesteps,
                class_labels=conditioning.get("class_labels"),
                encoder_hidden_states=conditioning.get("encoder_hidden_states"),
                encoder_hidden_states_1=conditioning.get("encoder_hidden_states_1"),
            )
        logger.info("%s: every step computes its own projections", type(self.unet).__name__)
        return nullcontext()

    def _warn_of_cut_prompts(self, texts: list[str], limit: int) -> None:
        """Say which prompts have more tokens than the text encoder reads."""
        for text, ids in zip(texts, self.tokenizer(texts)["input_ids"], strict=True):
            if len(ids) > limit:
                logger.warning("prompt cut to %d tokens, the text encoder's limit: %r", limit, text)

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
