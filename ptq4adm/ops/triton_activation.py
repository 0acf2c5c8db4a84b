"""Backend ``triton``: the quantizing operators, on a GPU.

Each function runs the function of the same name in ``reference.py``: it checks the tensors, makes
room for the result and launches kernels on the current stream; nothing waits for the device.
``quantize_int8`` is equal to the reference bit for bit; the fused ones may differ by one step on
0.1 % of the elements.

What the reference raises by looking at values cannot be raised here, it shows in the scale: a
``step`` outside the table gives NaN, and so does NaN in what is measured (infinity gives infinity).
NaN quantized with a given scale becomes some integer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptq4adm.kernels import geglu, groupnorm, layernorm, quantize
from ptq4adm.kernels.activation import Scale
from ptq4adm.ops.arguments import check_dtype, check_shape
from ptq4adm.ops.schema import check_glu, check_group_norm, check_static_scale, scale_shape
from ptq4adm.ops.triton_matmul import check_device

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_int8(
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    granularity: str = "tensor",
) -> tuple[Tensor, Tensor]:
    """Run ``reference.quantize_int8`` on a GPU, equal bit for bit.

    Rows at one distance are read in place: a slice of the last dimension is not copied.

    Args:
        x: float, any shape.
        x_scale: float32 static scale, one element or a table [T] with ``step``; None measures it.
        step: int64 [] or [1], the row of the table, read on the device.
        granularity: ``tensor`` or ``row`` (last dimension) for a measured scale.

    Returns:
        x_q: int8 of the shape of ``x``, contiguous, in [-127, 127].
        scale: float32 [], or the leading sizes of ``x`` for measured rows.
    """
    scale = _scale(x, x_scale, step, granularity)
    x_q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if x_scale is None and granularity == "row":
        rows = _as_rows(x)
        quantize.quantize_rows(rows, x_q.view(rows.shape), scale.out)
    else:
        rows = _as_float(x).view(1, -1) if x.is_contiguous() else _as_rows(x)
        quantize.quantize_tensor(rows, x_q.view(rows.shape), scale)
    return x_q, scale.out


def groupnorm_silu_quantize(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run ``reference.groupnorm_silu_quantize`` on a GPU: two launches, three to measure a scale.

    Args:
        x: float [B, C, H, W]. Memory in channels-last order is read in place, a slice of the
            channels included; another order is copied first.
        num_groups: groups of channels that share mean and variance.
        weight: float [C].
        bias: float [C].
        eps: added to the variance.
        x_scale: as in ``quantize_int8``.
        step: as in ``quantize_int8``.
        silu: apply x * sigmoid(x) after the norm.

    Returns:
        x_q: int8 NHWC [B, H, W, C].
        scale: float32 [].
    """
    check_group_norm(x, num_groups)
    scale = _scale(x, x_scale, step, "tensor", weight, bias)
    batch, channels, height, width = x.shape
    weight, bias = _parameter("weight", weight, channels), _parameter("bias", bias, channels)
    if x.numel() == 0:  # nothing to normalize
        return quantize_int8(x.permute(0, 2, 3, 1), x_scale=x_scale, step=step)
    x_q = torch.empty((batch, height, width, channels), dtype=torch.int8, device=x.device)
    pixels = _as_float(x).permute(0, 2, 3, 1).flatten(1, 2)
    if pixels.stride(2) != 1:
        pixels = pixels.contiguous()
    groupnorm.groupnorm_silu_quantize(
        pixels, num_groups, weight, bias, eps, x_q.view(pixels.shape), scale, is_silu=silu
    )
    return x_q, scale.out


def layernorm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``reference.layernorm_quantize`` on a GPU, in one launch.

    Args:
        x: float [M, K]; rows at one distance are read in place.
        weight: float [K].
        bias: float [K].
        eps: added to the variance.
        x_scale: as in ``quantize_int8``.
        step: as in ``quantize_int8``.

    Returns:
        x_q: int8 [M, K].
        scale: float32 [M], or [] for a static scale.
    """
    scale = _scale(x, x_scale, step, "row", weight, bias)
    rows = _as_rows(x)
    weight = _parameter("weight", weight, rows.shape[1])
    bias = _parameter("bias", bias, rows.shape[1])
    if x.numel() == 0:  # nothing to normalize
        return quantize_int8(x, x_scale=x_scale, step=step, granularity="row")
    x_q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    layernorm.layernorm_quantize(rows, weight, bias, eps, x_q.view(rows.shape), scale)
    return x_q, scale.out


def geglu_quantize(
    x: Tensor, *, x_scale: Tensor | None = None, step: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run ``reference.geglu_quantize`` on a GPU, in one launch.

    Args:
        x: float [M, 2 K]: values, then gates; rows at one distance are read in place.
        x_scale: as in ``quantize_int8``.
        step: as in ``quantize_int8``.

    Returns:
        x_q: int8 [M, K].
        scale: float32 [M], or [] for a static scale.
    """
    check_glu(x)
    scale = _scale(x, x_scale, step, "row")
    rows = _as_rows(x)
    x_q = torch.empty((x.shape[0], x.shape[1] // 2), dtype=torch.int8, device=x.device)
    geglu.geglu_quantize(rows, x_q, scale)
    return x_q, scale.out


def _scale(
    x: Tensor, x_scale: Tensor | None, step: Tensor | None, granularity: str, *others: Tensor
) -> Scale:
    """Check devices and the static scale, and make room for the scale in use."""
    check_static_scale(x_scale, step)
    shape = scale_shape(x, x_scale, granularity)
    if x_scale is None or x_scale.numel() == 1:
        step = None  # one scale serves every step
    check_device(x, x_scale, step, *others)
    if x_scale is not None:
        check_dtype("x_scale", x_scale, torch.float32)
        x_scale = x_scale.contiguous()
    return Scale(torch.empty(shape, dtype=torch.float32, device=x.device), x_scale, step)


def _parameter(name: str, parameter: Tensor, size: int) -> Tensor:
    """Return a norm's weight or bias as a kernel reads it, contiguous [size]."""
    check_shape(name, parameter, (size,))
    return _as_float(parameter).contiguous()


def _as_float(x: Tensor) -> Tensor:
    """Return what kernels read as it is, and anything else in float32."""
    return x if x.dtype in _KERNEL_DTYPES else x.float()


def _as_rows(x: Tensor) -> Tensor:
    """View a tensor as rows [M, K] of its last dimension, with a copy only where that has to be."""
    K = x.shape[-1] if x.dim() else 1
    rows = _as_float(x).reshape(math.prod(x.shape[:-1]), K)
    return rows if rows.stride(1) == 1 or K == 1 else rows.contiguous()
