"""One layer's tensors, and what a variant of its computation is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm.bench.shapes import LINEAR, LayerShape
from ptq4adm.errors import BenchmarkError


@dataclass(frozen=True)
class Problem:
    """Activations, weight and bias of one layer, and the result in float64.

    Attributes:
        shape: the sizes.
        x: float32 [M, K], or [B, C, H, W] in channels_last memory.
        weight: float32 [N, K], or [N, C, kh, kw].
        bias: float32 [N].
        expected: float32 [M, N], rows in the order (b, h, w), computed in float64.
        threads: how many every variant may use.
    """

    shape: LayerShape
    x: Tensor
    weight: Tensor
    bias: Tensor
    expected: Tensor
    threads: int

    @classmethod
    def random(cls, shape: LayerShape, *, threads: int, seed: int = 0) -> Problem:
        """Normal weights; activations as a layer sees them: SiLU of normal ones for convolutions.

        Args:
            shape: the sizes.
            threads: kept for the variants.
            seed: of the numbers.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        bias = 0.1 * normal(shape.N)
        if shape.kind == LINEAR:
            x = normal(shape.M, shape.K)
            weight = normal(shape.N, shape.K) * shape.K**-0.5
            exact = functional.linear(x.double(), weight.double(), bias.double())
            return cls(shape, x, weight, bias, exact.float(), threads)
        x = functional.silu(normal(shape.batch, shape.height, shape.width, shape.in_channels))
        x = x.permute(0, 3, 1, 2)
        kernel = (shape.kernel, shape.kernel)
        weight = normal(shape.N, shape.in_channels, *kernel) * shape.K**-0.5
        weight = weight.contiguous(memory_format=torch.channels_last)
        exact = convolve(shape, x.double(), weight.double(), bias.double())
        return cls(shape, x, weight, bias, nchw_rows(exact).float(), threads)

    @property
    def is_linear(self) -> bool:
        """Whether the layer is a linear one."""
        return self.shape.kind == LINEAR

    @property
    def padding(self) -> int:
        """Zeros around the input."""
        return self.shape.kernel // 2


def convolve(shape: LayerShape, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The float convolution [B, N, Ho, Wo], after the nearest-neighbour enlargement if any."""
    if shape.is_upsampled:
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    return functional.conv2d(x, weight, bias, shape.stride, shape.kernel // 2)


def nchw_rows(y: Tensor) -> Tensor:
    """[B, N, Ho, Wo] as [M, N]."""
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])


@dataclass(frozen=True)
class Variant:
    """One way to compute a layer.

    Attributes:
        name: column of the tables, such as ``fbgemm-int8``.
        run: the timed call.
        rows: what `run` returned as float32 [M, N]; None for a part of the work without a result.
        tolerance: largest RMS error, relative to the RMS of the float result.
        extra_checks: raise `BenchmarkError` where more than closeness is asked for.
    """

    name: str
    run: Callable[[], Any]
    rows: Callable[[Any], Tensor] | None
    tolerance: float
    extra_checks: Callable[[], None] | None = None


def check_variant(variant: Variant, problem: Problem) -> float:
    """Compare a variant's result with the float one; nothing is timed before.

    Returns:
        The relative RMS error; 0 for a variant without a result.

    Raises:
        BenchmarkError: if the result has another shape, is not finite or not close.
    """
    if variant.extra_checks is not None:
        variant.extra_checks()
    if variant.rows is None:
        return 0.0
    got = variant.rows(variant.run())
    if got.shape != problem.expected.shape:
        raise BenchmarkError(
            f"{variant.name} on {problem.shape}: result {list(got.shape)}, expected "
            f"{list(problem.expected.shape)}; it computes something else and is not timed"
        )
    error = relative_error(got, problem.expected)
    if not error <= variant.tolerance:  # NaN fails as well
        raise BenchmarkError(
            f"{variant.name} on {problem.shape}: relative error {error:.3g} is above "
            f"{variant.tolerance:.3g}; the result is wrong and is not timed"
        )
    return error


def relative_error(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected, in float64."""
    difference = (got.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt())
