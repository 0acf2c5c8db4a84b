"""Operators: int8 activations times 4- or 8-bit weights, and the quantization of activations.

``schema.py`` declares them in the ``torch.library`` namespace ``ptq4adm``, ``reference.py`` says
what they compute, ``backends.py`` which implementations can run here. The functions below are the
same operators as Python calls, with ``bits`` as an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from ptq4adm.errors import ConfigError
from ptq4adm.ops import dispatch as _dispatch  # noqa: F401  (registers the operators)
from ptq4adm.ops.arguments import Conv2dKeywords, LinearKeywords
from ptq4adm.ops.backends import (
    BackendName,
    BackendStatus,
    backend_report,
    choose_backend,
    device_name,
    prepack,
    quantizers_of,
    resolve_backend,
    to_canonical,
)

__all__ = [
    "BackendName",
    "BackendStatus",
    "attention",
    "backend_report",
    "choose_backend",
    "conv2d",
    "device_name",
    "linear",
    "prepack",
    "quantize_int8",
    "quantizers_of",
    "resolve_backend",
    "to_canonical",
]


def linear(
    x_q: Tensor,
    x_scale: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    *,
    bits: int,
    backend: str,
    **keywords: Unpack[LinearKeywords],
) -> Tensor:
    """Multiply int8 rows by a packed weight: ``ptq4adm::w4a8_linear`` or ``w8a8_linear``.

    Args:
        x_q: int8 [M, K].
        x_scale: float32, one scale, one a row [M], or a table [T] with ``step``.
        qweight: the weight in the backend's order (``prepack``).
        w_scale: float32 [N].
        bits: 4 or 8, of the weight.
        backend: a resolved backend's name.
        **keywords: the fields of ``ptq4adm.ops.arguments.MatmulOptions``.

    Returns:
        [M, N] in ``out_dtype`` (int8 with ``out_scale``), [M, N / 2] with ``geglu``.

    Raises:
        ConfigError: if ``bits`` is neither 4 nor 8.
    """
    if bits == 4:
        return torch.ops.ptq4adm.w4a8_linear(
            x_q, x_scale, qweight, w_scale, backend=backend, **keywords
        )
    _check_bits(bits)
    return torch.ops.ptq4adm.w8a8_linear(
        x_q, x_scale, qweight, w_scale, backend=backend, **keywords
    )


def conv2d(
    x_q: Tensor,
    x_scale: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    *,
    bits: int,
    kernel_size: tuple[int, int],
    backend: str,
    **keywords: Unpack[Conv2dKeywords],
) -> Tensor:
    """Convolve NHWC int8 activations: ``ptq4adm::w4a8_conv2d`` or ``w8a8_conv2d``.

    Args:
        x_q: int8 [B, H, W, C].
        x_scale: float32, one scale, or a table [T] with ``step``.
        qweight: the weight in the backend's order (``prepack``).
        w_scale: float32 [N].
        bits: 4 or 8, of the weight.
        kernel_size: rows and columns of the kernel.
        backend: a resolved backend's name.
        **keywords: ``stride``, ``padding``, ``dilation``, ``upsample`` and the fields of
            ``ptq4adm.ops.arguments.MatmulOptions``.

    Returns:
        NHWC [B, Ho, Wo, N] in ``out_dtype`` (int8 with ``out_scale``).

    Raises:
        ConfigError: if ``bits`` is neither 4 nor 8.
    """
    if bits == 4:
        return torch.ops.ptq4adm.w4a8_conv2d(
            x_q, x_scale, qweight, w_scale, kernel_size=kernel_size, backend=backend, **keywords
        )
    _check_bits(bits)
    return torch.ops.ptq4adm.w8a8_conv2d(
        x_q, x_scale, qweight, w_scale, kernel_size=kernel_size, backend=backend, **keywords
    )


def quantize_int8(
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    granularity: str = "tensor",
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Quantize activations to int8: ``ptq4adm::quantize_int8``.

    Args:
        x: float, any shape.
        x_scale: float32 static scale, one element or a table [T] with ``step``; None measures it.
        step: int64 [] or [1], the row of the table.
        granularity: ``tensor`` or ``row`` (last dimension) for a measured scale.
        backend: a resolved backend's name.

    Returns:
        x_q: int8 of the shape of ``x``, contiguous, in [-127, 127].
        scale: float32 [], or the leading sizes of ``x`` for rows.
    """
    return torch.ops.ptq4adm.quantize_int8(
        x, x_scale=x_scale, step=step, granularity=granularity, backend=backend
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str,
) -> Tensor:
    """Attention of every head, in float: ``ptq4adm::attention``.

    Args:
        q: float [B, Tq, C], the channels of a head side by side.
        k: the same dtype [B, Tk, C].
        v: the same dtype [B, Tk, C].
        heads: number of heads; C / heads channels each.
        bias: float [B, Tk], added to the scores of every head and query.
        scale: None for 1 / sqrt(C / heads).
        backend: a resolved backend's name.

    Returns:
        The dtype of ``q``, [B, Tq, C].
    """
    return torch.ops.ptq4adm.attention(q, k, v, heads, bias=bias, scale=scale, backend=backend)


def _check_bits(bits: int) -> None:
    if bits != 8:
        raise ConfigError(f"bits = {bits}: expected 4 or 8")
