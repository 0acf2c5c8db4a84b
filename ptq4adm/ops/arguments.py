"""Optional arguments of the matrix products and the checks every backend shares.

A check states what was given, what was needed and what to do. It runs in the fake functions of
``schema.py`` as well, so a wrong call fails while it is traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from ptq4adm.errors import BackendUnavailableError, DtypeError, ShapeError
from ptq4adm.ops.prepack import packed_shape
from ptq4adm.packing.layout import BLOCK_K, MAX_K, round_up

OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_ELEMENTS = 2**31  # of a tensor: the GPU kernels' offsets within one are 32 bits


@dataclass(slots=True)
class MatmulOptions:
    """What a matrix product may take besides activations and weights.

    Attributes:
        w_mult: uint8 [N, Kp / 64], integer multipliers of groups of 64 weights, 1..15 (W4 only).
        bias: float [N].
        temb: float [B, N], added to rows m with b = m // (M / B).
        residual: float, of the output's shape before ``geglu``.
        x2_q: int8, the second K segment of the activations.
        x2_scale: float32, its scale; same forms as ``x_scale``.
        step: int64 [] or [1], the row of a scale table in use.
        out_scale: float32 scalar or table; the output is then int8 with this scale.
        geglu: return first half * gelu(second half) of the output channels.
        out_dtype: float32, float16 or bfloat16; ignored with ``out_scale``.
    """

    w_mult: Tensor | None = None
    bias: Tensor | None = None
    temb: Tensor | None = None
    residual: Tensor | None = None
    x2_q: Tensor | None = None
    x2_scale: Tensor | None = None
    step: Tensor | None = None
    out_scale: Tensor | None = None
    geglu: bool = False
    out_dtype: torch.dtype = torch.float32


_OPTIONAL_TENSORS = (
    "w_mult", "bias", "temb", "residual", "x2_q", "x2_scale", "step", "out_scale",
)  # fmt: skip


class LinearKeywords(TypedDict, total=False):
    """The keyword arguments that ``MatmulOptions`` holds."""

    w_mult: Tensor | None
    bias: Tensor | None
    temb: Tensor | None
    residual: Tensor | None
    x2_q: Tensor | None
    x2_scale: Tensor | None
    step: Tensor | None
    out_scale: Tensor | None
    geglu: bool
    out_dtype: torch.dtype


class Conv2dKeywords(LinearKeywords, total=False):
    """The keyword arguments of a convolution with defaults: the above and its geometry."""

    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    dilation: int | tuple[int, int]
    upsample: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Conv2dGeometry:
    """Kernel size, stride, zero padding and dilation as (rows, columns), and nearest upsampling.

    Attributes:
        kernel_size: rows and columns of the kernel.
        stride: step of the output.
        padding: zero rows above and below, zero columns left and right.
        dilation: distance of kernel taps.
        upsample: the size (H', W') to which the input is enlarged before the convolution, source
            index floor(i * H / H'); None for no enlargement.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    upsample: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation", "upsample"):
            pair = getattr(self, name)
            if pair is not None and (len(pair) != 2 or pair[0] < 1 or pair[1] < 1):
                raise ShapeError(f"{name} = {pair}: expected two positive sizes")
        if len(self.padding) != 2 or min(self.padding) < 0:
            raise ShapeError(f"padding = {self.padding}: expected two sizes, zero or more")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (Ho, Wo) for an input of H x W.

        Raises:
            ShapeError: if the kernel does not fit into the padded input.
        """
        if self.upsample is not None and min(height, width) < 1:
            raise ShapeError(f"input of {height} x {width}: there is nothing to enlarge")
        rows, columns = self.upsample or (height, width)
        out = tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                (rows, columns),
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        )
        if out[0] < 1 or out[1] < 1:
            raise ShapeError(
                f"input of {rows} x {columns} is smaller than the kernel: {self}; pad it more"
            )
        return out[0], out[1]

    def is_pointwise(self, size: tuple[int, int]) -> bool:
        """Return whether the convolution is the product of its pixels, in place.

        Args:
            size: (H, W) of the input.
        """
        return (
            self.kernel_size == (1, 1)
            and self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.upsample in (None, size)
        )


@dataclass(slots=True)
class Matmul:
    """One checked call of a matrix product: the same object for every backend.

    Attributes:
        bits: 4 or 8, of the weight.
        x_q: int8 [M, K], or NHWC.
        x_scale: float32 scalar, row vector [M] (linear only), or table with ``options.step``.
        qweight: the weight in the backend's order.
        w_scale: float32 [N].
        options: everything optional.
    """

    bits: int
    x_q: Tensor
    x_scale: Tensor
    qweight: Tensor
    w_scale: Tensor
    options: MatmulOptions

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the call."""
        found = [self.x_q, self.x_scale, self.qweight, self.w_scale]
        found += [getattr(self.options, name) for name in _OPTIONAL_TENSORS]
        return [tensor for tensor in found if tensor is not None]


def linear_shape(call: Matmul, backend: str) -> tuple[int, int]:
    """Check a linear call and return [M, N].

    Raises:
        ShapeError: if a size does not fit.
        DtypeError: if a dtype does not fit.
    """
    if call.x_q.dim() != 2:
        raise ShapeError(f"x_q {list(call.x_q.shape)}: expected [M, K]; flatten the leading sizes")
    shape = (call.x_q.shape[0], call.w_scale.shape[0])
    _check_matmul(call, shape, 1, backend)
    return shape


def conv2d_shape(call: Matmul, geometry: Conv2dGeometry, backend: str) -> tuple[int, int, int, int]:
    """Check a convolution call and return [B, Ho, Wo, N].

    Raises:
        ShapeError: if a size does not fit.
        DtypeError: if a dtype does not fit.
    """
    if call.x_q.dim() != 4:
        raise ShapeError(f"x_q {list(call.x_q.shape)}: expected NHWC [B, H, W, C]")
    batch, height, width, _ = call.x_q.shape
    shape = (batch, *geometry.output_size(height, width), call.w_scale.shape[0])
    _check_matmul(call, shape, geometry.kernel_size[0] * geometry.kernel_size[1], backend)
    return shape


def result_shape(shape: tuple[int, ...], options: MatmulOptions) -> tuple[int, ...]:
    """Return the shape of the result: GEGLU halves the channels."""
    return (*shape[:-1], shape[-1] // 2) if options.geglu else shape


def result_dtype(options: MatmulOptions) -> torch.dtype:
    """Return the dtype of the result."""
    return torch.int8 if options.out_scale is not None else options.out_dtype


def _check_matmul(call: Matmul, shape: tuple[int, ...], taps: int, backend: str) -> None:
    x_q, options, N = call.x_q, call.options, shape[-1]
    check_dtype("x_q", x_q, torch.int8)
    check_dtype("w_scale", call.w_scale, torch.float32)
    check_dtype("qweight", call.qweight, torch.uint8 if call.bits == 4 else torch.int8)
    if x_q.shape[-1] < 1:
        raise ShapeError(f"x_q {list(x_q.shape)}: expected at least one channel")
    rows = x_q.shape[0] if x_q.dim() == 2 else None
    _check_scale("x_scale", call.x_scale, options.step, rows)
    k_padded = taps * round_up(x_q.shape[-1], BLOCK_K)
    if (options.x2_q is None) != (options.x2_scale is None):
        raise ShapeError("x2_q and x2_scale: one was given without the other; give both")
    if options.x2_q is not None:
        k_padded += taps * round_up(options.x2_q.shape[-1], BLOCK_K)
        _check_second_segment(x_q, options, rows)
    if k_padded >= MAX_K:
        raise ShapeError(f"K = {k_padded} (padded): the int32 accumulator needs K < {MAX_K}")
    expected = packed_shape(call.bits, N, k_padded, backend)
    if tuple(call.qweight.shape) != expected:
        raise ShapeError(
            f"qweight {list(call.qweight.shape)}: expected {list(expected)} for {N} channels and "
            f"K = {k_padded} (padded) in the order of backend {backend!r}; call prepack first"
        )
    if options.w_mult is not None:
        check_dtype("w_mult", options.w_mult, torch.uint8)
        check_shape("w_mult", options.w_mult, (N, k_padded // BLOCK_K))
    _check_epilogue(options, shape)


def _check_second_segment(x_q: Tensor, options: MatmulOptions, rows: int | None) -> None:
    x2_q, x2_scale = options.x2_q, options.x2_scale
    assert x2_q is not None
    assert x2_scale is not None
    check_dtype("x2_q", x2_q, torch.int8)
    if x2_q.shape[-1] < 1:
        raise ShapeError(f"x2_q {list(x2_q.shape)}: expected at least one channel; leave it out")
    if x2_q.shape[:-1] != x_q.shape[:-1]:
        raise ShapeError(
            f"x2_q {list(x2_q.shape)}: expected the sizes of x_q {list(x_q.shape)} but the last"
        )
    _check_scale("x2_scale", x2_scale, options.step, rows)


def _check_epilogue(options: MatmulOptions, shape: tuple[int, ...]) -> None:
    N = shape[-1]
    if options.bias is not None:
        check_shape("bias", options.bias, (N,))
    if options.temb is not None:
        rows = shape[0] if len(shape) == 2 else shape[0] * shape[1] * shape[2]
        temb = options.temb
        if temb.dim() != 2 or temb.shape[1] != N or temb.shape[0] < 1 or rows % temb.shape[0]:
            raise ShapeError(
                f"temb {list(temb.shape)}: expected [B, {N}] with B dividing the {rows} rows"
            )
    if options.residual is not None:
        check_shape("residual", options.residual, shape)
    if options.out_scale is not None:
        _check_scale("out_scale", options.out_scale, options.step, None)
    elif options.out_dtype not in OUT_DTYPES:
        raise DtypeError(f"out_dtype = {options.out_dtype}: expected one of {OUT_DTYPES}")
    if options.geglu and N % 2:
        raise ShapeError(f"geglu: {N} output channels do not split in two halves")


def _check_scale(name: str, scale: Tensor, step: Tensor | None, rows: int | None) -> None:
    check_dtype(name, scale, torch.float32)
    if scale.numel() == 1:
        return
    if step is not None:
        if scale.dim() != 1:
            raise ShapeError(f"{name} {list(scale.shape)}: expected a table [T], as step is given")
        check_step(step)
    elif rows is None:
        raise ShapeError(
            f"{name} {list(scale.shape)}: expected one scale for the tensor, or a table with step"
        )
    elif tuple(scale.shape) != (rows,):
        raise ShapeError(
            f"{name} {list(scale.shape)}: expected one scale, or [{rows}] (one a row), or a table "
            "with step"
        )


def check_step(step: Tensor) -> None:
    """Check that ``step`` is one int64.

    Raises:
        DtypeError: if it is not int64.
        ShapeError: if it is not one element.
    """
    check_dtype("step", step, torch.int64)
    if step.numel() != 1:
        raise ShapeError(f"step {list(step.shape)}: expected one int64, [] or [1]")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ``DtypeError`` unless the tensor has the dtype."""
    if tensor.dtype != dtype:
        raise DtypeError(f"{name}: expected {dtype}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``ShapeError`` unless the tensor has the shape."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{name} {list(tensor.shape)}: expected {list(shape)}")


def check_one_device(backend: str, x: Tensor, others: Iterable[Tensor | None]) -> None:
    """Raise ``BackendUnavailableError`` unless all tensors are where ``x`` is."""
    for other in others:
        if other is not None and other.device != x.device:
            raise BackendUnavailableError(
                f"backend {backend!r} was given tensors on {x.device} and {other.device}; move the "
                "layer and its input to one device"
            )


def check_elements(backend: str, elements: Mapping[str, int]) -> None:
    """Raise ``ShapeError`` if a named tensor has as many elements as offsets do not reach."""
    for name, count in elements.items():
        if count >= MOST_ELEMENTS:
            raise ShapeError(
                f"{name}: {count} elements, the {backend} backend takes fewer than 2^31; split "
                "the batch"
            )
