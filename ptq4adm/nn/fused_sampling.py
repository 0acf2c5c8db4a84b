"""Upsample2D of diffusers with its nearest enlargement moved behind the quantizer.

    y = conv(enlarge(int8(x)))      int8(enlarge(x)) has the same values

At exactly twice the size the convolution reads the small tensor itself; at any other size, which
odd inputs ask for, int8 pixels are gathered first. A `Downsample2D` has nothing to fuse: its
convolution quantizes its own input, and a padding of 0 is zeros that stay zeros.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.nn import functional

from ptq4adm.nn.fusing import FusedBlock, Fusion, layer_reason
from ptq4adm.nn.gradient import needs_gradient


class FusedUpsample2D(FusedBlock, Upsample2D):
    """An `Upsample2D` that quantizes before it enlarges."""

    def forward(
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """[B, C, H, W] to [B, N, H', W'] in channels_last memory; arguments as in diffusers."""
        size = _size(hidden_states, output_size)
        if (
            args
            or kwargs
            or size is None
            or needs_gradient(hidden_states)
            or self.fusion.is_broken()
        ):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        conv = self.conv
        x_q, scale = conv.quantize_input(hidden_states.permute(0, 2, 3, 1), 0, "tensor")
        height, width = x_q.shape[1:3]
        is_double = size == (2 * height, 2 * width)
        if not is_double:
            x_q = _enlarge(x_q, size)
        y = conv.convolve(
            x_q, scale, out_dtype=hidden_states.dtype, upsample=size if is_double else None
        )
        return y.permute(0, 3, 1, 2)


def plan_upsample(block: Any, name: str) -> Fusion:
    """Whether an `Upsample2D` can be fused, and why not."""
    if block.use_conv_transpose:
        reason = "it is a transposed convolution"
    elif not block.use_conv or block.name != "conv":
        reason = "it has no convolution 'conv'"
    elif block.norm is not None or not block.interpolate:
        reason = "it normalizes, or does not enlarge"
    else:
        reason = layer_reason(block.conv, "quantize_int8")
    return Fusion(block, name, {"conv": reason}, [] if reason else ["conv"])


def _size(x: Tensor, output_size: Any) -> tuple[int, int] | None:
    """Rows and columns to enlarge to; None where the order of the two steps would matter."""
    if x.dim() != 4:
        return None
    height, width = x.shape[2:]
    if output_size is None:
        return 2 * height, 2 * width
    if isinstance(output_size, int) or len(output_size) != 2:
        return None
    rows, columns = (int(size) for size in output_size)
    # a size that drops pixels could drop the largest, which a measured scale depends on
    return (rows, columns) if rows >= height and columns >= width else None


def _enlarge(x_q: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest pixels of int8 NHWC."""
    for dim, new in zip((1, 2), size, strict=True):
        if new != x_q.shape[dim]:
            x_q = x_q.index_select(dim, _nearest(x_q.shape[dim], new, x_q.device))
    return x_q


@lru_cache(maxsize=256)
def _nearest(old: int, new: int, device: torch.device) -> Tensor:
    """Source index of each new pixel, int64 [new], by torch's own rounding.

    Kept where it is used: a copy at every call would make the host wait for a GPU.
    """
    positions = torch.arange(old, dtype=torch.float32)[None, None]
    index = functional.interpolate(positions, size=new, mode="nearest")[0, 0].to(torch.int64)
    return index.to(device)
