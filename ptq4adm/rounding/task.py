"""What a rounding method is given of one layer, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ptq4adm.packing.layout import KLayout
from ptq4adm.quant.affine import QuantizedRows
from ptq4adm.quant.buckets import TimestepBuckets
from ptq4adm.rounding.replay import Replay


@dataclass(frozen=True)
class LayerTask:
    """One layer whose integers are to be chosen.

    Attributes:
        name: module name inside the denoiser.
        layer: the float layer; it is not changed.
        layout: order of K of the packed rows.
        bits: 4 or 8.
        start: integers and scales of plain rounding, in canonical K order.
        x_scale: activation scales float32 [segments, buckets]; None for dynamic activations.
        buckets: which row of `x_scale` a timestep reads; None for dynamic activations.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    layout: KLayout
    bits: int
    start: QuantizedRows
    x_scale: Tensor | None
    buckets: TimestepBuckets | None


@dataclass(frozen=True)
class ShiftedRows(QuantizedRows):
    """Rows of a layer whose bias makes up for the mean of their error.

    Attributes:
        bias_shift: float32 [N], added to the layer's bias; None for nothing.
    """

    bias_shift: Tensor | None = None


class Rounder(Protocol):
    """One rounding method."""

    def __call__(
        self,
        denoiser: nn.Module,
        tasks: Sequence[LayerTask],
        replay: Replay,
        *,
        progress: bool = True,
    ) -> Mapping[str, QuantizedRows]:
        """Integers of every task's layer, by name.

        Args:
            denoiser: the float model; the same when this returns, or raises.
            tasks: layers, in module order.
            replay: the model's inputs.
            progress: show a bar on a terminal.
        """
