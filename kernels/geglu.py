"""Gated GELU and quantization of rows, in one launch.

    y[m, k] = x[m, k] * gelu(x[m, K + k]),   gelu(x) = x * (1 + erf(x / sqrt 2)) / 2            (1)

then as in ``kernels/quantize.py``, with a scale a row or a given one.
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
from ptq4adm.kernels.device import gelu
from ptq4adm.kernels.launch import launch


@triton.jit
def gated_rows(x_ptr, offs_m, offs_k, M, K, row_stride):
    """Equation (1) for a tile: float32 [BLOCK_M, BLOCK_K], zero outside of [M, K]."""
    value = load_rows(x_ptr, offs_m, offs_k, M, K, row_stride)
    return value * gelu(load_rows(x_ptr + K, offs_m, offs_k, M, K, row_stride))


@triton.jit
def _geglu_kernel(
    # tensors
    x_ptr,  # float [M, 2 K], rows row_stride apart
    x_q_ptr,  # int8 [M, K]
    # sizes
    M,
    K,
    row_stride,
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
        y = gated_rows(x_ptr, offs_m, offs_k, M, K, row_stride)
        if x_scale_ptr is None:
            scale = row_scale(row_absmax(y), scale_ptr, offs_m, M)
        store_rows(y, scale, x_q_ptr, offs_m, offs_k, M, K)
    else:
        if x_scale_ptr is None:
            bits = tl.zeros((BLOCK_M, 1), dtype=tl.int32)
            for k in range(0, K, BLOCK_K):
                y = gated_rows(x_ptr, offs_m, k + offs_k, M, K, row_stride)
                bits = tl.maximum(bits, row_absmax(y))
            scale = row_scale(bits, scale_ptr, offs_m, M)
        for k in range(0, K, BLOCK_K):
            y = gated_rows(x_ptr, offs_m, k + offs_k, M, K, row_stride)
            store_rows(y, scale, x_q_ptr, offs_m, k + offs_k, M, K)


def geglu_quantize(x: Tensor, x_q: Tensor, scale: Scale) -> None:
    """Gate rows and quantize them, with a measured scale a row or a given one.

    Args:
        x: float32, float16 or bfloat16 [M, 2 K], columns side by side, rows at any distance.
        x_q: int8 [M, K], contiguous.
        scale: of [M], or of one element if it is given.
    """
    M, K = x_q.shape
    tile = plan_rows(M, K)
    launch(
        _geglu_kernel,
        # one at least, which writes the given scale of no rows
        (max(triton.cdiv(M, tile.rows), 1),),
        x.device,
        x,
        x_q,
        M,
        K,
        x.stride(0),
        **scale.arguments(),
        **tile.arguments(),
        IS_WHOLE=tile.columns >= K,
    )
