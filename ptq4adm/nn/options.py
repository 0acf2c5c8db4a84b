"""How a quantized layer is stored and run: what its constructor is told beside its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.errors import ConfigError, ShapeError
from ptq4adm.nn.timestep import StepIndex
from ptq4adm.packing.layout import BLOCK_K


@dataclass(frozen=True)
class LayerOptions:
    """How a quantized layer is stored and run.

    Args:
        group_size: None, or 64 for integer multipliers a block of 64 weights (4 bits only).
        buckets: rows of the activation scale tables; 0 measures the scale of every input.
        step: which row is in use; needed with more than one.
        backend: "auto" or a backend's name; resolved when the layer is made, and again if "auto" is
            moved to another kind of device.
        device: where the weight lives.

    Raises:
        ConfigError: for tables without a `step`, or an unknown group size.
    """

    group_size: int | None = None
    buckets: int = 0
    step: StepIndex | None = None
    backend: str = "auto"
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.group_size not in (None, BLOCK_K):
            raise ConfigError(f"group_size: got {self.group_size}, needs None or {BLOCK_K}")
        if self.buckets > 1 and self.step is None:
            raise ConfigError(
                f"{self.buckets} activation scales need a `step` that says which is in use; "
                "make one StepIndex for the model"
            )


def activation_buckets(x_scale: Tensor | None, segments: int) -> int:
    """Rows of the scale table in `x_scale` (None, a scalar, or [segments, buckets]).

    Raises:
        ShapeError: if it is none of these.
    """
    if x_scale is None:
        return 0
    if x_scale.numel() == 1 and segments == 1:
        return 1
    if x_scale.dim() != 2 or x_scale.shape[0] != segments or x_scale.shape[1] < 1:
        raise ShapeError(
            f"x_scale {list(x_scale.shape)}: needs [segments, buckets] with {segments} segments, "
            "or one scale"
        )
    return int(x_scale.shape[1])
