"""Quantization of activations to int8: with a given scale, or one measured of a tensor or a row.

    x_scale = max(absmax, 1e-8) / 127,   x_q = clamp(rint_to_even(x * (1 / x_scale)), -127, 127)

Equal to the reference bit for bit: one product, rounded, and the reciprocal rounded before it.
NaN in what is measured gives a NaN scale, infinity an infinite one: every later layer shows it.
With a given scale NaN becomes some integer; raising would need the host to wait for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq4adm.kernels.activation import (
    PARTIALS,
    Scale,
    given_scale,
    load_rows,
    measured_scale,
    plan_elements,
    plan_rows,
    row_absmax,
    row_scale,
    store_rows,
)
from ptq4adm.kernels.launch import launch


@triton.jit
def _absmax_kernel(
    # tensors
    x_ptr,  # float [M, K], rows row_stride apart
    partials_ptr,  # int32 [programs]
    # sizes
    M,
    K,
    row_stride,
    tiles_k,
    tiles,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    bits = tl.zeros((BLOCK_M, 1), dtype=tl.int32)
    for tile in range(program, tiles, tl.num_programs(0)):
        offs_m = (tile // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_k = (tile % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, offs_m, offs_k, M, K, row_stride)
        bits = tl.maximum(bits, row_absmax(x))
    tl.store(partials_ptr + program, tl.max(tl.max(bits, axis=1), axis=0))


@triton.jit
def _quantize_kernel(
    # tensors
    x_ptr,  # float [M, K], rows row_stride apart
    x_q_ptr,  # int8 [M, K]
    # sizes
    M,
    K,
    row_stride,
    tiles_k,
    tiles,
    # see Scale.arguments
    scale_ptr,
    x_scale_ptr,
    table_size,
    step_ptr,
    partials_ptr,
    partials,
    PARTIALS: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if x_scale_ptr is not None:
        scale = given_scale(scale_ptr, x_scale_ptr, table_size, step_ptr)
    else:
        scale = measured_scale(scale_ptr, partials_ptr, partials, PARTIALS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        offs_m = (tile // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_k = (tile % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, offs_m, offs_k, M, K, row_stride)
        store_rows(x, scale, x_q_ptr, offs_m, offs_k, M, K)


@triton.jit
def _quantize_rows_kernel(
    # tensors
    x_ptr,  # float [M, K], rows row_stride apart
    x_q_ptr,  # int8 [M, K]
    scale_ptr,  # fp32 [M]
    # sizes
    M,
    K,
    row_stride,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # a tile holds whole rows
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    if IS_WHOLE:
        x = load_rows(x_ptr, offs_m, offs_k, M, K, row_stride)
        scale = row_scale(row_absmax(x), scale_ptr, offs_m, M)
        store_rows(x, scale, x_q_ptr, offs_m, offs_k, M, K)
    else:
        bits = tl.zeros((BLOCK_M, 1), dtype=tl.int32)
        for k in range(0, K, BLOCK_K):
            x = load_rows(x_ptr, offs_m, k + offs_k, M, K, row_stride)
            bits = tl.maximum(bits, row_absmax(x))
        scale = row_scale(bits, scale_ptr, offs_m, M)
        for k in range(0, K, BLOCK_K):
            x = load_rows(x_ptr, offs_m, k + offs_k, M, K, row_stride)
            store_rows(x, scale, x_q_ptr, offs_m, k + offs_k, M, K)


def quantize_tensor(x: Tensor, x_q: Tensor, scale: Scale) -> None:
    """Quantize with one scale: the given one in one launch, the measured one in two.

    Args:
        x: float32, float16 or bfloat16 [M, K], columns side by side, rows at any distance; [1, K]
            for contiguous memory of any shape.
        x_q: int8 of the same size, contiguous.
        scale: of one element; ``partials`` is made here.
    """
    M, K = x.shape
    tile = plan_elements(M, K)
    tiles_k = max(triton.cdiv(K, tile.columns), 1)
    tiles = triton.cdiv(M, tile.rows) * tiles_k
    # one at least, which writes the scale of an empty tensor
    programs = max(tiles, 1) if scale.table is not None else min(max(tiles, 1), PARTIALS)
    sizes = (M, K, x.stride(0), tiles_k, tiles)
    if scale.table is None:
        scale.partials = torch.empty(programs, dtype=torch.int32, device=x.device)
        launch(_absmax_kernel, (programs,), x.device, x, scale.partials, *sizes, **tile.arguments())
    launch(
        _quantize_kernel,
        (programs,),
        x.device,
        x,
        x_q,
        *sizes,
        **scale.arguments(),
        **scale.partial_arguments(),
        **tile.arguments(),
    )


def quantize_rows(x: Tensor, x_q: Tensor, scale: Tensor) -> None:
    """Quantize every row with its own measured scale, in one launch.

    Args:
        x: float32, float16 or bfloat16 [M, K], columns side by side, rows at any distance.
        x_q: int8 [M, K], contiguous.
        scale: float32 [M].
    """
    M, K = x.shape
    tile = plan_rows(M, K)
    launch(
        _quantize_rows_kernel,
        (triton.cdiv(M, tile.rows),),
        x.device,
        x,
        x_q,
        scale,
        M,
        K,
        x.stride(0),
        IS_WHOLE=tile.columns >= K,
        **tile.arguments(),
    )
