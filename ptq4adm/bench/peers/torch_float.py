"""PyTorch in float32: channels_last convolutions (oneDNN), linear layers (MKL)."""

from __future__ import annotations

import torch
from torch.nn import functional

from ptq4adm.bench.peers.base import FLOAT_TOLERANCE
from ptq4adm.bench.problem import Problem, Variant, convolve, nchw_rows


class TorchFloat:
    """`torch.nn.functional` on float32."""

    name = "torch-fp32"

    def missing(self) -> str | None:
        """None: the package depends on PyTorch."""
        return None

    def version(self) -> str:
        """PyTorch's."""
        return torch.__version__

    def variants(self, problem: Problem) -> list[Variant]:
        """One for every layer."""
        x, weight, bias = problem.x, problem.weight, problem.bias
        if problem.is_linear:
            return [
                Variant(
                    self.name,
                    lambda: functional.linear(x, weight, bias),
                    lambda y: y,
                    FLOAT_TOLERANCE,
                )
            ]
        return [
            Variant(
                self.name,
                lambda: convolve(problem.shape, x, weight, bias),
                nchw_rows,
                FLOAT_TOLERANCE,
            )
        ]
