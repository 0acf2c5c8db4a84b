"""Convolutions of stride 1 whose pixels come as boxes: the form for compute capability 9.0.

A tile of output pixels is a box [images, rows, all columns]. For each tap the box of input pixels
is the same one, shifted: the Tensor Memory Accelerator cuts it out of the image and writes zeros
where it reaches over the border, so no thread computes an address and padding needs no mask.

    kernel 3 x 3, padding 1, tap (r, s):   box starts at (image, row + r - 1, s - 1, channel)

Weight order and sums are those of ``conv2d.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq4adm.kernels.conv2d import Window
from ptq4adm.kernels.epilogue import (
    SCALE_POINTERS,
    SCALE_SIZES,
    Epilogue,
    finish_tile,
    tile_channels,
)
from ptq4adm.kernels.gemm import load_weight_tile
from ptq4adm.kernels.launch import launch
from ptq4adm.kernels.split_k import store_partial, sum_partials, workspace
from ptq4adm.kernels.tuning import TileConfig


@triton.jit(
    # other values, or addresses, of these do not make another kernel
    do_not_specialize=["batch", *SCALE_SIZES],
    do_not_specialize_on_alignment=SCALE_POINTERS,
)
def _conv2d_tma_kernel(
    # tensors
    x_desc,  # int8  [B, H, W, C], boxes [TILE_B, TILE_H, TILE_W, BLOCK_K]
    qweight_ptr,  # uint8 [N, row_bytes] (4 bits) or int8
    w_mult_ptr,  # uint8 [N, row_groups], or None
    slab_ptr,  # int32, with SPLIT_K > 1
    counter_ptr,  # int32 [tiles], with SPLIT_K > 1
    # sizes
    batch,
    N,
    C,
    out_h,
    row_bytes,
    row_groups,
    # see Epilogue.arguments
    out_ptr,
    out2_ptr,
    x_scale_ptr,
    x_table,
    x2_scale_ptr,
    x2_table,
    out_scale_ptr,
    out_table,
    step_ptr,
    w_scale_ptr,
    bias_ptr,
    temb_ptr,
    rows_per_sample,
    residual_ptr,
    X_SCALE: tl.constexpr,
    X2_SCALE: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    IS_GATED: tl.constexpr,
    # geometry
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    # tile, chosen by the launcher
    BITS: tl.constexpr,
    TILE_B: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,  # the whole row of the output
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    # --- which tile -------------------------------------------------------------------------
    tile = tl.program_id(0)
    split = tl.program_id(1)
    BLOCK_M: tl.constexpr = TILE_B * TILE_H * TILE_W
    ROWS_N: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    N_OUT = N // 2 if IS_GATED else N
    tiles_n = tl.cdiv(N_OUT, ROWS_N)
    tile_n = tile % tiles_n
    box = tile // tiles_n
    boxes_h = tl.cdiv(out_h, TILE_H)
    first_image = (box // boxes_h) * TILE_B
    first_row = (box % boxes_h) * TILE_H
    offs_n = tile_channels(tile_n, N, BLOCK_N, IS_GATED)
    mask_n = offs_n < N

    # --- main loop over taps and channels ---------------------------------------------------
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 1
    channels = qweight_ptr + offs_n[:, None] * row_bytes
    multipliers = None
    if w_mult_ptr is not None:
        multipliers = w_mult_ptr + offs_n[:, None] * row_groups
    blocks = ((C + 63) // 64 * 64) // BLOCK_K  # steps a tap
    steps = KERNEL_H * KERNEL_W * blocks
    share = tl.cdiv(steps, SPLIT_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in range(split * share, tl.minimum(split * share + share, steps)):
        tap = step // blocks
        c = (step - tap * blocks) * BLOCK_K
        row = first_row - PADDING_H + (tap // KERNEL_W) * DILATION_H
        column = (tap % KERNEL_W) * DILATION_W - PADDING_W
        x_q = x_desc.load([first_image, row, column, c]).reshape(BLOCK_M, BLOCK_K)
        w_q = load_weight_tile(
            channels + step * (BLOCK_K // PER_BYTE),
            None if w_mult_ptr is None else multipliers + step * (BLOCK_K // 64),
            mask_n,
            BLOCK_K,
            BITS,
            BLOCK_N,
            BLOCK_K,
            False,
        )
        acc = tl.dot(w_q, x_q.T, acc, out_dtype=tl.int32)

    # --- scale and store --------------------------------------------------------------------
    if SPLIT_K > 1:
        tiles = tl.num_programs(0)
        arrived = store_partial(acc, slab_ptr, counter_ptr, split, tile, tiles, BLOCK_N, BLOCK_M)
        is_last = arrived == SPLIT_K - 1
    else:
        is_last = True
    if is_last:
        if SPLIT_K > 1:
            acc = sum_partials(slab_ptr, 0, SPLIT_K, tile, tiles, BLOCK_N, BLOCK_M)
            tl.store(counter_ptr + tile, 0)
        pixel = tl.arange(0, BLOCK_M)
        row = first_row + pixel // TILE_W % TILE_H
        image = first_image + pixel // (TILE_W * TILE_H)
        offs_m = (image * out_h + row) * TILE_W + pixel % TILE_W
        finish_tile(
            acc, None, offs_n, tile_n, offs_m, (row < out_h) & (image < batch), N, out_ptr,
            out2_ptr, x_scale_ptr, x_table, x2_scale_ptr, x2_table, out_scale_ptr, out_table,
            step_ptr, w_scale_ptr, bias_ptr, temb_ptr, rows_per_sample, residual_ptr, X_SCALE,
            X2_SCALE, OUT_SCALE, IS_GATED, BITS, w_mult_ptr is not None, BLOCK_N, BLOCK_M,
        )  # fmt: skip


def can_load_boxes(x_q: Tensor, window: Window) -> bool:
    """Return whether a convolution can take this form: stride 1, rows of a power of two, aligned.

    Args:
        x_q: int8 [B, H, W, C].
        window: the geometry.
    """
    width = window.out[1]
    return (
        window.stride == (1, 1)
        and window.enlargement == "none"
        and width & (width - 1) == 0
        # distances between pixels, and the address, must be multiples of 16 bytes
        and x_q.shape[3] % 16 == 0
        and x_q.data_ptr() % 16 == 0
    )


def conv2d_tma(
    x_q: Tensor,
    qweight: Tensor,
    window: Window,
    epilogue: Epilogue,
    config: TileConfig,
    *,
    bits: int,
    w_mult: Tensor | None = None,
) -> None:
    """Convolve images into ``epilogue.out``, as ``conv2d.conv2d`` for what ``can_load_boxes``.

    Args:
        x_q: int8 [B, H, W, C].
        qweight: canonical, uint8 [N, Kp / 2] (4 bits) or int8 [N, Kp].
        window: the geometry.
        epilogue: what becomes of the accumulators, and the output [B, Ho, Wo, N].
        config: a legal tile of form ``tma``.
        bits: 4 or 8.
        w_mult: uint8 [N, Kp / 64], multipliers of groups of 64 weights (4 bits only).
    """
    batch, height, width, C = x_q.shape
    N = qweight.shape[0]
    out_h, tile_w = window.out
    tile_h = min(config.block_m // tile_w, triton.next_power_of_2(out_h))
    tile_b = config.block_m // (tile_w * tile_h)
    tiles = -(-batch // tile_b) * -(-out_h // tile_h) * epilogue.channel_tiles(N, config)
    splits = config.split_k
    slabs, counters = workspace(x_q.device, splits, tiles, config.block_m * config.block_n)
    launch(
        _conv2d_tma_kernel,
        (tiles, splits),
        x_q.device,
        # its own strides: PyTorch lets those of a size of 1 be anything
        TensorDescriptor(
            x_q,
            [batch, height, width, C],
            [height * width * C, width * C, C, 1],
            [tile_b, tile_h, tile_w, config.block_k],
        ),
        qweight,
        w_mult,
        slabs,
        counters,
        batch,
        N,
        C,
        out_h,
        qweight.shape[1],
        0 if w_mult is None else w_mult.shape[1],
        **epilogue.arguments(batch * out_h * tile_w),
        KERNEL_H=window.kernel[0],
        KERNEL_W=window.kernel[1],
        PADDING_H=window.padding[0],
        PADDING_W=window.padding[1],
        DILATION_H=window.dilation[0],
        DILATION_W=window.dilation[1],
        TILE_B=tile_b,
        TILE_H=tile_h,
        TILE_W=tile_w,
        **epilogue.tile_arguments(config, bits),
    )
