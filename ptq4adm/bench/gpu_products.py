"""Variants of matrix products on a GPU: this package's, PyTorch's, and of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm import ops
from ptq4adm.bench.gpu_peers import gemlite_variants
from ptq4adm.bench.gpu_problem import FLOAT16_EXACT, SMALL, GpuProblem
from ptq4adm.bench.gpu_tiles import tile_of
from ptq4adm.bench.gpu_timing import GpuCall
from ptq4adm.bench.gpu_variant import (
    COPY,
    FLOAT,
    FP16,
    INT8,
    GpuVariant,
    check_close,
    check_equal,
)
from ptq4adm.bench.shapes import CONV1X1, LINEAR

QUANTIZE, INT_MM, FLOAT_GATED = "quantize", "torch-int-mm", "torch-fp16-geglu"
# plain rounding of normal weights to 4 bits alone costs 0.12 to 0.18
TOLERANCE = {4: 0.3, 8: 0.05}
FLOAT_TOLERANCE = 5e-3
_FLOAT32_EXACT = 1 << 24  # float32 holds every integer up to here


def product_variants(
    problem: GpuProblem, backends: tuple[str, ...], bits: tuple[int, ...] = (4, 8)
) -> list[GpuVariant]:
    """Every way to compute a layer; the float16 one first.

    Args:
        problem: its tensors.
        backends: of this package, at least one; the first one's quantizer is measured, as all for
            GPUs have the same.
        bits: of this package's weights.
    """
    variants = [_float(problem), _quantize(problem, backends[0])]
    for width in bits:
        for backend in backends:
            variants += _own(problem, width, backend)
    if problem.layer.is_gated:
        variants.append(_float_gated(problem))
        for backend in backends:
            variants += _gated(problem, backend)
    if int_mm_reason(problem) is None:
        variants.append(_int_mm(problem))
    return variants + gemlite_variants(problem)


def int_mm_reason(problem: GpuProblem) -> str | None:
    """Why `torch._int_mm` cannot compute a layer, or None: it takes rows only, by its own rules."""
    shape = problem.shape
    if problem.device.type != "cuda":
        return "needs a GPU"
    if shape.kind not in (LINEAR, CONV1X1):
        return "multiplies matrices only"
    if shape.M <= 16 or shape.K % 8 or shape.N % 8:
        return f"needs M > 16, K and N multiples of 8; got {shape.M}, {shape.K}, {shape.N}"
    return None


def _float(problem: GpuProblem) -> GpuVariant:
    return GpuVariant(
        FLOAT,
        GpuCall(problem.float_layer, (problem.x,)),
        lambda: check_close(
            _label(problem, FLOAT),
            problem.pick(problem.float_layer(0)),
            problem.float_rows,
            FLOAT_TOLERANCE,
        ),
        problem.shape.operations,
        _bytes(problem, 2, 2),
        FP16,
    )


def _quantize(problem: GpuProblem, backend: str) -> GpuVariant:
    def run(copy: int) -> Tensor:  # noqa: ARG001 - no weights
        x_q, _ = ops.quantize_int8(problem.x, x_scale=problem.x_scale, backend=backend)
        return x_q

    def check() -> float:
        check_equal(_label(problem, QUANTIZE), run(0), problem.x_q)
        return 0.0

    nbytes = 3 * problem.x.numel()
    call = GpuCall(run, (problem.x,))
    return GpuVariant(QUANTIZE, call, check, 0, nbytes, COPY, base="", backend=backend)


def _own(problem: GpuProblem, bits: int, backend: str) -> list[GpuVariant]:
    name, shape = f"w{bits}a8", problem.shape
    tile = tile_of(problem, bits, backend)

    def product(copy: int) -> Tensor:
        weight = problem.packed(bits, copy, backend)
        return problem.multiply(problem.x_q, weight, bits, bias=weight.bias, backend=backend)

    def whole(copy: int) -> Tensor:
        weight = problem.packed(bits, copy, backend)
        x_q, x_scale = ops.quantize_int8(problem.x, x_scale=problem.x_scale, backend=backend)
        return problem.multiply(
            x_q, weight, bits, bias=weight.bias, x_scale=x_scale, backend=backend
        )

    def check() -> float:
        check_accumulators(problem, bits, backend)
        return check_close(
            _label(problem, name),
            problem.pick(product(0)),
            problem.float_rows,
            TOLERANCE[bits],
        )

    def check_whole() -> float:
        return check_close(
            _label(problem, f"quantize+{name}"),
            problem.pick(whole(0)),
            problem.float_rows,
            TOLERANCE[bits],
        )

    def variant(name: str, run: Callable[[int], Tensor], check: Callable[[], float]) -> GpuVariant:
        first = problem.x_q if run is product else problem.x
        return GpuVariant(
            name,
            GpuCall(run, (first,)),
            check,
            shape.operations,
            _bytes(problem, 1 if run is product else 4, bits / 8),
            INT8,
            tile=tile,
            backend=backend,
        )

    return [variant(name, product, check), variant(f"quantize+{name}", whole, check_whole)]


def check_accumulators(problem: GpuProblem, bits: int, backend: str) -> None:
    """The integer sums of the checked rows, by the very kernel that is timed.

    Its output is float16. Sums of sparse activations are small integers, which that holds exactly;
    of full-range activations it holds the sum, rounded once.

    Raises:
        BenchmarkError: if one differs in any bit.
    """
    weight = problem.packed(bits, 0, backend)
    one, zeros = torch.ones(1, device=problem.device), torch.zeros_like(weight.bias)
    sparse = problem.sparse(bits)
    for x_q, scale in ((sparse, 1.0), (problem.x_q, SMALL)):
        scaled = replace(weight, w_scale=torch.full_like(weight.w_scale, scale), bias=zeros)
        got = problem.multiply(x_q, scaled, bits, bias=zeros, x_scale=one, backend=backend)
        exact = problem.exact_rows(bits, x_q)
        largest = FLOAT16_EXACT if x_q is sparse else _FLOAT32_EXACT
        assert int(exact.abs().max()) <= largest, "random sums grow with sqrt(K) only"
        expected = (exact.float() * scale).half()
        check_equal(_label(problem, f"w{bits}a8"), problem.pick(got), expected)


def _float_gated(problem: GpuProblem) -> GpuVariant:
    """The gated projection in float16: three calls."""
    shape = problem.shape

    def run(copy: int) -> Tensor:
        return gate(problem.float_layer(copy))

    def check() -> float:
        expected = gate(problem.float_rows)
        label = _label(problem, FLOAT_GATED)
        return check_close(label, problem.pick(run(0)), expected, FLOAT_TOLERANCE)

    return GpuVariant(
        FLOAT_GATED,
        GpuCall(run, (problem.x,)),
        check,
        shape.operations,
        _bytes(problem, 2, 2) - shape.M * shape.N,
        FP16,
        base=FLOAT_GATED,
    )


def _gated(problem: GpuProblem, backend: str) -> list[GpuVariant]:
    """The gated projection in one call, to float16 and to int8."""
    shape = problem.shape
    expected = gate(problem.float_rows)
    out_scale = (expected.abs().amax() / 127).float().reshape(1)
    tile = tile_of(problem, 4, backend, is_gated=True)

    def run(copy: int, out_scale: Tensor | None = None) -> Tensor:
        weight = problem.packed(4, copy, backend)
        return problem.multiply(
            problem.x_q,
            weight,
            4,
            bias=weight.bias,
            geglu=True,
            out_scale=out_scale,
            backend=backend,
        )

    def run_int8(copy: int) -> Tensor:
        return run(copy, out_scale)

    def check() -> float:
        label = _label(problem, "w4a8-geglu")
        return check_close(label, problem.pick(run(0)), expected, TOLERANCE[4])

    def check_int8() -> float:
        got = problem.pick(run_int8(0)).double() * out_scale
        return check_close(_label(problem, "w4a8-geglu-int8"), got, expected, TOLERANCE[4])

    def variant(
        name: str, run: Callable[[int], Tensor], check: Callable[[], float], out_bytes: int
    ) -> GpuVariant:
        nbytes = _bytes(problem, 1, 0.5) - 2 * shape.M * shape.N + out_bytes
        return GpuVariant(
            name,
            GpuCall(run, (problem.x_q,)),
            check,
            shape.operations,
            nbytes,
            INT8,
            base=FLOAT_GATED,
            tile=tile,
            backend=backend,
        )

    return [
        variant("w4a8-geglu", run, check, shape.M * shape.N),
        variant("w4a8-geglu-int8", run_int8, check_int8, shape.M * shape.N // 2),
    ]


def gate(y: Tensor) -> Tensor:
    """First half times gelu of the second, as a GEGLU."""
    value, gate = y.chunk(2, dim=-1)
    return value * functional.gelu(gate)


def _int_mm(problem: GpuProblem) -> GpuVariant:
    shape = problem.shape
    x_q = problem.x_q.reshape(shape.M, shape.K)
    weights: list[Tensor] = []

    def run(copy: int) -> Tensor:
        while len(weights) <= copy:
            weights.append(problem.quantized(8).reshape(shape.N, shape.K))
        return torch._int_mm(x_q, weights[copy].T)

    def check() -> float:
        check_equal(_label(problem, INT_MM), problem.pick(run(0)), problem.exact_rows(8))
        return 0.0

    nbytes = shape.M * shape.K + shape.N * shape.K + 4 * shape.M * shape.N
    return GpuVariant(INT_MM, GpuCall(run, (x_q,)), check, shape.operations, nbytes, INT8)


def _label(problem: GpuProblem, name: str) -> str:
    return f"{name} on {problem.shape}"


def _bytes(problem: GpuProblem, x_bytes: int, weight_bytes: float) -> int:
    """Activations and weights once, and a float16 output."""
    shape = problem.shape
    weights = int(weight_bytes * shape.N * shape.K)
    return x_bytes * problem.x.numel() + weights + 2 * shape.M * shape.N
