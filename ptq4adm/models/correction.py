"""Step correction: what quantization does to every prediction alike is taken back out of it.

    e'[c] = scale[t, c] e[c] + offset[t, c]                                                  (1)

`e` is the denoiser's prediction after guidance, c its channel, t the timestep; (1) is the best
straight line from quantized to float predictions along the quantized model's own trajectories. In
PTQD's terms scale = 1 / (1 + k) and offset = -bias / (1 + k); there k is one number for a step.

Owns the numbers, how they are applied, and their file in a pipeline's folder: safetensors of
`timesteps` float64 [S], `scale` and `offset` float32 [S, C]; the header has the guidance scale they
were fitted at. They are fitted in `ptq4adm.correcting`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ptq4adm.errors import CheckpointError, ShapeError
from ptq4adm.models.conditioning import Conditioning

CORRECTION_FILE = "step_correction.safetensors"
FORMAT = "ptq4adm-step-correction"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class GuidedCall:
    """One step of a sampler, as its prediction was made.

    Attributes:
        latents: [B, C, H, W] before the step.
        timestep: of the step, a tensor [] as the scheduler has it.
        conditioning: of both guidance halves, if there are two.
        guidance: scale that combined them.
    """

    latents: Tensor
    timestep: Tensor
    conditioning: Conditioning
    guidance: float


class PredictionCorrection(Protocol):
    """What a pipeline does with a prediction before the sampler gets it."""

    def correct(self, prediction: Tensor, call: GuidedCall) -> Tensor:
        """The prediction [B, C, H, W] to use."""


@dataclass(frozen=True)
class StepCorrection:
    """Equation (1).

    Attributes:
        timesteps: float64 [S], rising; between two of them numbers are interpolated, and beyond the
            ends the nearest is taken.
        scale: float32 [S, C].
        offset: float32 [S, C].
        guidance: that it was fitted at.

    Raises:
        ShapeError: if shapes do not fit, timesteps do not rise, or a number is not finite.
    """

    timesteps: Tensor
    scale: Tensor
    offset: Tensor
    guidance: float

    def __post_init__(self) -> None:
        steps, shape = self.timesteps, tuple(self.scale.shape)
        fits = self.scale.dim() == 2 and steps.dim() == 1 and len(steps) == shape[0] > 0
        if not fits or tuple(self.offset.shape) != shape:
            raise ShapeError(
                f"step correction: got timesteps {list(steps.shape)}, scale {list(shape)}, offset "
                f"{list(self.offset.shape)}; needs [S], [S, C], [S, C]"
            )
        numbers = torch.cat([steps.double(), self.scale.flatten(), self.offset.flatten()])
        if not bool(torch.isfinite(numbers).all()) or bool((steps.diff() <= 0).any()):
            raise ShapeError(
                "step correction: needs finite numbers, and timesteps that rise; fit it again"
            )

    def at(self, timestep: float) -> tuple[Tensor, Tensor]:
        """Scale and offset of one timestep, float32 [C] each."""
        after = int(torch.searchsorted(self.timesteps, timestep))
        right = min(after, len(self.timesteps) - 1)
        left = max(right - 1, 0) if after < len(self.timesteps) else right
        low, high = float(self.timesteps[left]), float(self.timesteps[right])
        share = min(max((timestep - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        scale = torch.lerp(self.scale[left], self.scale[right], share)
        return scale, torch.lerp(self.offset[left], self.offset[right], share)

    def correct(self, prediction: Tensor, call: GuidedCall) -> Tensor:
        """Equation (1).

        Raises:
            ShapeError: if the prediction has other channels.
        """
        if not math.isclose(call.guidance, self.guidance):
            # once a pair of scales, as warnings are: not once a step
            warnings.warn(
                f"step correction: fitted at guidance {self.guidance:g}, and used at "
                f"{call.guidance:g}, where errors are others; fit it again, or set "
                "pipe.correction = None",
                stacklevel=2,
            )
        if prediction.shape[1] != self.scale.shape[1]:
            raise ShapeError(
                f"step correction of {self.scale.shape[1]} channels: got a prediction "
                f"{list(prediction.shape)}; it is another model's, set pipe.correction = None"
            )
        scale, offset = (
            x.to(prediction.device, prediction.dtype)[:, None, None]
            for x in self.at(float(call.timestep))
        )
        return prediction * scale + offset

    def save(self, folder: Path) -> None:
        """Write the file into a pipeline's folder."""
        # here: kernels are measured on machines that have torch alone
        from safetensors.torch import save_file

        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "guidance": repr(self.guidance),
        }
        tensors = {"timesteps": self.timesteps, "scale": self.scale, "offset": self.offset}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / CORRECTION_FILE, header)
        # safetensors makes files that only their owner can read, whatever the umask says
        (folder / CORRECTION_FILE).chmod((folder.stat().st_mode & 0o666) | 0o600)


def read_correction(folder: Path) -> StepCorrection | None:
    """The correction of a pipeline's folder; None if it has none.

    Raises:
        CheckpointError: if the file is broken or of an unknown version.
    """
    path = folder / CORRECTION_FILE
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("timesteps", "scale", "offset")}
        found = header["format"], header["format_version"]
        if found != (FORMAT, str(FORMAT_VERSION)):
            raise CheckpointError(
                f"{path}: is {found[0]} {found[1]}, this version reads {FORMAT} {FORMAT_VERSION}; "
                "upgrade ptq4adm, or delete the file to run without it"
            )
        return StepCorrection(**tensors, guidance=float(header["guidance"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: cut short or no step correction ({error!r}); copy the model again, or delete "
            "the file to run without it"
        ) from error
