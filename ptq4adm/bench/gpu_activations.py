"""Variants of norms and gates on a GPU, with and without the quantization that follows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import ptq4adm.ops  # noqa: F401  (registers the operators)
from ptq4adm.bench.gpu_products import gate
from ptq4adm.bench.gpu_shapes import GEGLU, GROUP_NORM, GROUP_NORM_SILU, LAYER_NORM, GpuLayer
from ptq4adm.bench.gpu_timing import GpuCall
from ptq4adm.bench.gpu_variant import COPY, FLOAT, GpuVariant, check_close, check_steps

STATIC, DYNAMIC = "static", "dynamic"
FLOAT_NCHW = "torch-fp16-nchw"
GROUPS = 32
EPS = 1e-5
_TOLERANCE = 5e-3


def activation_variants(
    layer: GpuLayer, device: torch.device, *, backend: str, seed: int = 0
) -> list[GpuVariant]:
    """Float16 in PyTorch, and this package's kernels to int8 with a given and a measured scale.

    Args:
        layer: a norm or a gate.
        device: where.
        backend: of this package's kernels.
        seed: of the numbers.
    """
    problem = _Activation(layer, device, backend, seed)
    variants = [problem.float_variant(FLOAT, problem.x)]
    if problem.is_image:
        # PyTorch's norm rearranges channels_last memory first; a float model may avoid that
        variants.append(problem.float_variant(FLOAT_NCHW, problem.x.contiguous()))
    return [*variants, problem.own_variant(STATIC), problem.own_variant(DYNAMIC)]


class _Activation:
    """Tensors of one norm or gate."""

    def __init__(self, layer: GpuLayer, device: torch.device, backend: str, seed: int) -> None:
        self.shape, self.device, self.backend = layer.shape, device, backend
        self.kind = layer.shape.kind
        self.is_image = self.kind in (GROUP_NORM, GROUP_NORM_SILU)
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        shape, channels = self.shape, self.shape.in_channels
        if self.is_image:
            nhwc = normal(shape.batch, shape.height, shape.width, channels).half()
            self.x = nhwc.permute(0, 3, 1, 2)
        else:
            self.x = normal(shape.M, channels).half()
        self.weight = (1 + 0.1 * normal(channels)).half()
        self.bias = (0.1 * normal(channels)).half()
        self.expected = self._float(self.x.double(), self.weight.double(), self.bias.double())
        self.x_scale = (self.expected.abs().amax() / 127).float().reshape(1)

    def float_variant(self, name: str, x: Tensor) -> GpuVariant:
        """PyTorch's, on a memory format."""

        def run(copy: int) -> Tensor:  # noqa: ARG001 - weights are a few kilobytes
            return self._float(x, self.weight, self.bias)

        return GpuVariant(
            name,
            GpuCall(run, (x,)),
            lambda: check_close(self._label(name), run(0), self.expected, _TOLERANCE),
            0,
            self._bytes(2),
            COPY,
        )

    def own_variant(self, mode: str) -> GpuVariant:
        """This package's, in one operator."""
        x_scale = self.x_scale if mode == STATIC else None
        name = f"{self.kind}-int8-{mode}"

        def run(copy: int) -> Any:  # noqa: ARG001 - weights are a few kilobytes
            return self._quantizer(self.backend, x_scale)

        def check() -> float:
            return check_steps(
                self._label(name), run(0)[0], self._quantizer("reference", x_scale)[0]
            )

        return GpuVariant(
            f"ptq4adm-{mode}",
            GpuCall(run, (self.x,)),
            check,
            0,
            self._bytes(1),
            COPY,
            backend=self.backend,
        )

    def _float(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.is_image:
            y = functional.group_norm(x, GROUPS, weight, bias, EPS)
            return functional.silu(y) if self.kind == GROUP_NORM_SILU else y
        if self.kind == LAYER_NORM:
            return functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)
        return gate(x)

    def _quantizer(self, backend: str, x_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        return quantizer(
            self.kind, self.x, self.weight, self.bias, x_scale=x_scale, backend=backend
        )

    def _bytes(self, out: int) -> int:
        """Input once and output once."""
        written = self.x.numel() // (2 if self.kind == GEGLU else 1)
        return 2 * self.x.numel() + out * written

    def _label(self, name: str) -> str:
        return f"{name} on {self.kind} {tuple(self.x.shape)}"


def quantizer(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor, *, x_scale: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """The operator of a kind of layer.

    Args:
        kind: one of `gpu_shapes.ACTIVATION_KINDS`.
        x: NCHW, or rows.
        weight: of the norm, [C].
        bias: of the norm, [C].
        x_scale: float32 [1]; None measures it.
        backend: whose kernel.

    Returns:
        int8 and scale.
    """
    operators = torch.ops.ptq4adm
    keywords: dict[str, Any] = {"x_scale": x_scale, "backend": backend}
    if kind in (GROUP_NORM, GROUP_NORM_SILU):
        return operators.groupnorm_silu_quantize(
            x, GROUPS, weight, bias, EPS, silu=kind == GROUP_NORM_SILU, **keywords
        )
    if kind == LAYER_NORM:
        return operators.layernorm_quantize(x, weight, bias, EPS, **keywords)
    assert kind == GEGLU
    return operators.geglu_quantize(x, **keywords)


def compile_quantizer(layer: GpuLayer, *, is_static: bool) -> None:
    """Call the operator with memory without content, inside `kernels.launch.compile_only`."""
    shape = layer.shape
    if shape.kind in (GROUP_NORM, GROUP_NORM_SILU):
        size = (shape.batch, shape.height, shape.width, shape.in_channels)
        x = torch.empty(size, dtype=torch.float16).permute(0, 3, 1, 2)
    else:
        x = torch.empty((shape.M, shape.in_channels), dtype=torch.float16)
    vector = torch.empty(shape.in_channels, dtype=torch.float16)
    x_scale = torch.empty(1) if is_static else None
    quantizer(shape.kind, x, vector, vector, x_scale=x_scale, backend="triton")
