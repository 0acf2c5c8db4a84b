"""Backend ``cpu``: the quantizing operators, natively.

Each function runs the function of the same name in ``reference.py``: it checks the tensors, makes
room for the result and passes addresses to ``csrc/cpu/activation.h``. ``quantize_int8`` is equal
to the reference bit for bit; the fused ones may differ by one step on 0.1 % of the elements.
Other dtypes than float32 are converted first. ``isa`` forces an instruction set, for tests and
benchmarks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptq4adm.ops import compiled
from ptq4adm.ops.arguments import check_dtype, check_shape
from ptq4adm.ops.compiled import check_available
from ptq4adm.ops.reference import select_scale
from ptq4adm.ops.schema import check_glu, check_group_norm, check_static_scale, scale_shape


def quantize_int8(
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    granularity: str = "tensor",
    isa: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run ``reference.quantize_int8`` natively, equal bit for bit.

    Rows at one distance are read in place: a slice of the last dimension is not copied.

    Args:
        x: float, any shape.
        x_scale: float32 static scale, one element or a table [T] with ``step``; None measures it.
        step: int64 [] or [1], the row of the table.
        granularity: ``tensor`` or ``row`` (last dimension) for a measured scale.
        isa: instruction set, ``auto`` for the best.

    Returns:
        x_q: int8 of the shape of ``x``, contiguous, in [-127, 127].
        scale: float32 [], or the leading sizes of ``x`` for measured rows.

    Raises:
        NonFiniteError: if ``x`` holds NaN or infinity.
        UncalibratedStepError: if ``step`` lies outside the table.
    """
    check_available(x)
    shape = scale_shape(x, x_scale, granularity)
    table = _static_scale(x_scale, step)
    values, rows, columns, row_stride = _as_rows(x)
    x_q = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(shape, dtype=torch.float32)
    status = compiled.module.quantize_int8(
        values.data_ptr(),
        rows,
        columns,
        row_stride,
        granularity == "row",
        *_addresses(table, step),
        scale.data_ptr(),
        x_q.data_ptr(),
        isa,
        torch.get_num_threads(),
    )
    if status:
        _raise_status(status, table, step)
    return x_q, scale


