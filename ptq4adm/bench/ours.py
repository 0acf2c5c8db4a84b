"""This package's kernels as variants: the whole layer call, and its two parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4adm import ops
from ptq4adm.bench.problem import Problem, Variant
from ptq4adm.errors import BenchmarkError
from ptq4adm.ops import cpu, cpu_activation, reference
from ptq4adm.ops.arguments import Conv2dGeometry, Matmul, MatmulOptions
from ptq4adm.packing.layout import KLayout, pack_int4, weight_to_rows

OURS, MATMUL, QUANTIZE = "ptq4adm", "ptq4adm-matmul", "ptq4adm-quantize"
# plain rounding of normal weights to 4 bits alone costs 0.12 to 0.18
_TOLERANCE = {4: 0.3, 8: 0.05}


def own_variants(problem: Problem, *, bits: int, isa: str) -> list[Variant]:
    """The layer with static activation scale: quantize and multiply, and each alone.

    Args:
        problem: the layer.
        bits: 4 or 8, of the weight.
        isa: ``auto``, or an instruction set that the compiled module knows.

    Raises:
        ConfigError: if ``bits`` is neither 4 nor 8.
        BackendUnavailableError: if the compiled module is not built.
    """
    layer = _Layer(problem, bits, isa)
    return [
        Variant(OURS, layer.run, layer.rows, _TOLERANCE[bits], layer.check),
        Variant(MATMUL, layer.multiply, layer.rows, _TOLERANCE[bits]),
        Variant(QUANTIZE, layer.quantize, None, 0.0),
    ]


class _Layer:
    """Packed weight, scales and the calls."""

    def __init__(self, problem: Problem, bits: int, isa: str) -> None:
        self.problem, self.bits, self.isa = problem, bits, isa
        shape = problem.shape
        self.x = problem.x if problem.is_linear else problem.x.permute(0, 2, 3, 1)
        kernel = (shape.kernel, shape.kernel)
        weight = problem.weight.reshape(shape.N, shape.in_channels, *kernel)
        limit = 7 if bits == 4 else 127
        self.w_scale = weight.abs().amax(dim=(1, 2, 3)) / limit
        w_q = torch.round(weight / self.w_scale[:, None, None, None]).to(torch.int8)
        self.layout = KLayout((shape.in_channels,), kernel)
        rows = weight_to_rows(w_q.contiguous(), self.layout)
        self.canonical = pack_int4(rows) if bits == 4 else rows
        self.qweight = ops.prepack(self.canonical, bits=bits, layout=self.layout, backend="cpu")
        self.x_scale = self.x.abs().amax() / 127
        self.options = MatmulOptions(bias=problem.bias)
        upsample = shape.out_size if shape.is_upsampled else None
        padding = (problem.padding, problem.padding)
        stride = (shape.stride, shape.stride)
        self.geometry = Conv2dGeometry(kernel, stride, padding, upsample=upsample)
        self.x_q = self.quantize()

    def quantize(self) -> Tensor:
        x_q, _ = cpu_activation.quantize_int8(self.x, x_scale=self.x_scale, isa=self.isa)
        return x_q

    def multiply(self) -> Tensor:
        return self._product(self.x_q)

    def run(self) -> Tensor:
        return self._product(self.quantize())

    def rows(self, y: Tensor) -> Tensor:
        return y.reshape(-1, self.problem.shape.N)

    def check(self) -> None:
        """Quantized activations and int32 accumulators equal the reference's, bit for bit."""
        expected_q, _ = reference.quantize_int8(self.x, x_scale=self.x_scale)
        self._check_equal("quantized activations", self.x_q, expected_q)
        packed, canonical = self._call(self.x_q), self._call(self.x_q)
        canonical.qweight = self.canonical
        if self.problem.is_linear:
            got = cpu.accumulate_linear(packed, isa=self.isa)
            expected = reference.accumulate_linear(canonical)
        else:
            got = cpu.accumulate_conv2d(packed, self.geometry, isa=self.isa)
            expected = reference.accumulate_conv2d(canonical, self.geometry)
        self._check_equal("int32 accumulators", got[0], expected[0])

    def _check_equal(self, what: str, got: Tensor, expected: Tensor) -> None:
        if not torch.equal(got, expected):
            wrong = int((got != expected).sum())
            raise BenchmarkError(
                f"{self.problem.shape}, isa {self.isa!r}: {wrong} of {expected.numel()} {what} "
                "differ from the reference; nothing is timed, run the tests in tests/ops"
            )

    def _call(self, x_q: Tensor) -> Matmul:
        return Matmul(self.bits, x_q, self.x_scale, self.qweight, self.w_scale, self.options)

    def _product(self, x_q: Tensor) -> Tensor:
        if self.problem.is_linear:
            return cpu.linear(self._call(x_q), isa=self.isa)
        return cpu.conv2d(self._call(x_q), self.geometry, isa=self.isa)
