"""W4A8 and W8A8 matrix products: int8 rows times packed weights, int32 accumulation.

    acc[m, n] = sum_k x_q[m, k] * w_q[n, k]                                                    (1)

The weight lies in the canonical order of ``ptq4adm.packing.layout``, so nothing is repacked:

    64 k of one channel, 32 bytes:  byte j   | w_q[n, j + 32] | w_q[n, j] |
                                               bits 7..4        bits 3..0

The product is computed transposed, acc^T = W X^T: as the first operand of the tensor core, decoded
weights stay in registers. Joining low and high nibbles to 64 consecutive k moves no register
either: 32 k are one step of the tensor core.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ptq4adm.kernels.device import decode_int4, decode_int4_groups
from ptq4adm.kernels.epilogue import (
    SCALE_POINTERS,
    SCALE_SIZES,
    Epilogue,
    finish_tile,
    tile_channels,
)
from ptq4adm.kernels.launch import launch
from ptq4adm.kernels.split_k import first_splits, store_partial, sum_partials, workspace
from ptq4adm.kernels.tuning import TileConfig


@triton.jit
def load_weight_tile(
    row_ptr,  # [BLOCK_N, 1], first byte of each channel's k range
    mult_ptr,  # [BLOCK_N, 1], first multiplier of the same range, or None
    mask_n,  # [BLOCK_N]
    k_left,  # k that are left in the range
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
):
    """Load and decode int8 [BLOCK_N, BLOCK_K]; 4-bit weights without groups times 16."""
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 1
    GROUPS: tl.constexpr = BLOCK_K // 64
    offs = tl.arange(0, BLOCK_K // PER_BYTE)[None, :]
    mask = mask_n[:, None]
    if MASK_K:
        # missing weights are zero, so whatever activations they meet adds nothing
        mask = mask & (offs < k_left // PER_BYTE)
    packed = tl.load(row_ptr + offs, mask=mask, other=0)
    if BITS == 8:
        w_q = packed
    else:
        if mult_ptr is None:
            low, high = decode_int4(packed)
        else:
            group = tl.arange(0, GROUPS)[None, :]
            mask = mask_n[:, None]
            if MASK_K:
                mask = mask & (group < k_left // 64)
            multiplier = tl.load(mult_ptr + group, mask=mask, other=1).to(tl.int32)
            offset = (128 - 8 * multiplier) * 0x01010101
            shape: tl.constexpr = (BLOCK_N, GROUPS, 32)
            multiplier = multiplier[:, :, None].broadcast_to(shape).reshape(BLOCK_N, BLOCK_K // 2)
            offset = offset[:, :, None].broadcast_to(shape).reshape(BLOCK_N, BLOCK_K // 2)
            low, high = decode_int4_groups(packed, multiplier, offset)
        low = low.reshape(BLOCK_N, GROUPS, 32)
        high = high.reshape(BLOCK_N, GROUPS, 32)
        w_q = tl.join(low, high).permute(0, 1, 3, 2).reshape(BLOCK_N, BLOCK_K)
    return w_q


@triton.jit
def accumulate_rows(
    x_ptr,  # int8 [M, K]
    qweight_ptr,  # at the first k of this segment
    mult_ptr,  # uint8, the same, or None
    offs_m,  # [BLOCK_M]
    mask_m,
    offs_n,  # [BLOCK_N]
    mask_n,
    K,  # of this segment
    row_bytes,  # of the weight
    row_groups,  # multipliers a channel
    first_step,  # of BLOCK_K
    last_step,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
):
    """Equation (1) over the steps first_step .. last_step - 1 of a segment: int32, transposed."""
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 1
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    rows = x_ptr + offs_m[:, None] * K
    channels = qweight_ptr + offs_n[:, None] * row_bytes
    multipliers = None
    if mult_ptr is not None:
        multipliers = mult_ptr + offs_n[:, None] * row_groups
    k_padded = (K + 63) // 64 * 64
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in range(first_step, last_step):
        k = step * BLOCK_K
        mask_x = mask_m[:, None]
        if MASK_K:
            mask_x = mask_x & (offs_k < K - k)
        x_q = tl.load(rows + (k + offs_k), mask=mask_x, other=0)
        w_q = load_weight_tile(
            channels + k // PER_BYTE,
            None if mult_ptr is None else multipliers + k // 64,
            mask_n,
            k_padded - k,
            BITS,
            BLOCK_N,
            BLOCK_K,
            MASK_K,
        )
        acc = tl.dot(w_q, x_q.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit(
    # other values, or addresses, of these do not make another kernel
    do_not_specialize=["M", *SCALE_SIZES],
    do_not_specialize_on_alignment=SCALE_POINTERS,
)
def _gemm_kernel(
    # tensors
    x_ptr,  # int8  [M, K]
    x2_ptr,  # int8  [M, K2], or None
    qweight_ptr,  # uint8 [N, row_bytes] (4 bits) or int8
    w_mult_ptr,  # uint8 [N, row_bytes / 32], or None
    slab_ptr,  # int32, with SPLIT_K > 1
    counter_ptr,  # int32 [tiles], with SPLIT_K > 1
    # sizes
    M,
    N,
    K,
    K2,
    row_bytes,  # its own argument: computed here, it would lose its alignment
    second_byte,  # of a weight row, where the second segment begins
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
    # tile, chosen by the launcher
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SPLIT_FIRST: tl.constexpr,  # splits of the first segment
):
    # --- which tile -------------------------------------------------------------------------
    tile = tl.program_id(0)
    split = tl.program_id(1)
    # channels fastest: programs that run together read the same rows
    ROWS_N: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    N_OUT = N // 2 if IS_GATED else N
    tiles_n = tl.cdiv(N_OUT, ROWS_N)
    tile_n = tile % tiles_n
    offs_m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_n = tile_channels(tile_n, N, BLOCK_N, IS_GATED)
    mask_n = offs_n < N

    # --- main loop over k -------------------------------------------------------------------
    steps = tl.cdiv(K, BLOCK_K)
    second_mult_ptr = None if w_mult_ptr is None else w_mult_ptr + tl.cdiv(K, 64)
    acc2 = None
    if SPLIT_K == 1:
        acc = accumulate_rows(
            x_ptr, qweight_ptr, w_mult_ptr, offs_m, mask_m, offs_n, mask_n, K, row_bytes,
            row_groups, 0, steps, BITS, BLOCK_M, BLOCK_N, BLOCK_K, MASK_K,
        )  # fmt: skip
        if x2_ptr is not None:
            acc2 = accumulate_rows(
                x2_ptr, qweight_ptr + second_byte, second_mult_ptr, offs_m, mask_m, offs_n, mask_n,
                K2, row_bytes, row_groups, 0, tl.cdiv(K2, BLOCK_K), BITS, BLOCK_M, BLOCK_N, BLOCK_K,
                MASK_K,
            )  # fmt: skip
        is_last = True
    else:
        # one loop whatever the segment: a second one would take shared memory of its own
        segment_x = x_ptr
        segment_w = qweight_ptr
        segment_mult = w_mult_ptr
        segment_k = K
        segment_split = split
        share = tl.cdiv(steps, SPLIT_FIRST)
        if x2_ptr is not None:
            if split >= SPLIT_FIRST:
                segment_x = x2_ptr
                segment_w = qweight_ptr + second_byte
                if w_mult_ptr is not None:
                    segment_mult = second_mult_ptr
                segment_k = K2
                segment_split = split - SPLIT_FIRST
                steps = tl.cdiv(K2, BLOCK_K)
                share = tl.cdiv(steps, SPLIT_K - SPLIT_FIRST)
        acc = accumulate_rows(
            segment_x, segment_w, segment_mult, offs_m, mask_m, offs_n, mask_n, segment_k,
            row_bytes, row_groups, segment_split * share,
            tl.minimum(segment_split * share + share, steps), BITS, BLOCK_M, BLOCK_N, BLOCK_K,
            MASK_K,
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


def gemm(
    x_q: Tensor,
    qweight: Tensor,
    epilogue: Epilogue,
    config: TileConfig,
    *,
    bits: int,
    x2_q: Tensor | None = None,
    w_mult: Tensor | None = None,
) -> None:
    """Multiply rows by a packed weight into ``epilogue.out``: ``w4a8_gemm`` and ``w8a8_gemm``.

    Sizes and dtypes are the caller's to check (``ptq4adm.ops``); every tensor is contiguous.

    Args:
        x_q: int8 [M, K].
        qweight: canonical, uint8 [N, Kp / 2] (4 bits) or int8 [N, Kp].
        epilogue: what becomes of the accumulators, and the output.
        config: a legal tile.
        bits: 4 or 8.
        x2_q: int8 [M, K2], the second K segment.
        w_mult: uint8 [N, Kp / 64], multipliers of groups of 64 weights (4 bits only).
    """
    M, K = x_q.shape
    N = qweight.shape[0]
    K2 = 0 if x2_q is None else x2_q.shape[1]
    per_byte = 2 if bits == 4 else 1
    blocks = -(-K // 64)
    tiles = -(-M // config.block_m) * epilogue.channel_tiles(N, config)
    splits = config.split_k
    slabs, counters = workspace(x_q.device, splits, tiles, config.block_m * config.block_n)
    launch(
        _gemm_kernel,
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
        K,
        K2,
        qweight.shape[1],
        blocks * 64 // per_byte,
        0 if w_mult is None else w_mult.shape[1],
        **epilogue.arguments(M),
        BLOCK_M=config.block_m,
        MASK_K=K % config.block_k != 0 or K2 % config.block_k != 0,
        SPLIT_FIRST=first_splits(splits, K, K2),
        **epilogue.tile_arguments(config, bits),
    )
