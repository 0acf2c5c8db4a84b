"""Registers one Python function per operator that calls the named backend's function.

The functions are plain and registered by separate calls; the schemas are in ``schema.py``. Every
operator is registered for CPU and CUDA tensors: ``backend`` decides what runs, not the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ptq4adm.errors import UnknownBackendError
from ptq4adm.ops import (
    cpu,
    cpu_activation,
    cpu_attention,
    cuda_backend,
    reference,
    triton_backend,
)
from ptq4adm.ops.arguments import Matmul, MatmulOptions
from ptq4adm.ops.schema import LIBRARY, OPERATORS, pop_geometry

# backend ``cuda`` has products of its own; its quantizers and its attention are Triton's
_LINEAR: dict[str, Callable[..., Tensor]] = {
    "reference": reference.linear,
    "cpu": cpu.linear,
    "triton": triton_backend.function("triton_matmul", "linear"),
    "cuda": cuda_backend.function("cuda_matmul", "linear"),
}
_CONV2D: dict[str, Callable[..., Tensor]] = {
    "reference": reference.conv2d,
    "cpu": cpu.conv2d,
    "triton": triton_backend.function("triton_matmul", "conv2d"),
    "cuda": cuda_backend.function("cuda_matmul", "conv2d"),
}
_QUANTIZERS: dict[str, dict[str, Callable[..., tuple[Tensor, Tensor]]]] = {
    name: {
        "reference": getattr(reference, name),
        "cpu": getattr(cpu_activation, name),
        "triton": triton_backend.function("triton_activation", name),
        "cuda": cuda_backend.function("triton_activation", name),
    }
    for name in (
        "quantize_int8",
        "groupnorm_silu_quantize",
        "layernorm_quantize",
        "geglu_quantize",
    )
}


_ATTENTION: dict[str, Callable[..., Tensor]] = {
    "reference": reference.attention,
    "cpu": cpu_attention.attention,
    "triton": triton_backend.function("triton_attention", "attention"),
    "cuda": cuda_backend.function("triton_attention", "attention"),
}


def _raise_missing(operator: str, backend: str, implementations: dict[str, Any]) -> None:
    usable = ", ".join(repr(name) for name in implementations)
    raise UnknownBackendError(f"{operator}: backend {backend!r} is unknown; use {usable}")


def _linear_kernel(bits: int) -> Callable[..., Tensor]:
    def kernel(
        x_q: Tensor,
        x_scale: Tensor,
        qweight: Tensor,
        w_scale: Tensor,
        *,
        backend: str,
        **keywords: Any,
    ) -> Tensor:
        if backend not in _LINEAR:
            _raise_missing(f"w{bits}a8_linear", backend, _LINEAR)
        options = MatmulOptions(**keywords)
        return _LINEAR[backend](Matmul(bits, x_q, x_scale, qweight, w_scale, options))

    return kernel


def _conv2d_kernel(bits: int) -> Callable[..., Tensor]:
    def kernel(
        x_q: Tensor,
        x_scale: Tensor,
        qweight: Tensor,
        w_scale: Tensor,
        *,
        backend: str,
        **keywords: Any,
    ) -> Tensor:
        if backend not in _CONV2D:
            _raise_missing(f"w{bits}a8_conv2d", backend, _CONV2D)
        geometry = pop_geometry(keywords)
        options = MatmulOptions(**keywords)
        return _CONV2D[backend](Matmul(bits, x_q, x_scale, qweight, w_scale, options), geometry)

    return kernel


def _quantizer_kernel(operator: str) -> Callable[..., tuple[Tensor, Tensor]]:
    implementations = _QUANTIZERS[operator]

    def kernel(*args: Any, backend: str, **keywords: Any) -> tuple[Tensor, Tensor]:
        if backend not in implementations:
            _raise_missing(operator, backend, implementations)
        return implementations[backend](*args, **keywords)

    return kernel


def _attention(*args: Any, backend: str, **keywords: Any) -> Tensor:
    if backend not in _ATTENTION:
        _raise_missing("attention", backend, _ATTENTION)
    return _ATTENTION[backend](*args, **keywords)


_KERNELS: dict[str, Callable[..., Any]] = {
    "w4a8_linear": _linear_kernel(4),
    "w4a8_conv2d": _conv2d_kernel(4),
    "w8a8_linear": _linear_kernel(8),
    "w8a8_conv2d": _conv2d_kernel(8),
    **{operator: _quantizer_kernel(operator) for operator in _QUANTIZERS},
    "attention": _attention,
}

for _operator in OPERATORS:
    for _device in ("CPU", "CUDA"):
        LIBRARY.impl(_operator, _KERNELS[_operator], _device)
