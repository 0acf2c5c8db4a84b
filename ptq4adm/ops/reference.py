"""The operators in plain PyTorch, on any device: the oracle that other backends must equal.

    acc[m, n] = sum_k x_q[m, k] * w_q[n, k]                                     exact int32     (1)
    y[m, n]   = (acc1 * x_scale1 [+ acc2 * x_scale2]) * w_scale[n]
                + bias[n] (+ temb[b, n]) (+ residual[m, n])                     float32         (2)
    x_q       = clamp(rint(x * (1 / x_scale)), -127, 127)                       float32         (3)

Products run in float64, which holds every partial sum of (1) exactly and which no autocast or
reduced-precision switch touches. Weights are in canonical order (``ptq4adm.packing.layout``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm.errors import NonFiniteError, UncalibratedStepError
from ptq4adm.ops.arguments import Conv2dGeometry, Matmul, conv2d_shape, linear_shape
from ptq4adm.ops.schema import (
    check_attention,
    check_glu,
    check_group_norm,
    check_static_scale,
    scale_shape,
)
from ptq4adm.packing.layout import KLayout, expand_multipliers, rows_to_weight, unpack_int4

SMALLEST_ABSMAX = 1e-8  # keeps a silent tensor from dividing by zero
INT8_MAX = 127

NAME = "reference"


# --- matrix products ----------------------------------------------------------------------------


def linear(call: Matmul) -> Tensor:
    """Multiply int8 rows by a quantized weight; see the module's equations (1) and (2).

    Args:
        call: ``x_q`` int8 [M, K], ``qweight`` canonical.

    Returns:
        [M, N], or [M, N / 2] with ``geglu``, in ``out_dtype`` or int8.
    """
    linear_shape(call, NAME)
    return _epilogue(call, accumulate_linear(call))


def conv2d(call: Matmul, geometry: Conv2dGeometry) -> Tensor:
    """Convolve NHWC int8 activations with a quantized weight; equations (1) and (2).

    Args:
        call: ``x_q`` int8 [B, H, W, C], ``qweight`` canonical.
        geometry: kernel, stride, padding, dilation, nearest upsampling.

    Returns:
        NHWC [B, Ho, Wo, N], or N / 2 channels with ``geglu``, in ``out_dtype`` or int8.
    """
    conv2d_shape(call, geometry, NAME)
    return _epilogue(call, accumulate_conv2d(call, geometry))


def accumulate_linear(call: Matmul) -> list[Tensor]:
    """Return the exact int32 accumulator [M, N] of each K segment: equation (1)."""
    weights = _segment_weights(call, (1, 1))
    return [
        (x_q.double() @ weight[:, :, 0, 0].T).to(torch.int32)
        for x_q, weight in zip(_segments(call), weights, strict=True)
    ]


def accumulate_conv2d(call: Matmul, geometry: Conv2dGeometry) -> list[Tensor]:
    """Return the exact int32 accumulator [B, Ho, Wo, N] of each K segment: equation (1)."""
    weights = _segment_weights(call, geometry.kernel_size)
    return [
        _convolve(x_q, weight, geometry)
        for x_q, weight in zip(_segments(call), weights, strict=True)
    ]


def _segments(call: Matmul) -> list[Tensor]:
    x2_q = call.options.x2_q
    return [call.x_q] if x2_q is None else [call.x_q, x2_q]


def _segment_weights(call: Matmul, kernel_size: tuple[int, int]) -> list[Tensor]:
    """Decode the weight to float64 [N, C, kh, kw], one tensor a segment."""
    w_q = unpack_int4(call.qweight) if call.bits == 4 else call.qweight
    if call.options.w_mult is not None:
        w_q = w_q * expand_multipliers(call.options.w_mult)
    layout = KLayout(tuple(x_q.shape[-1] for x_q in _segments(call)), kernel_size)
    return list(rows_to_weight(w_q.double(), layout).split(layout.segments, dim=1))


def _convolve(x_q: Tensor, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
    x = _upsample_nearest(x_q, geometry.upsample).double()
    out_h, out_w = geometry.output_size(x_q.shape[1], x_q.shape[2])
    pad_h, pad_w = geometry.padding
    x = functional.pad(x, (0, 0, pad_w, pad_w, pad_h, pad_h))
    acc = x.new_zeros(x.shape[0], out_h, out_w, weight.shape[0])
    for row in range(geometry.kernel_size[0]):
        for column in range(geometry.kernel_size[1]):
            tap = x[
                :,
                _tap_slice(row * geometry.dilation[0], geometry.stride[0], out_h),
                _tap_slice(column * geometry.dilation[1], geometry.stride[1], out_w),
            ]
            acc += tap @ weight[:, :, row, column].T
    return acc.to(torch.int32)


def _tap_slice(start: int, stride: int, count: int) -> slice:
    return slice(start, start + (count - 1) * stride + 1, stride)


def _upsample_nearest(x_q: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None:
        return x_q
    rows, columns = (
        torch.arange(new, device=x_q.device) * old // new
        for new, old in zip(size, x_q.shape[1:3], strict=True)
    )
    return x_q[:, rows][:, :, columns]


def _epilogue(call: Matmul, accumulators: list[Tensor]) -> Tensor:
    options, shape = call.options, accumulators[0].shape
    scales = [call.x_scale] if options.x2_scale is None else [call.x_scale, options.x2_scale]
    terms = [
        acc.flatten(0, -2).float() * select_scale(scale, options.step).reshape(-1, 1)
        for acc, scale in zip(accumulators, scales, strict=True)
    ]
    y = (terms[0] if len(terms) == 1 else terms[0] + terms[1]) * call.w_scale
    if options.bias is not None:
        y = y + options.bias.float()
    if options.temb is not None:
        y = y + options.temb.float().repeat_interleave(y.shape[0] // options.temb.shape[0], dim=0)
    y = y.reshape(shape)
    if options.residual is not None:
        y = y + options.residual.float()
    if options.geglu:
        y = gated_gelu(y)
    if options.out_scale is None:
        return y.to(options.out_dtype)
    return _quantize(y, select_scale(options.out_scale, options.step))


def gated_gelu(x: Tensor) -> Tensor:
    """Return first half * gelu(second half) of the last dimension, with the exact erf."""
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)


# --- quantization of activations ----------------------------------------------------------------


def quantize_int8(
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    granularity: str = "tensor",
) -> tuple[Tensor, Tensor]:
    """Quantize activations to int8; equation (3) of the module.

    Args:
        x: float, any shape.
        x_scale: float32 static scale, one element or a table [T] with ``step``; None measures
            max(absmax, 1e-8) / 127 of the tensor or of each row.
        step: int64 [] or [1], the row of the table.
        granularity: ``tensor`` or ``row`` (last dimension); without meaning for a static scale.

    Returns:
        x_q: int8 of the shape of ``x``, contiguous, in [-127, 127].
        scale: float32 [], or the leading sizes of ``x`` for rows.

    Raises:
        NonFiniteError: if ``x`` holds NaN or infinity.
        UncalibratedStepError: if ``step`` lies outside the table.
    """
    check_static_scale(x_scale, step)
    shape = scale_shape(x, x_scale, granularity)
    values = x.float()
    if x_scale is not None:
        scale = select_scale(x_scale, step).reshape(()).clone()
    elif granularity == "row":
        scale = _dynamic_scale(values.abs().amax(dim=-1) if values.numel() else values.sum(-1))
    else:
        scale = _dynamic_scale(values.abs().amax() if values.numel() else values.sum())
    return _quantize(values, scale.unsqueeze(-1) if shape else scale), scale


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
    """Group norm, optionally SiLU, then quantization per tensor: the input of a convolution.

    Args:
        x: float [B, C, H, W], any memory format.
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
    # in float64: PyTorch's float32 sums over channels-last memory lose a mean of 1000 times the
    # deviation by dozens of steps
    y = functional.group_norm(x.double(), num_groups, weight.double(), bias.double(), eps)
    y = (functional.silu(y) if silu else y).float()
    return quantize_int8(y.permute(0, 2, 3, 1).contiguous(), x_scale=x_scale, step=step)


