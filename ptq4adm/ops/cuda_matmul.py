"""Backend ``cuda``: passes checked products to the compiled kernels of ``csrc/cuda``.

The kernels read the weight order ``cuda``, accumulate in exact int32 and write every output dtype
themselves. There are two families of them: ``sm80`` takes every product on every GPU, ``sm90a``
(``cuda_boxes.py``) some on compute capability 9.0. ``tile`` forces a tile, for tests and the tuner.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ptq4adm.errors import BackendUnavailableError, ConfigError, ShapeError
from ptq4adm.kernels.launch import capability, device_name, multiprocessors
from ptq4adm.kernels.split_k import first_splits, workspace
from ptq4adm.kernels.tuning import Problem
from ptq4adm.ops import cuda_backend, cuda_boxes
from ptq4adm.ops.arguments import (
    MOST_ELEMENTS,
    OUT_DTYPES,
    Conv2dGeometry,
    Matmul,
    check_elements,
    check_one_device,
    conv2d_shape,
    linear_shape,
    result_dtype,
    result_shape,
)
from ptq4adm.ops.cuda_choice import counted_tile, find_tile
from ptq4adm.ops.cuda_tiles import SM80, SM90A, CudaTile
from ptq4adm.ops.prepack import PANEL_N
from ptq4adm.packing.layout import BLOCK_K

NAME = "cuda"
_CHUNK_BYTES = 16  # of an asynchronous copy
_GROUP = 4  # neighbouring channels that a thread stores together


def linear(call: Matmul, tile: CudaTile | None = None) -> Tensor:
    """Run ``reference.linear`` on the GPU.

    Args:
        call: ``x_q`` int8 [M, K], ``qweight`` in order ``cuda``.
        tile: a tile; None chooses one.

    Returns:
        [M, N], or [M, N / 2] with ``geglu``, in ``out_dtype`` or int8.

    Raises:
        ConfigError: if there is no such tile, or the product or the GPU cannot have it.
        BackendUnavailableError: if the kernels cannot run on the tensors' device.
    """
    shape = linear_shape(call, NAME)
    return _product(call, shape, None, tile)


def conv2d(call: Matmul, geometry: Conv2dGeometry, tile: CudaTile | None = None) -> Tensor:
    """Run ``reference.conv2d`` on the GPU.

    Args:
        call: ``x_q`` int8 [B, H, W, C], ``qweight`` in order ``cuda``.
        geometry: kernel, stride, padding, dilation, nearest upsampling.
        tile: a tile; None chooses one.

    Returns:
        NHWC [B, Ho, Wo, N], or N / 2 channels with ``geglu``, in ``out_dtype`` or int8.

    Raises:
        ConfigError: if there is no such tile, or the product or the GPU cannot have it.
        BackendUnavailableError: if the kernels cannot run on the tensors' device.
    """
    shape = conv2d_shape(call, geometry, NAME)
    return _product(call, shape, geometry, tile)


def accumulate_linear(call: Matmul, tile: CudaTile | None = None) -> list[Tensor]:
    """Return the int32 accumulators of ``linear``, one a K segment, before any scale."""
    return _accumulators(call, linear_shape(call, NAME), None, tile)


def accumulate_conv2d(
    call: Matmul, geometry: Conv2dGeometry, tile: CudaTile | None = None
) -> list[Tensor]:
    """Return the int32 accumulators of ``conv2d``, one a K segment, before any scale."""
    return _accumulators(call, conv2d_shape(call, geometry, NAME), geometry, tile)


def linear_problem(call: Matmul) -> Problem:
    """Return what the tile of a checked linear call is chosen by."""
    return _problem(call, (call.x_q.shape[0], call.w_scale.shape[0]), None)


def conv2d_problem(call: Matmul, geometry: Conv2dGeometry) -> Problem:
    """Return what the tile of a checked convolution call is chosen by."""
    size = geometry.output_size(*_image(call))
    return _problem(call, (call.x_q.shape[0], *size, call.w_scale.shape[0]), geometry)


def _problem(call: Matmul, shape: tuple[int, ...], geometry: Conv2dGeometry | None) -> Problem:
    device = call.x_q.device
    is_gpu = device.type == "cuda"  # else the emulator's, on CPU tensors
    if geometry is not None and geometry.is_pointwise(_image(call)):
        geometry = None
    box = None
    if geometry is not None:
        reason = cuda_boxes.unfit_reason(geometry, is_aligned=_is_aligned(call))
        box = None if reason else (shape[1], shape[2])
    segments = (call.x_q, call.options.x2_q)
    return Problem(
        kernel=f"w{call.bits}a8_{'gemm' if geometry is None else 'conv2d'}",
        M=math.prod(shape[:-1]),
        N=shape[-1],
        channels=tuple(-(-x.shape[-1] // BLOCK_K) * BLOCK_K for x in segments if x is not None),
        taps=1 if geometry is None else math.prod(geometry.kernel_size),
        is_gated=call.options.geglu,
        is_grouped=call.options.w_mult is not None,
        box=box,
        capability=capability(device) if is_gpu else 0,
        multiprocessors=multiprocessors(device),
        device=device_name(device) if is_gpu else "interpreter",
    )


def _is_aligned(call: Matmul) -> bool:
    """Whether every row of activations begins at a multiple of 16 bytes."""
    segments = [x for x in (call.x_q, call.options.x2_q) if x is not None]
    return all(
        x.shape[-1] % _CHUNK_BYTES == 0 and x.data_ptr() % _CHUNK_BYTES == 0 for x in segments
    )


def _product(
    call: Matmul, shape: tuple[int, ...], geometry: Conv2dGeometry | None, tile: CudaTile | None
) -> Tensor:
    options = call.options
    _check_device(call)
    if options.geglu and shape[-1] // 2 % PANEL_N:
        # values and gates must be whole units of the weight to meet in one tile
        plain = replace(options, geglu=False, out_scale=None, out_dtype=torch.float32)
        y = _product(replace(call, options=plain), shape, geometry, tile)
        return _gated(y, call)
    out = torch.empty(
        result_shape(shape, options), dtype=result_dtype(options), device=call.x_q.device
    )
    _run(call, shape, geometry, tile, [out])
    return out


def _accumulators(
    call: Matmul, shape: tuple[int, ...], geometry: Conv2dGeometry | None, tile: CudaTile | None
) -> list[Tensor]:
    _check_device(call)
    segments = 1 if call.options.x2_q is None else 2
    outs = [torch.empty(shape, dtype=torch.int32, device=call.x_q.device) for _ in range(segments)]
    plain = replace(call.options, geglu=False, out_scale=None, bias=None, temb=None, residual=None)
    _run(replace(call, options=plain), shape, geometry, tile, outs)
    return outs


def _gated(y: Tensor, call: Matmul) -> Tensor:
    """Gate a float32 product, and quantize it, outside of the kernel."""
    options = call.options
    value, gate = y.chunk(2, dim=-1)
    gated = value * torch.nn.functional.gelu(gate)
    scale = options.out_scale
    if scale is None:
        return gated.to(options.out_dtype)
    if options.step is not None and scale.numel() > 1:
        # as in the kernels, a step outside the table shows as NaN
        row = options.step.reshape(()).clamp(0, scale.numel() - 1)
        scale = torch.where(row == options.step.reshape(()), scale[row], float("nan"))
    scaled = (gated * scale.reshape(()).reciprocal()).round_().clamp_(-127, 127)
    return scaled.nan_to_num_(nan=-127.0).to(torch.int8)


class _Arguments:
    """The kernel's parameters, with the tensors whose addresses they hold."""

    def __init__(self, params: Any) -> None:
        self.params = params
        self.tensors: dict[str, Tensor] = {}
        self.box: tuple[int, int, int] | None = None  # of family sm90a

    def address(self, name: str, tensor: Tensor | None) -> int:
        """Return the address of a tensor made contiguous, 0 for None, and keep it alive."""
        if tensor is None:
            return 0
        tensor = tensor.contiguous()
        self.tensors[name] = tensor
        return tensor.data_ptr()


