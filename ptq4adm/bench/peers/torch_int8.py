"""PyTorch's quantized operators on the engines FBGEMM and oneDNN: int8 weights, int8 activations.

Convolutions and FBGEMM's linear layers have static scales for input and output, as PyTorch's
post-training quantization makes them; their output is 8 bits wide, which spares them memory traffic
that this package's float32 output costs. oneDNN's linear layer is the dynamic one, with float input
and output. Activations keep to 7 bits, PyTorch's own default for these engines: without VNNI, pairs
of 8-bit products saturate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm.bench.peers.base import INT8_TOLERANCE, Affine
from ptq4adm.bench.problem import Problem, Variant, nchw_rows

_LEVELS = 127  # of activations: 7 bits
_OPERATORS = torch.ops.quantized


class TorchInt8:
    """`torch.ops.quantized` on one engine.

    Args:
        engine: ``fbgemm`` or ``onednn``.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.name = f"{engine}-int8"

    def missing(self) -> str | None:
        """A reason if this build of PyTorch lacks the engine."""
        engines = torch.backends.quantized.supported_engines
        if self.engine in engines:
            return None
        return (
            f"this PyTorch has no quantized engine {self.engine} (it has {', '.join(engines)}): "
            "install an x86-64 build"
        )

    def version(self) -> str:
        """PyTorch's, which the engine comes with."""
        return torch.__version__

    def variants(self, problem: Problem) -> list[Variant]:
        """One for every layer."""
        # packed weights remember their engine; the switch only says who packs
        torch.backends.quantized.engine = self.engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are announced as deprecated
            weight = _quantized_weight(problem.weight)
            if not problem.is_linear:
                return [self._static(problem, self._convolution(problem, weight), nchw_rows)]
            packed = _OPERATORS.linear_prepack(weight, problem.bias)
        if self.engine == "onednn":
            return [
                Variant(
                    self.name,
                    lambda: _OPERATORS.linear_dynamic(problem.x, packed, True),
                    lambda y: y,
                    INT8_TOLERANCE,
                )
            ]
        out = Affine.of(problem.expected)

        def multiply(x_q: Tensor) -> Tensor:
            return _OPERATORS.linear(x_q, packed, out.scale, out.zero_point)

        return [self._static(problem, multiply, lambda y: y)]

    def _static(
        self,
        problem: Problem,
        multiply: Callable[[Tensor], Tensor],
        rows: Callable[[Tensor], Tensor],
    ) -> Variant:
        affine, x = Affine.of(problem.x, levels=_LEVELS), problem.x

        def run() -> Tensor:
            x_q = torch.quantize_per_tensor(x, affine.scale, affine.zero_point, torch.quint8)
            return multiply(x_q)

        return Variant(self.name, run, lambda y: rows(y.dequantize()), INT8_TOLERANCE)

    def _convolution(self, problem: Problem, weight: Tensor) -> Callable[[Tensor], Tensor]:
        shape, padding = problem.shape, problem.padding
        packed: Any = _OPERATORS.conv2d_prepack(
            weight,
            problem.bias,
            [shape.stride, shape.stride],
            [padding, padding],
            [1, 1],
            1,
        )
        out = Affine.of(problem.expected)

        def convolve(x_q: Tensor) -> Tensor:
            if shape.is_upsampled:
                x_q = functional.interpolate(x_q, scale_factor=2.0, mode="nearest")
            return _OPERATORS.conv2d(x_q, packed, out.scale, out.zero_point)

        return convolve


def _quantized_weight(weight: Tensor) -> Tensor:
    """Symmetric int8 with one step an output channel."""
    scale = weight.flatten(1).abs().amax(dim=1) / 127
    zero_point = torch.zeros(weight.shape[0], dtype=torch.int64)
    return torch.quantize_per_channel(weight, scale.double(), zero_point, 0, torch.qint8)
