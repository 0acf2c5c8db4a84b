"""What the rest of the package asks of a model family.

The first room: calibration and quantization know a model only through `DenoiserAdapter`, and
`ptq4adm.models` holds the adapters that implement it. Nothing here knows diffusers, quantization or
files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

StepCallback = Callable[[int, int, Tensor], None]
"""Called after every denoising step with (step index from 0, timestep, latents)."""


@dataclass(frozen=True)
class Rule:
    """One family's decision about some layers, with the reason a person reads in the plan.

    Attributes:
        pattern: `fnmatch` pattern on module names inside the denoiser, such as
            ``"time_embedding.*"``.
        scheme: name of a `ptq4adm.config.Scheme`: ``"w4a8"``, ``"w8a8"``, ``"w8"`` or ``"float"``.
        reason: why, in a few words.
        is_sensitive: the layer could take 4 bits, but loses most by it: the rule holds where the
            config's scheme is W4A8 and it protects such layers, and a size budget decides anew.
    """

    pattern: str
    scheme: str
    reason: str
    is_sensitive: bool = False


@dataclass(frozen=True)
class SamplingDefaults:
    """How a pipeline is sampled when nobody says otherwise.

    Attributes:
        steps: denoising steps.
        guidance: classifier-free guidance scale; above 1 the denoiser sees the batch twice.
    """

    steps: int
    guidance: float


@runtime_checkable
class DenoiserAdapter(Protocol):
    """Which submodule is quantized, which of its layers stay as they are, and how one run is made.

    `pipe` is whatever `ptq4adm.models.find_adapter` accepted: a pipeline of this package, a
    diffusers pipeline, or the bare denoiser.
    """

    @property
    def family(self) -> str:
        """Name of the model family, written into checkpoints."""

    @property
    def denoiser_name(self) -> str:
        """Attribute and folder name of the denoiser in a pipeline, such as ``"unet"``."""

    def denoiser(self, pipe: Any) -> nn.Module:
        """The module whose layers are quantized, in place."""

    def rules(self, denoiser: nn.Module) -> Sequence[Rule]:
        """Layers that do not take the config's scheme.

        A later rule wins over an earlier one, and the user's overrides win over all.
        """

    def segments(self, denoiser: nn.Module) -> dict[str, tuple[int, int]]:
        """Layers whose input is a concatenation of two tensors with different ranges.

        Returns:
            Module name to (channels of the first tensor, channels of the second); each half is
            quantized with its own activation scale.
        """

    def num_train_timesteps(self, pipe: Any) -> int:
        """Number of timesteps T the denoiser was trained with: timesteps are in 0 .. T - 1."""

    def sampling_defaults(self, pipe: Any) -> SamplingDefaults:
        """Steps and guidance to calibrate with when the caller names none."""

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
        """Denoise one batch exactly as generation does, without decoding.

        Args:
            pipe: a pipeline with its text encoder and scheduler.
            prompts: B prompts, none empty.
            steps: denoising steps, at least 1.
            guidance: classifier-free guidance scale.
            seed: sample i starts from the noise of seed + i, whatever the batch.
            on_step: called after every step.

        Returns:
            float32 latents [B, C, H, W].

        Raises:
            MissingComponentError: if `pipe` is a bare denoiser, which cannot make its own
                conditioning.
        """