def _run(
    call: Matmul,
    shape: tuple[int, ...],
    geometry: Conv2dGeometry | None,
    tile: CudaTile | None,
    outs: list[Tensor],
) -> None:
    """Fill ``outs``: the result, or the int32 accumulators of each segment."""
    _check_sizes(call, geometry)
    if outs[0].numel() == 0:
        return
    compiled = cuda_backend.module()
    arguments = _Arguments(compiled.Params())
    is_convolution = geometry is not None and not geometry.is_pointwise(_image(call))
    _put_operands(arguments, call, shape, geometry, compiled if is_convolution else None)
    params = arguments.params
    steps = params.blocks[0] + params.blocks[1]
    if tile is None:
        problem = _problem(call, shape, geometry)
        tile = find_tile(problem)
        if tile.family != SM80 and not params.is_x_aligned:
            tile = counted_tile(problem)
    elif not 1 <= tile.split_k <= steps:
        raise ConfigError(f"split_k = {tile.split_k}: there are {steps} steps of 64 k")
    row_tiles = -(-params.M // tile.block_m)
    if tile.family != SM80:
        _check_family(tile, call.x_q.device, geometry if is_convolution else None, params)
        arguments.box = (tile.block_m, 1, 1)
        if is_convolution:
            extent = (shape[2], shape[1], params.M // (shape[1] * shape[2]))
            arguments.box = cuda_boxes.cut_box(extent, tile.block_m)
            row_tiles = cuda_boxes.box_count(extent, arguments.box)
    _put_split(arguments, tile, row_tiles, call.x_q.device)
    _put_epilogue(arguments, call, outs, compiled)
    _launch(compiled, arguments, call.bits, is_convolution, tile, call.x_q.device)


def _check_family(
    tile: CudaTile, device: torch.device, geometry: Conv2dGeometry | None, params: Any
) -> None:
    reason: str | None = f"there are {SM80!r} and {SM90A!r}"
    if tile.family == SM90A:
        reason = cuda_backend.sm90a_reason(_index(device)) or cuda_boxes.unfit_reason(
            geometry, is_aligned=params.is_x_aligned
        )
    if reason is not None:
        raise ConfigError(f"family {tile.family!r}: {reason}; tiles of {SM80!r} take every product")


def _index(device: torch.device) -> int:
    """Number of a GPU."""
    return torch.cuda.current_device() if device.index is None else device.index


def _launch(
    compiled: Any,
    arguments: _Arguments,
    bits: int,
    is_convolution: bool,
    tile: CudaTile,
    device: torch.device,
) -> None:
    index, stream = _index(device), torch.cuda.current_stream(device).cuda_stream
    rest = (bits, is_convolution, tile.block_m, tile.block_n, index, stream)
    if arguments.box is None:
        compiled.matmul(arguments.params, *rest)
    else:
        compiled.matmul_sm90a(arguments.params, arguments.box, *rest)


def _put_operands(
    arguments: _Arguments,
    call: Matmul,
    shape: tuple[int, ...],
    geometry: Conv2dGeometry | None,
    compiled: Any | None,
) -> None:
    """Activations and weight; ``compiled`` is the module of a convolution with a window."""
    params, options = arguments.params, call.options
    taps = 1 if geometry is None else geometry.kernel_size[0] * geometry.kernel_size[1]
    channels = [call.x_q.shape[-1], 0 if options.x2_q is None else options.x2_q.shape[-1]]
    addresses = [arguments.address("x_q", call.x_q), arguments.address("x2_q", options.x2_q)]
    params.x = addresses
    params.channels = channels
    params.blocks = [taps * -(-size // BLOCK_K) for size in channels]
    params.is_x_aligned = all(value % _CHUNK_BYTES == 0 for value in (*channels, *addresses))
    params.N = shape[-1]
    params.M = 1
    for size in shape[:-1]:
        params.M *= size
    params.qweight = arguments.address("qweight", call.qweight)
    w_mult = options.w_mult
    if w_mult is not None and w_mult.shape[0] % PANEL_N:
        w_mult = torch.nn.functional.pad(w_mult, (0, 0, 0, -w_mult.shape[0] % PANEL_N))
    params.w_mult = arguments.address("w_mult", w_mult)
    if geometry is not None and compiled is not None:
        image = _image(call)
        params.window = compiled.Window(
            size=image,
            enlarged=geometry.upsample or image,
            out_size=shape[1:3],
            kernel_width=geometry.kernel_size[1],
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
        )


def _put_split(arguments: _Arguments, tile: CudaTile, row_tiles: int, device: torch.device) -> None:
    params = arguments.params
    count = row_tiles * -(-params.N // tile.block_n)
    slabs, counters = workspace(device, tile.split_k, count, tile.block_m * tile.block_n)
    params.splits = tile.split_k
    params.first_splits = first_splits(tile.split_k, *params.blocks)
    params.slabs = arguments.address("slabs", slabs)
    params.counters = arguments.address("counters", counters)


def _put_epilogue(arguments: _Arguments, call: Matmul, outs: list[Tensor], compiled: Any) -> None:
    params, options = arguments.params, call.options

    def scale(name: str, tensor: Tensor | None) -> Any:
        if tensor is None:
            return compiled.Scale()
        form = "one" if tensor.numel() == 1 else "row" if options.step is None else "table"
        return compiled.Scale(arguments.address(name, tensor), form, tensor.numel())

    def term(name: str, tensor: Tensor | None) -> Any:
        if tensor is None:
            return compiled.Term()
        tensor = tensor if tensor.dtype in OUT_DTYPES else tensor.float()
        return compiled.Term(arguments.address(name, tensor), _name(tensor.dtype))

    params.x_scale = [scale("x_scale", call.x_scale), scale("x2_scale", options.x2_scale)]
    params.w_scale = arguments.address("w_scale", call.w_scale)
    params.step = arguments.address("step", options.step)
    params.bias = term("bias", options.bias)
    params.temb = term("temb", options.temb)
    params.residual = term("residual", options.residual)
    params.rows_per_sample = params.M if options.temb is None else params.M // len(options.temb)
    params.is_gated = options.geglu
    params.out_scale = scale("out_scale", options.out_scale)
    addresses = [arguments.address(f"out{i}", out) for i, out in enumerate(outs)]
    params.out = [*addresses, 0][:2]
    params.out_dtype = _name(outs[0].dtype)
    wide = ("w_scale", "bias", "temb", "residual", "out0", "out1")
    params.is_wide = params.N % _GROUP == 0 and all(
        arguments.tensors[name].data_ptr() % 16 == 0 for name in wide if name in arguments.tensors
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _image(call: Matmul) -> tuple[int, int]:
    """(H, W) of a convolution's input."""
    return call.x_q.shape[1], call.x_q.shape[2]


def _check_device(call: Matmul) -> None:
    reason = cuda_backend.unavailable_reason(call.x_q.device.type)
    if reason is not None:
        raise BackendUnavailableError(f"backend 'cuda' is not available: {reason}")
    check_one_device(NAME, call.x_q, call.tensors())


def _check_sizes(call: Matmul, geometry: Conv2dGeometry | None) -> None:
    tensors = {"x_q": call.x_q, "x2_q": call.options.x2_q, "qweight": call.qweight}
    check_elements(NAME, {name: 0 if t is None else t.numel() for name, t in tensors.items()})
    if geometry is not None and geometry.upsample is not None:
        for new, old in zip(geometry.upsample, call.x_q.shape[1:3], strict=True):
            if new * old >= MOST_ELEMENTS:
                raise ShapeError(f"upsample {geometry.upsample}: {new} * {old} is not below 2^31")
