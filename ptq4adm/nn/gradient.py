"""Gradients through layers whose arithmetic has none: what trains an adapter on a packed model.

    forward    y = layer(x)                       the integers, as ever
    backward   dx = dy W, and 0 where x was clipped    W: the weight that the integers stand for

Rounding is passed straight through. The layer's own weight has no gradient. W is made for each
call of backward and not kept.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ptq4adm.nn.base import QuantizedLayer

# rint(x / scale) stays within -127 .. 127 up to here
_CLIP = 127.5


class _Layer(Protocol):
    """What a gradient is asked of."""

    def compute(self, x: Tensor) -> Tensor:
        """The layer's result, without a gradient."""

    def input_gradient(self, x_shape: torch.Size, dy: Tensor) -> Tensor:
        """`dy W`, float32, of the input's shape."""

    def clip_limits(self) -> Tensor | None:
        """Static scales, shaped to compare with an input; None if none is clipped."""


def needs_gradient(*inputs: Tensor | None) -> bool:
    """Whether a gradient of one of the inputs may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def straight_through(layer: _Layer, x: Tensor) -> Tensor:
    """`layer.compute(x)` with a gradient for `x`."""
    result: Tensor = _StraightThrough.apply(x, layer)
    return result


def channel_scales(layer: QuantizedLayer) -> Tensor | None:
    """Static scale in use of each input channel, float32 [C]; None if dynamic."""
    if layer.x_scale is None:
        return None
    row = 0 if layer.step is None or layer.buckets == 1 else layer.step.index
    parts = zip(layer.x_scale[:, row], layer.layout.segments, strict=True)
    return torch.cat([scale.expand(channels) for scale, channels in parts])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Layer) -> Tensor:
        limits = layer.clip_limits()
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        ctx.save_for_backward(None if limits is None else x.abs() <= _CLIP * limits)
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (is_inside,) = ctx.saved_tensors
        dx = ctx.layer.input_gradient(ctx.shape, dy.float())
        return (dx if is_inside is None else dx * is_inside).to(ctx.dtype), None
