"""Layer norm and quantization of rows, in one launch.

    y[m, k] = (x[m, k] - mean[m]) / sqrt(var[m] + eps) * weight[k] + bias[k]                    (1)

then as in ``kernels/quantize.py``, with a scale a row or a given one. The mean is taken twice, the
second time of what the first left: in float32 a mean of 1000 times the deviation is known to 1e-4
of the deviation only, which would move one element in 300 to another integer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ptq4adm.kernels.activation import (
    Scale,
    given_scale,
    load_rows,
    plan_rows,
    row_absmax,
    row_scale,
    store_rows,
)
from ptq4adm.kernels.device import reciprocal_deviation
from ptq4adm.kernels.launch import launch


@triton.jit
def centered_rows(x, mean, mask_k):
    """Rows without their mean; what lies outside of them stays zero, so that it adds nothing."""
    return tl.where(mask_k[None, :], x - mean, 0.0)


@triton.jit
def row_mean(x, K):
    """Mean of each row of K elements: float32 [BLOCK_M, 1]; what lies outside must be zero."""
    return (tl.sum(x, axis=1) / K)[:, None]


@triton.jit
def row_moments(x_ptr, offs_m, M, K, row_stride, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """First mean, mean of what it left, and variance of rows longer than a tile, [BLOCK_M, 1]."""
    offs_k = tl.arange(0, BLOCK_K)
    mean = tl.zeros((BLOCK_M, 1), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mean += row_mean(load_rows(x_ptr, offs_m, k + offs_k, M, K, row_stride), K)
    rest = tl.zeros((BLOCK_M, 1), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = load_rows(x_ptr, offs_m, k + offs_k, M, K, row_stride)
        rest += row_mean(centered_rows(x, mean, k + offs_k < K), K)
    variance = tl.zeros((BLOCK_M, 1), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = load_rows(x_ptr, offs_m, k + offs_k, M, K, row_stride)
        centered = centered_rows(x - mean, rest, k + offs_k < K)
        variance += row_mean(centered * centered, K)
    return mean, rest, variance


@triton.jit
def scaled_rows(centered, rstd, weight_ptr, bias_ptr, offs_k, K):
    """Equation (1) from centered rows; zero outside of them, as no maximum is."""
    mask = offs_k < K
    weight = tl.load(weight_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    return tl.fma(centered * rstd, weight[None, :], bias[None, :])


@triton.jit
def _layernorm_kernel(
    # tensors
    x_ptr,  # float [M, K], rows row_stride apart
    weight_ptr,  # float [K]
    bias_ptr,  # float [K]
    x_q_ptr,  # int8 [M, K]
    # sizes
    M,
    K,
    row_stride,
    eps,
    # see Scale.arguments
    scale_ptr,
    x_scale_ptr,
    table_size,
    step_ptr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # a tile holds whole rows
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    if x_scale_ptr is not None:
        # first, so that it is there when the row is
        scale = given_scale(scale_ptr, x_scale_ptr, table_size, step_ptr)
    if IS_WHOLE:
        x = load_rows(x_ptr, offs_m, offs_k, M, K, row_stride)
        centered = centered_rows(x, row_mean(x, K), offs_k < K)
        centered = centered_rows(centered, row_mean(centered, K), offs_k < K)
        rstd = reciprocal_deviation(row_mean(centered * centered, K), eps)
        y = scaled_rows(centered, rstd, weight_ptr, bias_ptr, offs_k, K)
        if x_scale_ptr is None:
            scale = row_scale(row_absmax(y), scale_ptr, offs_m, M)
        store_rows(y, scale, x_q_ptr, offs_m, offs_k, M, K)
    else:
        mean, rest, variance = row_moments(x_ptr, offs_m, M, K, row_stride, BLOCK_M, BLOCK_K)
        rstd = reciprocal_deviation(variance, eps)
        if x_scale_ptr is None:
            bits = tl.zeros((BLOCK_M, 1), dtype=tl.int32)
            for k in range(0, K, BLOCK_K):
                x = load_rows(x_ptr, offs_m, k + offs_k, M, K, row_stride)
                centered = centered_rows(x - mean, rest, k + offs_k < K)
                y = scaled_rows(centered, rstd, weight_ptr, bias_ptr, k + offs_k, K)
                bits = tl.maximum(bits, row_absmax(y))
            scale = row_scale(bits, scale_ptr, offs_m, M)
        for k in range(0, K, BLOCK_K):
            x = load_rows(x_ptr, offs_m, k + offs_k, M, K, row_stride)
            centered = centered_rows(x - mean, rest, k + offs_k < K)
            y = scaled_rows(centered, rstd, weight_ptr, bias_ptr, k + offs_k, K)
            store_rows(y, scale, x_q_ptr, offs_m, k + offs_k, M, K)


def layernorm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, x_q: Tensor, scale: Scale
) -> None:
    """Normalize rows and quantize them, with a measured scale a row or a given one.

    Args:
        x: float32, float16 or bfloat16 [M, K], columns side by side, rows at any distance.
        weight: float32, float16 or bfloat16 [K], contiguous.
        bias: the same.
        eps: added to the variance.
        x_q: int8 [M, K], contiguous.
        scale: of [M], or of one element if it is given.
    """
    M, K = x.shape
    tile = plan_rows(M, K)
    launch(
        _layernorm_kernel,
        # one at least, which writes the given scale of no rows
        (max(triton.cdiv(M, tile.rows), 1),),
        x.device,
        x,
        weight,
        bias,
        x_q,
        M,
        K,
        x.stride(0),
        eps,
        **scale.arguments(),
        **tile.arguments(),
        IS_WHOLE=tile.columns >= K,
    )
