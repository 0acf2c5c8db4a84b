"""Timestep buckets: activations drift with the noise level, so every bucket has its own scales.

Bucket of timestep t, of `count` equal ones over 0 .. num_train_timesteps - 1:

    bucket(t) = t * count // num_train_timesteps

Owns this mapping and how a timestep is read from a denoiser's call. The device tensor that kernels
read is `ptq4adm.nn.timestep.StepIndex`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4adm.errors import ConfigError, MixedTimestepError, ShapeError, UncalibratedStepError

# the names under which UNets take the timestep, when it is not their second argument
_KEYWORDS = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class TimestepBuckets:
    """Equal buckets over the training timesteps, and which of them calibration has seen.

    Args:
        num_train_timesteps: timesteps are in 0 .. num_train_timesteps - 1.
        calibrated: for each bucket, whether scales were recorded.

    Raises:
        ConfigError: if there are no buckets, or more than timesteps.
    """

    num_train_timesteps: int
    calibrated: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.calibrated) <= self.num_train_timesteps:
            raise ConfigError(
                f"buckets: got {len(self.calibrated)} over {self.num_train_timesteps} timesteps, "
                f"needs 1 to {self.num_train_timesteps}"
            )

    @property
    def count(self) -> int:
        """Number of buckets."""
        return len(self.calibrated)

    def bucket_of(self, timestep: float) -> int:
        """Bucket of one timestep, seen or not.

        Raises:
            UncalibratedStepError: if the timestep is outside 0 .. num_train_timesteps - 1.
        """
        # the comparison is written so that NaN fails it
        if not 0 <= timestep < self.num_train_timesteps:
            raise UncalibratedStepError(
                f"timestep {timestep} is outside 0 .. {self.num_train_timesteps - 1}, "
                "the range the model was trained and calibrated for"
            )
        return math.floor(timestep) * self.count // self.num_train_timesteps

    def check(self, timestep: float) -> int:
        """Bucket of one timestep that must have scales.

        Raises:
            UncalibratedStepError: if it is out of range or in a bucket without records.
        """
        bucket = self.bucket_of(timestep)
        if not self.calibrated[bucket]:
            seen = ", ".join(self._span(i) for i, c in enumerate(self.calibrated) if c) or "none"
            raise UncalibratedStepError(
                f"timestep {timestep} falls into {self._span(bucket)}, where calibration recorded "
                "nothing "
                f"(recorded: {seen}); calibrate with more steps or fewer buckets"
            )
        return bucket

    def lookup_table(self) -> Tensor:
        """Bucket of every timestep, int64 [num_train_timesteps]."""
        return torch.arange(self.num_train_timesteps) * self.count // self.num_train_timesteps

    def _span(self, bucket: int) -> str:
        first = -(-bucket * self.num_train_timesteps // self.count)
        last = -(-(bucket + 1) * self.num_train_timesteps // self.count) - 1
        return f"{first}..{last}"


def find_timestep(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The timestep among the arguments of a denoiser: by keyword, or the second positional one.

    Raises:
        ShapeError: if there is none.
    """
    for name in _KEYWORDS:
        if kwargs.get(name) is not None:
            return kwargs[name]
    if len(args) > 1 and args[1] is not None:
        return args[1]
    raise ShapeError(
        "the denoiser was called without a timestep; pass it second, or by keyword "
        f"({', '.join(_KEYWORDS)})"
    )


def single_timestep(timestep: Any) -> float:
    """The one timestep of a batch, on the host.

    Args:
        timestep: a number, or a tensor of one or of equal values (a CUDA tensor is waited for).

    Raises:
        MixedTimestepError: if a batch holds different timesteps.
        ShapeError: if it is empty or not a number.
    """
    if isinstance(timestep, Tensor):
        if timestep.numel() == 0:
            raise ShapeError("timestep: got an empty tensor, needs one value")
        values = timestep.detach().reshape(-1)
        if values.numel() > 1 and not bool((values == values[0]).all()):
            raise MixedTimestepError(
                f"timesteps {values.tolist()} differ within one batch; activation scales belong to "
                "one timestep, "
                "so call the denoiser once for each, or quantize with activation='dynamic'"
            )
        return float(values[0])
    if isinstance(timestep, (int, float)) and not isinstance(timestep, bool):
        return float(timestep)
    raise ShapeError(f"timestep: got {type(timestep).__name__}, needs a number or a tensor")
