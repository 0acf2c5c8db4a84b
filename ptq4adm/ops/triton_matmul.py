"""Backend ``triton``: passes checked products to the kernels of ``ptq4adm.kernels``.

The kernels read the canonical weight order, accumulate in exact int32 and write every output dtype
themselves. Tiles are looked up per shape (``kernels/tuning.py``); ``config`` forces one, for tests
and the tuner.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ptq4adm.errors import BackendUnavailableError, ConfigError
from ptq4adm.kernels.conv2d import Window
from ptq4adm.kernels.conv2d import conv2d as launch_conv2d
from ptq4adm.kernels.conv2d_tma import can_load_boxes, conv2d_tma
from ptq4adm.kernels.epilogue import Epilogue
from ptq4adm.kernels.gemm import gemm
from ptq4adm.kernels.launch import (
    capability,
    device_name,
    multiprocessors,
    unavailable_reason,
)
from ptq4adm.kernels.tuning import TMA, Problem, TileConfig, find_config, illegal_reason
from ptq4adm.ops.arguments import (
    Conv2dGeometry,
    Matmul,
    check_elements,
    check_one_device,
    conv2d_shape,
    linear_shape,
    result_dtype,
    result_shape,
)
from ptq4adm.packing.layout import BLOCK_K, round_up

NAME = "triton"


def linear(call: Matmul, config: TileConfig | None = None) -> Tensor:
    """Run ``reference.linear`` on the GPU.

    Args:
        call: ``x_q`` int8 [M, K], ``qweight`` canonical.
        config: a tile; None looks one up.

    Returns:
        [M, N], or [M, N / 2] with ``geglu``, in ``out_dtype`` or int8.

    Raises:
        ConfigError: if the tile is illegal for the shape.
        BackendUnavailableError: if the kernels cannot run on the tensors' device.
    """
    out = _output(call, linear_shape(call, NAME))
    if out.numel():
        _linear(call, _epilogue(call, out), config)
    return out


def conv2d(call: Matmul, geometry: Conv2dGeometry, config: TileConfig | None = None) -> Tensor:
    """Run ``reference.conv2d`` on the GPU.

    Args:
        call: ``x_q`` int8 [B, H, W, C], ``qweight`` canonical.
        geometry: kernel, stride, padding, dilation, nearest upsampling.
        config: a tile; None looks one up.

    Returns:
        NHWC [B, Ho, Wo, N], or N / 2 channels with ``geglu``, in ``out_dtype`` or int8.

    Raises:
        ConfigError: if the tile is illegal for the shape.
        BackendUnavailableError: if the kernels cannot run on the tensors' device.
    """
    out = _output(call, conv2d_shape(call, geometry, NAME))
    if out.numel():
        _conv2d(call, geometry, _epilogue(call, out), config)
    return out


def accumulate_linear(call: Matmul, config: TileConfig | None = None) -> list[Tensor]:
    """Return the int32 accumulators of ``linear``, one a K segment, before any scale."""
    accumulators = _accumulators(call, linear_shape(call, NAME))
    if accumulators[0].numel():
        _linear(call, _accumulating(call, accumulators), config)
    return accumulators


def accumulate_conv2d(
    call: Matmul, geometry: Conv2dGeometry, config: TileConfig | None = None
) -> list[Tensor]:
    """Return the int32 accumulators of ``conv2d``, one a K segment, before any scale."""
    accumulators = _accumulators(call, conv2d_shape(call, geometry, NAME))
    if accumulators[0].numel():
        _conv2d(call, geometry, _accumulating(call, accumulators), config)
    return accumulators


def check_device(x: Tensor, *others: Tensor | None) -> None:
    """Check that the kernels can run where the tensors are.

    Raises:
        BackendUnavailableError: if not, or if they are on several devices.
    """
    reason = unavailable_reason(x.device)
    if reason is not None:
        raise BackendUnavailableError(f"backend 'triton' is not available: {reason}")
    check_one_device(NAME, x, others)


def linear_problem(call: Matmul) -> Problem:
    """Return what the tile of a checked linear call is chosen by."""
    return _problem(call, "gemm", call.x_q.shape[0], 1, None)


def conv2d_problem(call: Matmul, geometry: Conv2dGeometry) -> Problem:
    """Return what the tile of a checked convolution call is chosen by."""
    return _conv2d_problem(call, geometry, _window(call, geometry))


def _conv2d_problem(call: Matmul, geometry: Conv2dGeometry, window: Window) -> Problem:
    M = call.x_q.shape[0] * window.out[0] * window.out[1]
    if geometry.is_pointwise(window.size):
        return _problem(call, "gemm", M, 1, None)
    has_boxes = call.options.x2_q is None and can_load_boxes(call.x_q, window)
    taps = window.kernel[0] * window.kernel[1]
    return _problem(call, "conv2d", M, taps, window.out if has_boxes else None)


def _linear(call: Matmul, epilogue: Epilogue, config: TileConfig | None) -> None:
    x2_q = call.options.x2_q
    _launch_gemm(
        call,
        call.x_q.contiguous(),
        None if x2_q is None else x2_q.contiguous(),
        epilogue,
        _checked(config, linear_problem(call)),
    )


def _conv2d(
    call: Matmul, geometry: Conv2dGeometry, epilogue: Epilogue, config: TileConfig | None
) -> None:
    window = _window(call, geometry)
    x_q, x2_q = call.x_q.contiguous(), _contiguous(call.options.x2_q)
    # boxes are cut out of the memory that is read, which may be a copy
    config = _checked(config, _conv2d_problem(replace(call, x_q=x_q), geometry, window))
    if geometry.is_pointwise(window.size):
        flat = None if x2_q is None else x2_q.flatten(0, 2)
        _launch_gemm(call, x_q.flatten(0, 2), flat, epilogue, config)
        return
    qweight, w_mult = call.qweight.contiguous(), _contiguous(call.options.w_mult)
    if config.form == TMA:
        conv2d_tma(x_q, qweight, window, epilogue, config, bits=call.bits, w_mult=w_mult)
        return
    launch_conv2d(x_q, qweight, window, epilogue, config, bits=call.bits, x2_q=x2_q, w_mult=w_mult)


def _launch_gemm(
    call: Matmul, x_q: Tensor, x2_q: Tensor | None, epilogue: Epilogue, config: TileConfig
) -> None:
    gemm(
        x_q,
        call.qweight.contiguous(),
        epilogue,
        config,
        bits=call.bits,
        x2_q=x2_q,
        w_mult=_contiguous(call.options.w_mult),
    )


def _window(call: Matmul, geometry: Conv2dGeometry) -> Window:
    height, width = call.x_q.shape[1:3]
    return Window(
        geometry.kernel_size,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        (height, width),
        geometry.upsample or (height, width),
        geometry.output_size(height, width),
    )


def _problem(call: Matmul, kernel: str, M: int, taps: int, box: tuple[int, int] | None) -> Problem:
    x2_q, device = call.options.x2_q, call.x_q.device
    segments = [call.x_q] if x2_q is None else [call.x_q, x2_q]
    return Problem(
        kernel=f"w{call.bits}a8_{kernel}",
        M=M,
        N=call.w_scale.shape[0],
        channels=tuple(round_up(x.shape[-1], BLOCK_K) for x in segments),
        taps=taps,
        is_gated=call.options.geglu,
        is_grouped=call.options.w_mult is not None,
        box=box,
        capability=capability(device),
        multiprocessors=multiprocessors(device),
        device=device_name(device),
    )


def _checked(config: TileConfig | None, problem: Problem) -> TileConfig:
    if config is None:
        return find_config(problem)
    reason = illegal_reason(config, problem)
    if reason is not None:
        raise ConfigError(reason)
    return config


def _output(call: Matmul, shape: tuple[int, ...]) -> Tensor:
    options = call.options
    check_device(call.x_q, *call.tensors())
    _check_sizes(call, shape)
    shape = result_shape(shape, options)
    return torch.empty(shape, dtype=result_dtype(options), device=call.x_q.device)


def _check_sizes(call: Matmul, shape: tuple[int, ...]) -> None:
    x2_q = call.options.x2_q
    elements = {"x_q": call.x_q.numel(), "qweight": call.qweight.numel()}
    elements |= {"x2_q": 0 if x2_q is None else x2_q.numel(), "the output": math.prod(shape)}
    check_elements(NAME, elements)


def _accumulators(call: Matmul, shape: tuple[int, ...]) -> list[Tensor]:
    check_device(call.x_q, *call.tensors())
    _check_sizes(call, shape)
    segments = 1 if call.options.x2_q is None else 2
    return [torch.empty(shape, dtype=torch.int32, device=call.x_q.device) for _ in range(segments)]


def _accumulating(call: Matmul, accumulators: list[Tensor]) -> Epilogue:
    return Epilogue(
        x_scale=call.x_scale,
        w_scale=call.w_scale,
        out=accumulators[0],
        out2=accumulators[1] if len(accumulators) == 2 else None,
        x2_scale=call.options.x2_scale,
        step=call.options.step,
    )


def _epilogue(call: Matmul, out: Tensor) -> Epilogue:
    options = call.options
    return Epilogue(
        x_scale=call.x_scale.contiguous(),
        w_scale=call.w_scale.contiguous(),
        out=out,
        x2_scale=_contiguous(options.x2_scale),
        step=options.step,
        bias=_contiguous(options.bias),
        temb=_contiguous(options.temb),
        residual=_contiguous(options.residual),
        out_scale=_contiguous(options.out_scale),
        is_gated=options.geglu,
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
