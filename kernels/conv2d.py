"""W4A8 and W8A8 convolutions of NHWC images as implicit products: no im2col, no enlarged copy.

    acc[m, n] = sum over (r, s, c) of x_q[b, i, j, c] * w_q[n, r, s, c]                        (1)
    i = oh * stride - padding + r * dilation,  j likewise,  m = (b, oh, ow)

Pixels outside the image are zeros: the asynchronous copies fill them in, so padding costs nothing.
An upsampled input (nearest) is read through its smaller original. The weight lies in the canonical
order: taps in turn, each padded to whole blocks of 64 channels, so a step never straddles two taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ptq4adm.kernels.epilogue import (
    SCALE_POINTERS,
    SCALE_SIZES,
    Epilogue,
    finish_tile,
    tile_channels,
)
from ptq4adm.kernels.gemm import load_weight_tile
from ptq4adm.kernels.launch import launch
from ptq4adm.kernels.split_k import first_splits, store_partial, sum_partials, workspace
from ptq4adm.kernels.tuning import TileConfig


@dataclass(frozen=True, slots=True)
class Window:
    """Where the pixels of a convolution lie; pairs are (rows, columns).

    Attributes:
        kernel: size of the kernel.
        stride: step of the output.
        padding: zeros around the image.
        dilation: distance of taps.
        size: of the image in memory, (H, W).
        upsampled: size to which it is enlarged first, or ``size``.
        out: size of the output, (Ho, Wo).
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]
    upsampled: tuple[int, int]
    out: tuple[int, int]

    @property
    def enlargement(self) -> str:
        """How a row is found in the smaller image: ``none``, ``double`` (a shift) or ``any``."""
        if self.upsampled == self.size:
            return "none"
        is_double = self.upsampled == (2 * self.size[0], 2 * self.size[1])
        return "double" if is_double else "any"