def groupnorm_silu_quantize(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    silu: bool = True,
    isa: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run ``reference.groupnorm_silu_quantize`` natively, in two passes over ``x``.

    Args:
        x: float [B, C, H, W]. Memory in channels-last order is read in place, a slice of the
            channels included; another order is copied first.
        num_groups: groups of channels that share mean and variance.
        weight: float [C].
        bias: float [C].
        eps: added to the variance.
        x_scale: as in ``quantize_int8``.
        step: as in ``quantize_int8``.
        silu: apply x * sigmoid(x) after the norm.
        isa: as in ``quantize_int8``.

    Returns:
        x_q: int8 NHWC [B, H, W, C].
        scale: float32 [].

    Raises:
        NonFiniteError: if ``x``, ``weight`` or ``bias`` holds NaN or infinity, or the squares of
            ``x`` exceed float32.
        UncalibratedStepError: if ``step`` lies outside the table.
    """
    check_available(x)
    check_group_norm(x, num_groups)
    table = _static_scale(x_scale, step)
    batch, channels, height, width = x.shape
    weight, bias = _parameter("weight", weight, channels), _parameter("bias", bias, channels)
    values, batch_stride, pixel_stride = _as_channels_last(x)
    x_q = torch.empty((batch, height, width, channels), dtype=torch.int8)
    scale = torch.empty((), dtype=torch.float32)
    status = compiled.module.groupnorm_silu_quantize(
        values.data_ptr(),
        batch,
        height * width,
        channels,
        batch_stride,
        pixel_stride,
        num_groups,
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        silu,
        *_addresses(table, step),
        scale.data_ptr(),
        x_q.data_ptr(),
        isa,
        torch.get_num_threads(),
    )
    if status:
        _raise_status(status, table, step)
    return x_q, scale


def layernorm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    isa: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run ``reference.layernorm_quantize`` natively, in one pass over ``x``.

    Args:
        x: float [M, K]; rows at one distance are read in place.
        weight: float [K].
        bias: float [K].
        eps: added to the variance.
        x_scale: as in ``quantize_int8``.
        step: as in ``quantize_int8``.
        isa: as in ``quantize_int8``.

    Returns:
        x_q: int8 [M, K].
        scale: float32 [M], or [] for a static scale.

    Raises:
        NonFiniteError: if ``x``, ``weight`` or ``bias`` holds NaN or infinity.
        UncalibratedStepError: if ``step`` lies outside the table.
    """
    check_available(x)
    shape = scale_shape(x, x_scale, "row")
    table = _static_scale(x_scale, step)
    values, rows, columns, row_stride = _as_rows(x)
    weight, bias = _parameter("weight", weight, columns), _parameter("bias", bias, columns)
    x_q = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(shape, dtype=torch.float32)
    status = compiled.module.layernorm_quantize(
        values.data_ptr(),
        rows,
        columns,
        row_stride,
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        *_addresses(table, step),
        scale.data_ptr(),
        x_q.data_ptr(),
        isa,
        torch.get_num_threads(),
    )
    if status:
        _raise_status(status, table, step)
    return x_q, scale


def geglu_quantize(
    x: Tensor, *, x_scale: Tensor | None = None, step: Tensor | None = None, isa: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run ``reference.geglu_quantize`` natively, in one pass over ``x``.

    Args:
        x: float [M, 2 K]: values, then gates; rows at one distance are read in place.
        x_scale: as in ``quantize_int8``.
        step: as in ``quantize_int8``.
        isa: as in ``quantize_int8``.

    Returns:
        x_q: int8 [M, K].
        scale: float32 [M], or [] for a static scale.

    Raises:
        NonFiniteError: if ``x`` holds NaN or infinity.
        UncalibratedStepError: if ``step`` lies outside the table.
    """
    check_available(x)
    check_glu(x)
    table = _static_scale(x_scale, step)
    values, rows, columns, row_stride = _as_rows(x)
    x_q = torch.empty((rows, columns // 2), dtype=torch.int8)
    scale = torch.empty(() if table is not None else (rows,), dtype=torch.float32)
    status = compiled.module.geglu_quantize(
        values.data_ptr(),
        rows,
        columns,
        row_stride,
        *_addresses(table, step),
        scale.data_ptr(),
        x_q.data_ptr(),
        isa,
        torch.get_num_threads(),
    )
    if status:
        _raise_status(status, table, step)
    return x_q, scale


def _static_scale(x_scale: Tensor | None, step: Tensor | None) -> Tensor | None:
    """Check a static scale and return it as the kernels read it."""
    if x_scale is None:
        return None
    check_available(x_scale)
    check_static_scale(x_scale, step)
    check_dtype("x_scale", x_scale, torch.float32)
    return x_scale.contiguous()


def _addresses(table: Tensor | None, step: Tensor | None) -> tuple[int, int, int]:
    """Return table, its size and the index into it, which the kernel reads and checks."""
    if table is None:
        return 0, 0, 0
    size = table.numel()
    if size == 1 or step is None:
        return table.data_ptr(), size, 0
    check_available(step)
    return table.data_ptr(), size, step.data_ptr()


def _raise_status(status: int, table: Tensor | None, step: Tensor | None) -> None:
    compiled.check_finite(status != compiled.module.NON_FINITE)
    assert table is not None
    select_scale(table, step)
    raise AssertionError(f"status {status} of a kernel, but step is a row of the table")


def _parameter(name: str, parameter: Tensor, size: int) -> Tensor:
    """Return a norm's weight or bias as contiguous float32 [size]."""
    check_available(parameter)
    check_shape(name, parameter, (size,))
    return parameter.float().contiguous()


def _as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """View a tensor as rows of its last dimension, with a copy only where that has to be.

    Returns:
        float32 values, rows, columns, and the distance of rows in elements.
    """
    values = x.float()
    columns = values.shape[-1] if values.dim() else 1
    rows = values.numel() // columns if columns else math.prod(values.shape[:-1])
    row_stride = columns if values.is_contiguous() else _row_stride(values)
    if row_stride is None:
        return values.contiguous(), rows, columns, columns
    return values, rows, columns, row_stride


def _row_stride(x: Tensor) -> int | None:
    """Return the one distance between neighbouring rows, None if there is no such distance."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return None
    row_stride: int | None = None
    expected: int | None = None
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        if row_stride is None:
            row_stride = stride
        elif stride != expected:
            return None
        expected = stride * size
    return x.shape[-1] if row_stride is None else row_stride


def _as_channels_last(x: Tensor) -> tuple[Tensor, int, int]:
    """Return float32 values whose channels lie side by side, distance of samples and of pixels."""
    values = x.float()
    _, channels, height, width = values.shape
    if not values.is_contiguous(memory_format=torch.channels_last):
        sample, channel, row, column = values.stride()
        pixel = column if width > 1 else row
        is_regular = height == 1 or width == 1 or row == width * pixel
        if (channel == 1 or channels == 1) and is_regular and pixel >= channels:
            return values, sample, pixel
        values = values.contiguous(memory_format=torch.channels_last)
    return values, height * width * channels, channels
