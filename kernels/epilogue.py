"""From int32 accumulators of a tile to stored outputs; shared by every matrix product.

    y[m, n] = (acc1 * x_scale1 [+ acc2 * x_scale2]) * w_scale[n]
              + bias[n] (+ temb[b, n]) (+ residual[m, n])                           float32     (1)

then optionally the gated GELU and the quantization for the next layer. Tiles are transposed, as
[channels, rows], because the weight is the A operand of the tensor cores. Each rounding is the
reference's, in its order, so that results are equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ptq4adm.kernels.device import gelu, load_scale, quantize
from ptq4adm.kernels.tuning import TileConfig

# arguments of every kernel: single numbers, whatever their address, and sizes of tables
SCALE_POINTERS = ["x_scale_ptr", "x2_scale_ptr", "out_scale_ptr", "step_ptr"]
SCALE_SIZES = ["x_table", "x2_table", "out_table", "rows_per_sample"]


@dataclass(slots=True)
class Epilogue:
    """What a matrix product does with its accumulators; every tensor contiguous, on one device.

    Attributes:
        x_scale: float32, one scale, one a row [M], or a table with ``step``.
        w_scale: float32 [N].
        out: [M, N] (N / 2 if gated) float32, float16, bfloat16 or int8; int32 stores the
            accumulators instead and nothing else is applied.
        out2: int32 [M, N], the second segment's accumulators; with int32 ``out`` only.
        x2_scale: as ``x_scale``, of the second segment.
        step: int64, one element: the row of every table.
        bias: float [N].
        temb: float [B, N], added to rows m with b = m // (M / B).
        residual: float [M, N].
        out_scale: float32, one scale or a table; needs int8 ``out``.
        is_gated: first half of the channels times gelu of the second half.
    """

    x_scale: Tensor
    w_scale: Tensor
    out: Tensor
    out2: Tensor | None = None
    x2_scale: Tensor | None = None
    step: Tensor | None = None
    bias: Tensor | None = None
    temb: Tensor | None = None
    residual: Tensor | None = None
    out_scale: Tensor | None = None
    is_gated: bool = False

    def arguments(self, rows: int) -> dict[str, Any]:
        """The kernels' arguments of these names, for a product of ``rows`` rows."""
        return {
            "out_ptr": self.out,
            "out2_ptr": self.out2,
            "x_scale_ptr": self.x_scale,
            "x_table": self.x_scale.numel(),
            "x2_scale_ptr": self.x2_scale,
            "x2_table": 0 if self.x2_scale is None else self.x2_scale.numel(),
            "out_scale_ptr": self.out_scale,
            "out_table": 0 if self.out_scale is None else self.out_scale.numel(),
            "step_ptr": self.step,
            "w_scale_ptr": self.w_scale,
            "bias_ptr": self.bias,
            "temb_ptr": self.temb,
            "rows_per_sample": 1 if self.temb is None else rows // self.temb.shape[0],
            "residual_ptr": self.residual,
            "X_SCALE": self._form(self.x_scale),
            "X2_SCALE": self._form(self.x2_scale),
            "OUT_SCALE": self._form(self.out_scale),
            "IS_GATED": self.is_gated,
        }

    def channel_tiles(self, N: int, config: TileConfig) -> int:
        """How many tiles the channels make: a gated one gives half as many results."""
        halves = 2 if self.is_gated else 1
        return -(-(N // halves) // (config.block_n // halves))

    def tile_arguments(self, config: TileConfig, bits: int) -> dict[str, Any]:
        """The arguments of these names that every kernel and its launch take of a tile."""
        return {
            "BITS": bits,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "SPLIT_K": config.split_k,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": self.most_registers(config),
        }

    def most_registers(self, config: TileConfig) -> int | None:
        """Registers a thread may have so that two programs of 8 warps share a multiprocessor.

        Left alone, ptxas takes more than the 128 that are enough (tests/kernels/test_compile.py).
        Of a float32 residual it would spill, which is no better than one program.
        """
        is_narrow = self.residual is None or self.residual.element_size() <= 2
        fits = config.num_warps == 8 and config.block_m * config.block_n <= 128 * 128
        return 128 if fits and is_narrow else None

    def _form(self, scale: Tensor | None) -> str:
        """What a scale's elements are: ``none``, the ``one``, a ``table``, or one a ``row``."""
        if scale is None:
            return "none"
        if scale.numel() == 1:
            return "one"
        return "row" if self.step is None else "table"


@triton.jit
def scaled_accumulator(
    acc,  # int32 [BLOCK_N, BLOCK_M]
    scale_ptr,  # fp32
    table_size,
    step_ptr,  # int64 [1]
    offs_m,  # [BLOCK_M]
    mask_m,  # [BLOCK_M]
    SCALE: tl.constexpr,
    DESCALE: tl.constexpr,
):
    """Float32 of one segment: acc * x_scale, with the decoder's factor of 16 taken back."""
    if SCALE == "row":
        scale = tl.load(scale_ptr + offs_m, mask=mask_m, other=0.0)[None, :]
    elif SCALE == "table":
        scale = load_scale(scale_ptr, step_ptr, table_size)
    else:
        scale = tl.load(scale_ptr)
    # a power of two: the product is the one of the undivided numbers, bit for bit
    return acc.to(tl.float32) * (scale * DESCALE)


@triton.jit
def finish_tile(
    acc,  # int32 [BLOCK_N, BLOCK_M]
    acc2,  # the second segment's, or None
    # which elements
    offs_n,  # [BLOCK_N], channel of each row of the tile
    tile_n,  # of the tile
    offs_m,  # [BLOCK_M]
    mask_m,  # [BLOCK_M]
    N,
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
    # of the kernel
    BITS: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Apply equation (1) of the module to a tile and store it."""
    mask_n = offs_n < N
    mask = mask_n[:, None] & mask_m[None, :]
    offs = offs_m[None, :] * N + offs_n[:, None]
    # decode_int4 leaves 16 * w
    SHIFT: tl.constexpr = 4 if BITS == 4 and not IS_GROUPED else 0
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_ptr + offs, acc >> SHIFT, mask=mask)
        if acc2 is not None:
            tl.store(out2_ptr + offs, acc2 >> SHIFT, mask=mask)
    else:
        DESCALE: tl.constexpr = 0.0625 if SHIFT == 4 else 1.0
        y = scaled_accumulator(
            acc, x_scale_ptr, x_table, step_ptr, offs_m, mask_m, X_SCALE, DESCALE
        )
        if acc2 is not None:
            y += scaled_accumulator(
                acc2, x2_scale_ptr, x2_table, step_ptr, offs_m, mask_m, X2_SCALE, DESCALE
            )
        y *= tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        if temb_ptr is not None:
            y = add_temb(y, temb_ptr, offs_n, mask_n, offs_m, mask_m, rows_per_sample, N)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if IS_GATED:
            y = gate_tile(y, BLOCK_N, BLOCK_M)
            offs_half = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            mask = (offs_half < N // 2)[:, None] & mask_m[None, :]
            offs = offs_m[None, :] * (N // 2) + offs_half[:, None]
        if OUT_SCALE != "none":
            if OUT_SCALE == "table":
                scale = load_scale(out_scale_ptr, step_ptr, out_table)
            else:
                scale = tl.load(out_scale_ptr)
            tl.store(out_ptr + offs, quantize(y, scale), mask=mask)
        else:
            tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_temb(y, temb_ptr, offs_n, mask_n, offs_m, mask_m, rows_per_sample, N):
    """Add temb [B, N] to a tile, sample by sample: nearly always there is one.

    A tile of its values would take as many registers as the sums, and no second program would find
    room on the multiprocessor.
    """
    first = tl.min(offs_m) // rows_per_sample
    last = tl.max(tl.where(mask_m, offs_m, 0)) // rows_per_sample
    for sample in tl.range(first, last + 1, num_stages=1):
        temb = tl.load(temb_ptr + sample * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        row = offs_m - sample * rows_per_sample
        is_inside = (row >= 0) & (row < rows_per_sample)
        y = tl.where(is_inside[None, :], y + temb[:, None], y)
    return y


@triton.jit
def tile_channels(tile_n, N, BLOCK_N: tl.constexpr, IS_GATED: tl.constexpr):
    """Output channel of each row of a tile, [BLOCK_N].

    For a gated product, rows come as eight values, their eight gates, eight values ...: a thread of
    the tensor core's result holds rows r and r + 8, so it holds a value with its gate, and gating
    needs no exchange. Rows without a channel are N or more.
    """
    row = tl.arange(0, BLOCK_N)
    if IS_GATED:
        channel = tile_n * (BLOCK_N // 2) + (row // 16) * 8 + row % 8
        is_inside = channel < N // 2
        return tl.where(is_inside, channel + (row // 8 % 2) * (N // 2), N)
    return tile_n * BLOCK_N + row


@triton.jit
def gate_tile(y, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Value * gelu(gate) of a tile in the order of ``tile_channels``: [BLOCK_N / 2, BLOCK_M]."""
    pairs = y.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1)
    value, gate = pairs.split()
    return (value * gelu(gate)).reshape(BLOCK_N // 2, BLOCK_M)
