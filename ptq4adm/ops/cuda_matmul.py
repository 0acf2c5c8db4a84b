"""Backend ``cuda``: passes checked products to the compiled kernels of ``csrc/cuda``.

The kernels read the weight order ``cuda``, accumulate in exact int32 and write every output dtype
themselves. ``tile`` forces a tile, for tests and the tuner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptq4adm.errors import BackendUnavailableError, ConfigError, ShapeError
from ptq4adm.kernels.launch import capability, device_name, multiprocessors
from ptq4adm.kernels.split_k import first_splits, workspace
from ptq4adm.kernels.tuning import Problem
from ptq4adm.ops import cuda_backend, cuda_tiles
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
from ptq4adm.ops.prepack import PANEL_N
from ptq4adm.packing.layout import BLOCK_K

NAME = "cuda"
_CHUNK_BYTES = 16  # of an asynchronous copy
_GROUP = 4  # neighbouring channels that a thread stores together

# how well the tensor cores are fed, beside the largest tile: assumed from what a block reads for
# each product, until the tuner has measured
_TILE_WORTH = {(128, 128): 1.0, (128, 64): 0.95, (64, 64): 0.8, (64, 32): 0.6}
_FIXED_STEPS = 4  # of k that filling the pipeline and storing the result are worth
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_LEAST_STEPS = 4  # a split has


@dataclass(frozen=True, slots=True)
class CudaTile:
    """How a product is cut into blocks.

    Attributes:
        block_m: rows (pixels) of a tile.
        block_n: output channels of a tile.
        split_k: blocks that share the k of one tile.
    """

    block_m: int
    block_n: int
    split_k: int = 1


def linear(call: Matmul, tile: CudaTile | None = None) -> Tensor:
    """Run ``reference.linear`` on the GPU.

    Args:
        call: ``x_q`` int8 [M, K], ``qweight`` in order ``cuda``.
        tile: a tile; None chooses one.

    Returns:
        [M, N], or [M, N / 2] with ``geglu``, in ``out_dtype`` or int8.

    Raises:
        ConfigError: if there is no such tile.
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
        ConfigError: if there is no such tile.
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


def choose_tile(M: int, N: int, steps: int, processors: int) -> CudaTile:
    """Return the tile and split that should take the least time; counted, not measured.

    Args:
        M: rows of the product.
        N: output channels, before gating.
        steps: of 64 k, over all taps and segments.
        processors: multiprocessors of the GPU.
    """

    def cost(tile: CudaTile) -> float:
        blocks = -(-M // tile.block_m) * -(-N // tile.block_n) * tile.split_k
        # a slab is written and read again, and the last block reads all of them
        fixed = _FIXED_STEPS if tile.split_k == 1 else 2 * _FIXED_STEPS + tile.split_k
        size = tile.block_m * tile.block_n / _TILE_WORTH[tile.block_m, tile.block_n]
        return -(-blocks // processors) * size * (-(-steps // tile.split_k) + fixed)

    splits = [split for split in _SPLITS if split == 1 or steps >= _LEAST_STEPS * split]
    return min((CudaTile(*size, split) for size in _TILE_WORTH for split in splits), key=cost)


def find_tile(problem: Problem) -> CudaTile:
    """Return the tile of a product: measured, if there is one for its class, else counted.

    Args:
        problem: the product; its ``capability`` 0 stands for the emulator.

    Raises:
        ConfigError: if the GPU's file of tiles is broken, or holds a tile that there is not.
    """
    measured = cuda_tiles.find(problem)
    if measured is None:
        steps = problem.K // BLOCK_K
        return choose_tile(problem.M, problem.N, steps, problem.multiprocessors)
    size = (measured.block_m, measured.block_n)
    if measured.family != cuda_tiles.SM80 or size not in _TILE_WORTH:
        path = cuda_tiles.config_file(problem.device)
        raise ConfigError(
            f"{path}: {measured}: this version has no such tile; run ptq4adm tune --backend cuda "
            "--fresh"
        )
    return CudaTile(*size, measured.split_k)


def _problem(call: Matmul, params: Any, is_convolution: bool) -> Problem:
    """What the tile of a product is looked up by."""
    device = call.x_q.device
    is_gpu = device.type == "cuda"  # else the emulator's, on CPU tensors
    return Problem(
        kernel=f"w{call.bits}a8_{'conv2d' if is_convolution else 'gemm'}",
        M=params.M,
        N=params.N,
        channels=tuple(blocks * BLOCK_K for blocks in params.blocks if blocks),
        is_gated=call.options.geglu,
        is_grouped=call.options.w_mult is not None,
        capability=capability(device) if is_gpu else 0,
        multiprocessors=multiprocessors(device),
        device=device_name(device) if is_gpu else "interpreter",
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
        tile = find_tile(_problem(call, params, is_convolution))
    elif not 1 <= tile.split_k <= steps:
        raise ConfigError(f"split_k = {tile.split_k}: there are {steps} steps of 64 k")
    _put_split(arguments, tile, call.x_q.device)
    _put_epilogue(arguments, call, outs, compiled)
    _launch(compiled, arguments, call.bits, is_convolution, tile, call.x_q.device)


def _launch(
    compiled: Any,
    arguments: _Arguments,
    bits: int,
    is_convolution: bool,
    tile: CudaTile,
    device: torch.device,
) -> None:
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(device).cuda_stream
    compiled.matmul(
        arguments.params, bits, is_convolution, tile.block_m, tile.block_n, index, stream
    )


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


def _put_split(arguments: _Arguments, tile: CudaTile, device: torch.device) -> None:
    params = arguments.params
    tiles = -(-params.M // tile.block_m) * -(-params.N // tile.block_n)
    slabs, counters = workspace(device, tile.split_k, tiles, tile.block_m * tile.block_n)
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
