"""Rounding with a gradient: forwards as the packed layer rounds, backwards as if it did not.

    weight    w = s m q,  q = clamp(rint(u), qmin, qmax)    dw/du = s m,  dw/ds = m q       (1)
    input     y = s clamp(rint(x / s), -127, 127)           dy/dx = 1 where |x| <= 127.5 s, else 0

`u` is where a weight stands between integers, in steps of its scale; `m` is the group's multiplier.
`dw/du` is not masked where `u` is clamped: whoever trains it keeps it in reach instead, so that a
weight at the border can come back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.quant.affine import QMAX, QMIN
from ptq4adm.rounding.activations import fake_quantize
from ptq4adm.rounding.task import LayerTask

# rint(x / s) stays within -127 .. 127 up to here
_CLIP = 127.5


def round_positions(position: Tensor, bits: int) -> Tensor:
    """The integers of positions, in their dtype; ties to even."""
    return position.round().clamp_(QMIN[bits], QMAX[bits])


def round_weight(position: Tensor, scale: Tensor, mult: Tensor | None, bits: int) -> Tensor:
    """Equation (1) with its gradients.

    Args:
        position: float [N, K], in steps of the weight's scale.
        scale: float [N], above 0.
        mult: None, or the groups' multipliers, float [N, K].
        bits: 4 or 8.

    Returns:
        Float [N, K].
    """
    result: Tensor = _Weight.apply(position, scale, mult, bits)
    return result


def round_input(task: LayerTask, x: Tensor, timestep: float) -> Tensor:
    """`fake_quantize` with a gradient for `x`.

    Args:
        task: the layer.
        x: its input.
        timestep: of the call.

    Raises:
        NonFiniteError: if the input is NaN or infinite; names the layer.
        UncalibratedStepError: if the timestep's bucket has no scales.
    """
    result: Tensor = _Input.apply(x, task, timestep)
    return result


def _clip_limits(task: LayerTask, timestep: float) -> Tensor | None:
    """Largest magnitude of each channel that is not clipped, shaped to compare with an input."""
    if task.x_scale is None:
        return None
    row = 0 if task.buckets is None else task.buckets.check(timestep)
    parts = zip(task.x_scale[:, row], task.layout.segments, strict=True)
    limits = _CLIP * torch.cat([scale.expand(channels) for scale, channels in parts])  # [C]
    return limits[:, None, None] if isinstance(task.layer, nn.Conv2d) else limits


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, position: Tensor, scale: Tensor, mult: Tensor | None, bits: int
    ) -> Tensor:
        w_int = round_positions(position, bits)
        if mult is not None:
            w_int = w_int * mult
        ctx.save_for_backward(w_int, scale, mult)
        return w_int * scale[:, None]

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor, Tensor, None, None]:
        w_int, scale, mult = ctx.saved_tensors
        d_position = dw * scale[:, None]
        if mult is not None:
            d_position = d_position * mult
        return d_position, (dw * w_int).sum(dim=1), None, None


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, task: LayerTask, timestep: float) -> Tensor:
        limits = _clip_limits(task, timestep)
        ctx.save_for_backward(None if limits is None else x.abs() <= limits)
        return fake_quantize(task, x, timestep)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (is_inside,) = ctx.saved_tensors
        return (dy if is_inside is None else dy * is_inside), None, None
