"""One product that the tuner measures: its tensors, the check of its tiles, its columns.

The check uses the kernel that is timed, not another one with integer output: with all scales 1 and
sparse activations every sum is a small integer, which float16 holds exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4adm.bench.gpu_backends import TRITON
from ptq4adm.bench.gpu_calls import ProductCall, Tile, layer_layout, layer_options, make_call
from ptq4adm.bench.gpu_precompile import Wanted
from ptq4adm.bench.gpu_problem import FLOAT16_EXACT, SMALL, GpuProblem
from ptq4adm.bench.gpu_products import gate
from ptq4adm.bench.gpu_shapes import GpuLayer
from ptq4adm.bench.gpu_tiles import describe, tile_columns
from ptq4adm.bench.gpu_timing import GpuCall
from ptq4adm.bench.gpu_variant import check_close, check_equal
from ptq4adm.errors import BenchmarkError
from ptq4adm.kernels.tuning import Problem, TileConfig
from ptq4adm.ops.prepack import prepack
from ptq4adm.packing.layout import BLOCK_K, pack_int4, weight_to_rows

_GATE_TOLERANCE = 5e-3


@dataclass(frozen=True)
class Product:
    """One problem, with a layer that poses it.

    Attributes:
        layer: the sizes.
        bits: of the weight.
        is_gated: with GEGLU.
        problem: what its tile is chosen by.
        backend: whose tiles.
    """

    layer: GpuLayer
    bits: int
    is_gated: bool
    problem: Problem
    backend: str = TRITON

    def wanted(self, tile: Tile) -> list[Wanted]:
        """What Triton has to compile for a tile."""
        if not isinstance(tile, TileConfig):
            return []
        is_grouped = self.problem.is_grouped
        return [Wanted(self.layer, tile, self.bits, self.is_gated, is_grouped=is_grouped)]

    @property
    def name(self) -> str:
        """Kernel and sizes, for people."""
        gated = " geglu" if self.is_gated else ""
        grouped = " groups" if self.problem.is_grouped else ""
        return f"{self.problem.kernel} {self.layer.shape}{gated}{grouped}"

    def columns(self) -> dict[str, Any]:
        """Columns that begin a row."""
        problem = self.problem
        return {
            "kernel": problem.kernel,
            "shape": str(self.layer.shape),
            "gated": int(self.is_gated),
            "grouped": int(problem.is_grouped),
            "M": problem.M,
            "N": problem.N,
            "K": problem.K,
        }

    def last_columns(self, tile: Tile | None = None) -> dict[str, Any]:
        """Columns that end a row."""
        return tile_columns(self.backend, tile)


class Operands:
    """Activations and copies of the weight of one product, and the check of its tiles.

    Args:
        product: what is multiplied.
        device: where.

    Raises:
        Exception: whatever making tensors on the device runs into.
    """

    def __init__(self, product: Product, device: torch.device) -> None:
        self.product = product
        self.problem = problem = GpuProblem(product.layer, device)
        # 8-bit weights get the 4-bit values: the check's sums have to stay small
        self.w_q = problem.quantized(4)
        layout = layer_layout(product.layer)
        rows = weight_to_rows(self.w_q, layout)
        canonical = pack_int4(rows) if product.bits == 4 else rows
        self.copies = [
            prepack(canonical, bits=product.bits, layout=layout, backend=product.backend)
        ]
        # multipliers of 1 leave the exact sums as they are; that others are right is tested
        groups = (problem.shape.N, rows.shape[1] // BLOCK_K)
        self.w_mult = (
            torch.ones(groups, dtype=torch.uint8, device=device)
            if product.problem.is_grouped
            else None
        )
        self.sparse = problem.sparse(4)
        self.zeros = torch.zeros(problem.shape.N, device=device)
        self.ones = torch.ones(problem.shape.N, device=device)
        self.small = self.ones * SMALL
        self.outputs: list[Tensor] = []

    def call(self, x_q: Tensor, copy: int) -> ProductCall:
        """The product of one copy: of sparse activations with all scales 1."""
        while len(self.copies) <= copy:
            self.copies.append(self.copies[0].clone())
        return make_call(
            self.product.layer,
            self.product.bits,
            x_q=x_q,
            qweight=self.copies[copy],
            w_scale=self.ones if x_q is self.sparse else self.small,
            options=layer_options(self.zeros, w_mult=self.w_mult, is_gated=self.product.is_gated),
            backend=self.product.backend,
        )

    def timed(self, config: Tile) -> GpuCall:
        """What is timed."""
        x_q = self.problem.x_q
        return GpuCall(lambda copy: self.call(x_q, copy).run(config), (x_q,))

    def check(self, config: Tile) -> None:
        """Compare with exact integers, and with the first right tile in every bit.

        Raises:
            BenchmarkError: if one differs.
        """
        outputs = [self.call(x_q, 0).run(config) for x_q in (self.sparse, self.problem.x_q)]
        label = f"{self.product.name}, {describe(config)}"
        if not self.outputs:
            exact = self.problem.exact_rows(4, self.sparse)
            assert int(exact.abs().max()) <= FLOAT16_EXACT, "sums were to be small"
            got = self.problem.pick(outputs[0])
            if self.product.is_gated:
                check_close(label, got, gate(exact.double()), _GATE_TOLERANCE)
            else:
                check_equal(label, got, exact)
            self.outputs = outputs
        for got, expected in zip(outputs, self.outputs, strict=True):
            if not torch.equal(got, expected):
                raise BenchmarkError(
                    f"{label}: differs from the result of the first right tile; it is not used, "
                    "run pytest -m gpu"
                )
