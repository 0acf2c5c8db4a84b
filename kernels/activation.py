"""What the activation kernels share: tiles of rows, and the scale that a tile is quantized with.

    x_scale = max(absmax, 1e-8) / 127            of the tensor or of each row, or given         (1)
    x_q     = clamp(rint_to_even(x * (1 / x_scale)), -127, 127)                     float32     (2)

The largest magnitude of a tensor needs two launches: every program of the first writes its own,
every program of the second reduces them all. No atomics, so nothing has to be zero before, and no
program waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ptq4adm.kernels.device import absmax_bits, load_scale, quantize, scale_of

# partial maxima that a kernel writes where it can choose: 4 KiB, which every program reads from L2
PARTIALS = 1024
# elements of a tile: 4 warps hold 16 each, two 16-byte loads of float16, in some 40 registers, so
# that twelve programs share a multiprocessor and hide each other's latency
TILE = 2048
# elements of the longest row that stays in registers: 8 warps hold 32 each
LONGEST_ROW = 8192
# elements of a thread of a tile; a longer row asks for more warps first, then for more of these
_PER_THREAD = 16
_MOST_WARPS = 8
_LEAST_COLUMNS = 16


@dataclass(slots=True)
class Scale:
    """Where a kernel finds the scale in use, or where it writes the measured one.

    Attributes:
        out: float32, the scale in use is written here: one element, or one a row.
        table: float32, one scale or a table [T]; None measures.
        step: int64, one element, the row of the table; None if there is one scale.
        partials: int32, ``absmax_bits`` of parts of the tensor; None unless a tensor is measured.
    """

    out: Tensor
    table: Tensor | None = None
    step: Tensor | None = None
    partials: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of these names of every kernel."""
        return {
            "scale_ptr": self.out,
            "x_scale_ptr": self.table,
            "table_size": 0 if self.table is None else self.table.numel(),
            "step_ptr": self.step,
        }

    def partial_arguments(self) -> dict[str, Any]:
        """Those of a kernel whose scale is measured of a tensor."""
        count = 0 if self.partials is None else self.partials.numel()
        return {
            "partials_ptr": self.partials,
            "partials": count,
            "PARTIALS": min(triton.next_power_of_2(max(count, 1)), PARTIALS),
        }


@dataclass(frozen=True, slots=True)
class RowTile:
    """How rows are cut into programs.

    Attributes:
        rows: of a tile, a power of two.
        columns: of a tile, a power of two.
        num_warps: of a program.
    """

    rows: int
    columns: int
    num_warps: int

    def arguments(self) -> dict[str, int]:
        """The kernels' and the launch's arguments of these names."""
        return {"BLOCK_M": self.rows, "BLOCK_K": self.columns, "num_warps": self.num_warps}


def plan_rows(M: int, K: int) -> RowTile:
    """Return the tile of a kernel that needs whole rows, of K elements.

    A row up to ``LONGEST_ROW`` is one tile, and short ones share a tile; a longer row is walked in
    tiles of a quarter of that, whose second reading finds them in the cache.
    """
    columns = max(triton.next_power_of_2(K), _LEAST_COLUMNS)
    if columns > LONGEST_ROW:
        columns = LONGEST_ROW // 4
    rows = max(TILE // columns, 1)
    # fewer rows than a tile has: a smaller tile
    rows = min(rows, triton.next_power_of_2(max(M, 1)))
    return RowTile(rows, columns, _warps(rows * columns))


def plan_elements(M: int, K: int) -> RowTile:
    """Return the tile of a kernel that takes rows [M, K] piece by piece; see ``TILE``."""
    columns = min(max(triton.next_power_of_2(K), _LEAST_COLUMNS), TILE)
    rows = min(TILE // columns, triton.next_power_of_2(max(M, 1)))
    return RowTile(rows, columns, _warps(rows * columns))


def _warps(elements: int) -> int:
    return min(max(elements // (32 * _PER_THREAD), 1), _MOST_WARPS)


@triton.jit
def load_rows(x_ptr, offs_m, offs_k, M, K, row_stride):
    """Float32 [BLOCK_M, BLOCK_K] of rows [M, K]; what lies outside is zero, and no maximum."""
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * row_stride + offs_k[None, :], mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_rows(y, scale, x_q_ptr, offs_m, offs_k, M, K):
    """Quantize a tile of rows and store it into contiguous int8 [M, K]: equation (2)."""
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    tl.store(x_q_ptr + offs_m[:, None] * K + offs_k[None, :], quantize(y, scale), mask=mask)


@triton.jit
def row_absmax(y):
    """Largest ``absmax_bits`` of each row: int32 [BLOCK_M, 1]."""
    return tl.max(absmax_bits(y), axis=1)[:, None]


@triton.jit
def row_scale(bits, scale_ptr, offs_m, M):
    """Scale of each row, float32 [BLOCK_M, 1], from its ``row_absmax``; writes it to [M]."""
    scale = scale_of(bits)
    tl.store(scale_ptr + offs_m[:, None], scale, mask=(offs_m < M)[:, None])
    return scale


@triton.jit
def given_scale(scale_ptr, x_scale_ptr, table_size, step_ptr):
    """The given scale of a tensor, a scalar; the first program writes it out."""
    scale = load_scale(x_scale_ptr, step_ptr, table_size)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(scale_ptr, scale)
    return scale


@triton.jit
def measured_scale(scale_ptr, partials_ptr, partials, PARTIALS: tl.constexpr):
    """The scale of a tensor from the maxima of its parts; the first program writes it out."""
    offs = tl.arange(0, PARTIALS)
    bits = tl.zeros((PARTIALS,), dtype=tl.int32)
    for first in range(0, partials, PARTIALS):
        part = tl.load(partials_ptr + first + offs, mask=first + offs < partials, other=0)
        bits = tl.maximum(bits, part)
    scale = scale_of(tl.max(bits, axis=0))
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(scale_ptr, scale)
    return scale