def layernorm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Layer norm over the last dimension, then quantization per row (or static).

    Args:
        x: float [M, K].
        weight: float [K].
        bias: float [K].
        eps: added to the variance.
        x_scale: as in ``quantize_int8``.
        step: as in ``quantize_int8``.

    Returns:
        x_q: int8 [M, K].
        scale: float32 [M], or [] for a static scale.
    """
    y = functional.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), eps)
    return quantize_int8(y.float(), x_scale=x_scale, step=step, granularity="row")


def geglu_quantize(
    x: Tensor, *, x_scale: Tensor | None = None, step: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated GELU, then quantization per row (or static).

    Args:
        x: float [M, 2 K]: values, then gates.
        x_scale: as in ``quantize_int8``.
        step: as in ``quantize_int8``.

    Returns:
        x_q: int8 [M, K].
        scale: float32 [M], or [] for a static scale.
    """
    check_glu(x)
    return quantize_int8(gated_gelu(x.float()), x_scale=x_scale, step=step, granularity="row")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of every head, in float: softmax(q k^T * scale + bias) v.

    Args:
        q: float [B, Tq, C], the channels of a head side by side.
        k: the same dtype [B, Tk, C].
        v: the same dtype [B, Tk, C].
        heads: number of heads; C / heads channels each.
        bias: float [B, Tk], added to the scores of every head and query; large and negative for a
            key that is not to be seen.
        scale: None for 1 / sqrt(C / heads).

    Returns:
        The dtype of ``q``, [B, Tq, C].

    Raises:
        ShapeError: if the tensors do not fit together.
        DtypeError: if they are not of one float dtype.
    """
    check_attention(q, k, v, heads, bias)
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else bias[:, None, None].to(q.dtype)
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).flatten(2)


def select_scale(scale: Tensor, step: Tensor | None) -> Tensor:
    """Return the scale in use: row ``step`` of a table, or the scale as it is.

    Raises:
        UncalibratedStepError: if ``step`` lies outside the table.
    """
    if step is None or scale.numel() == 1:
        return scale
    index = int(step)
    if not 0 <= index < scale.shape[0]:
        raise UncalibratedStepError(
            f"step = {index}: the scale table has rows 0..{scale.shape[0] - 1}; calibrate this "
            "timestep or quantize with dynamic activation scales"
        )
    return scale[index]


def _dynamic_scale(absmax: Tensor) -> Tensor:
    # a tensor divisor: CUDA turns a Python one into a product with its reciprocal
    return absmax.clamp(min=SMALLEST_ABSMAX) / torch.full_like(absmax, INT8_MAX)


def _quantize(values: Tensor, scale: Tensor) -> Tensor:
    """Apply equation (3); ``values`` float32, ``scale`` broadcastable to them."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            "activations hold NaN or infinity, which int8 cannot; look for an overflow in float16 "
            "or for broken weights before this layer"
        )
    scaled = values * scale.reciprocal()
    return scaled.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8).contiguous()