@triton.jit
def accumulate_pixels(
    x_ptr,  # int8 [B, H, W, C]
    qweight_ptr,  # at the first k of this segment
    mult_ptr,  # uint8, the same, or None
    images,  # [BLOCK_M], b * H
    tops,  # [BLOCK_M], row of the first tap, padding included
    lefts,  # [BLOCK_M]
    mask_m,
    offs_n,  # [BLOCK_N]
    mask_n,
    C,  # of this segment
    H,
    W,
    rows,  # of the image after enlargement
    columns,
    row_bytes,  # of the weight
    row_groups,
    first_step,  # of BLOCK_K
    last_step,
    KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ENLARGEMENT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_C: tl.constexpr,
):
    """Equation (1) over some steps of a segment: int32 [BLOCK_N, BLOCK_M]."""
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 1
    offs_c = tl.arange(0, BLOCK_K)[None, :]
    channels = qweight_ptr + offs_n[:, None] * row_bytes
    multipliers = None
    if mult_ptr is not None:
        multipliers = mult_ptr + offs_n[:, None] * row_groups
    blocks = ((C + 63) // 64 * 64) // BLOCK_K  # steps a tap
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in range(first_step, last_step):
        tap = step // blocks
        c = (step - tap * blocks) * BLOCK_K
        row = tops + (tap // KERNEL_W) * DILATION_H
        column = lefts + (tap % KERNEL_W) * DILATION_W
        is_inside = mask_m & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        if ENLARGEMENT == "double":
            row = row >> 1
            column = column >> 1
        elif ENLARGEMENT == "any":
            row = row * H // rows
            column = column * W // columns
        pixel = (images + row) * W + column
        mask_x = is_inside[:, None]
        if MASK_C:
            mask_x = mask_x & (offs_c < C - c)
        x_q = tl.load(x_ptr + pixel[:, None] * C + (c + offs_c), mask=mask_x, other=0)
        w_q = load_weight_tile(
            channels + step * (BLOCK_K // PER_BYTE),
            None if mult_ptr is None else multipliers + step * (BLOCK_K // 64),
            mask_n,
            BLOCK_K,
            BITS,
            BLOCK_N,
            BLOCK_K,
            False,
        )
        acc = tl.dot(w_q, x_q.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit(
    # other values, or addresses, of these do not make another kernel
    do_not_specialize=["M", *SCALE_SIZES],
    do_not_specialize_on_alignment=SCALE_POINTERS,
)
def _conv2d_kernel(
    # tensors
    x_ptr,  # int8  [B, H, W, C]
    x2_ptr,  # int8  [B, H, W, C2], or None
    qweight_ptr,  # uint8 [N, row_bytes] (4 bits) or int8
    w_mult_ptr,  # uint8 [N, row_groups], or None
    slab_ptr,  # int32, with SPLIT_K > 1
    counter_ptr,  # int32 [tiles], with SPLIT_K > 1
    # sizes
    M,
    N,
    C,
    C2,
    H,
    W,
    rows,
    columns,
    out_h,
    out_w,
    row_bytes,
    second_byte,  # of a weight row, where the second segment begins
    row_groups,
    second_group,
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
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ENLARGEMENT: tl.constexpr,
    # tile, chosen by the launcher
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_C: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SPLIT_FIRST: tl.constexpr,  # splits of the first segment
):
    # --- which tile -------------------------------------------------------------------------
    tile = tl.program_id(0)
    split = tl.program_id(1)
    # channels fastest: programs that run together read the same pixels
    ROWS_N: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    N_OUT = N // 2 if IS_GATED else N
    tiles_n = tl.cdiv(N_OUT, ROWS_N)
    tile_n = tile % tiles_n
    offs_m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_n = tile_channels(tile_n, N, BLOCK_N, IS_GATED)
    mask_n = offs_n < N
    image_row = offs_m // out_w
    lefts = (offs_m - image_row * out_w) * STRIDE_W - PADDING_W
    image = image_row // out_h
    tops = (image_row - image * out_h) * STRIDE_H - PADDING_H
    images = image * H

    # --- main loop over taps and channels ---------------------------------------------------
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    steps = TAPS * (((C + 63) // 64 * 64) // BLOCK_K)
    second_mult_ptr = None if w_mult_ptr is None else w_mult_ptr + second_group
    acc2 = None
    if SPLIT_K == 1:
        acc = accumulate_pixels(
            x_ptr, qweight_ptr, w_mult_ptr, images, tops, lefts, mask_m, offs_n, mask_n, C, H, W,
            rows, columns, row_bytes, row_groups, 0, steps, KERNEL_W, DILATION_H, DILATION_W,
            ENLARGEMENT, BITS, BLOCK_M, BLOCK_N, BLOCK_K, MASK_C,
        )  # fmt: skip
        if x2_ptr is not None:
            steps2 = TAPS * (((C2 + 63) // 64 * 64) // BLOCK_K)
            acc2 = accumulate_pixels(
                x2_ptr, qweight_ptr + second_byte, second_mult_ptr, images, tops, lefts, mask_m,
                offs_n, mask_n, C2, H, W, rows, columns, row_bytes, row_groups, 0, steps2, KERNEL_W,
                DILATION_H, DILATION_W, ENLARGEMENT, BITS, BLOCK_M, BLOCK_N, BLOCK_K, MASK_C,
            )  # fmt: skip
        is_last = True
    else:
        if x2_ptr is None or split < SPLIT_FIRST:
            share = tl.cdiv(steps, SPLIT_FIRST)
            acc = accumulate_pixels(
                x_ptr, qweight_ptr, w_mult_ptr, images, tops, lefts, mask_m, offs_n, mask_n, C, H,
                W, rows, columns, row_bytes, row_groups, split * share,
                tl.minimum(split * share + share, steps), KERNEL_W, DILATION_H, DILATION_W,
                ENLARGEMENT, BITS, BLOCK_M, BLOCK_N, BLOCK_K, MASK_C,
            )  # fmt: skip
        else:
            steps2 = TAPS * (((C2 + 63) // 64 * 64) // BLOCK_K)
            share = tl.cdiv(steps2, SPLIT_K - SPLIT_FIRST)
            first = (split - SPLIT_FIRST) * share
            acc = accumulate_pixels(
                x2_ptr, qweight_ptr + second_byte, second_mult_ptr, images, tops, lefts, mask_m,
                offs_n, mask_n, C2, H, W, rows, columns, row_bytes, row_groups, first,
                tl.minimum(first + share, steps2), KERNEL_W, DILATION_H, DILATION_W, ENLARGEMENT,
                BITS, BLOCK_M, BLOCK_N, BLOCK_K, MASK_C,
            )  # fmt: skip
        tiles = tl.num_programs(0)
        arrived = store_partial(acc, slab_ptr, counter_ptr, split, tile, tiles, BLOCK_N, BLOCK_M)
        is_last = arrived == SPLIT_K - 1

    # --- scale and store --------------------------------------------------------------------
    if is_last:
        if SPLIT_K > 1:
            acc = sum_partials(slab_ptr, 0, SPLIT_FIRST, tile, tiles, BLOCK_N, BLOCK_M)
            if x2_ptr is not None:
                acc2 = sum_partials(slab_ptr, SPLIT_FIRST, SPLIT_K, tile, tiles, BLOCK_N, BLOCK_M)
            tl.store(counter_ptr + tile, 0)
        finish_tile(
            acc, acc2, offs_n, tile_n, offs_m, mask_m, N, out_ptr, out2_ptr, x_scale_ptr, x_table,
            x2_scale_ptr, x2_table, out_scale_ptr, out_table, step_ptr, w_scale_ptr, bias_ptr,
            temb_ptr, rows_per_sample, residual_ptr, X_SCALE, X2_SCALE, OUT_SCALE, IS_GATED, BITS,
            w_mult_ptr is not None, BLOCK_N, BLOCK_M,
        )  # fmt: skip


def conv2d(
    x_q: Tensor,
    qweight: Tensor,
    window: Window,
    epilogue: Epilogue,
    config: TileConfig,
    *,
    bits: int,
    x2_q: Tensor | None = None,
    w_mult: Tensor | None = None,
) -> None:
    """Convolve images into ``epilogue.out``: ``w4a8_conv2d`` and ``w8a8_conv2d``, by addresses.

    Sizes and dtypes are the caller's to check (``ptq4adm.ops``); every tensor is contiguous.

    Args:
        x_q: int8 [B, H, W, C].
        qweight: canonical, uint8 [N, Kp / 2] (4 bits) or int8 [N, Kp].
        window: the geometry.
        epilogue: what becomes of the accumulators, and the output [B, Ho, Wo, N].
        config: a legal tile of form ``gather``.
        bits: 4 or 8.
        x2_q: int8 [B, H, W, C2], the second K segment.
        w_mult: uint8 [N, Kp / 64], multipliers of groups of 64 weights (4 bits only).
    """
    M = x_q.shape[0] * window.out[0] * window.out[1]
    N, C = qweight.shape[0], x_q.shape[3]
    C2 = 0 if x2_q is None else x2_q.shape[3]
    first_blocks = window.kernel[0] * window.kernel[1] * -(-C // 64)
    tiles = -(-M // config.block_m) * epilogue.channel_tiles(N, config)
    splits = config.split_k
    slabs, counters = workspace(x_q.device, splits, tiles, config.block_m * config.block_n)
    launch(
        _conv2d_kernel,
        (tiles, splits),
        x_q.device,
        x_q,
        x2_q,
        qweight,
        w_mult,
        slabs,
        counters,
        M,
        N,
        C,
        C2,
        *window.size,
        *window.upsampled,
        *window.out,
        qweight.shape[1],
        first_blocks * 64 * bits // 8,
        0 if w_mult is None else w_mult.shape[1],
        first_blocks,
        **epilogue.arguments(M),
        KERNEL_H=window.kernel[0],
        KERNEL_W=window.kernel[1],
        STRIDE_H=window.stride[0],
        STRIDE_W=window.stride[1],
        PADDING_H=window.padding[0],
        PADDING_W=window.padding[1],
        DILATION_H=window.dilation[0],
        DILATION_W=window.dilation[1],
        ENLARGEMENT=window.enlargement,
        BLOCK_M=config.block_m,
        MASK_C=C % config.block_k != 0 or C2 % config.block_k != 0,
        SPLIT_FIRST=first_splits(splits, C, C2),
        **epilogue.tile_arguments(config, bits),
    )
