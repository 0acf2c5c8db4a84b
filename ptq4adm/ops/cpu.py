"""Backend ``cpu``: passes checked tensors to the compiled module ``ptq4adm._cpu`` as addresses.

The kernels are in ``csrc/cpu``. They accumulate in exact int32 and write float32, int8 or (for
tests) the accumulators; other output dtypes, and the gated GELU of channels that do not fill whole
panels, are applied here. ``isa`` forces an instruction set, for tests and benchmarks.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ptq4adm.ops import compiled
from ptq4adm.ops.arguments import (
    Conv2dGeometry,
    Matmul,
    conv2d_shape,
    linear_shape,
)
from ptq4adm.ops.compiled import check_available, check_finite
from ptq4adm.ops.compiled import unavailable_reason as unavailable_reason
from ptq4adm.ops.cpu_activation import quantize_int8
from ptq4adm.ops.prepack import PANEL_N
from ptq4adm.ops.reference import gated_gelu, select_scale

NAME = "cpu"
ISAS = ("scalar", "avx2", "avx_vnni", "avx512_vnni")  # slowest first; "auto" takes the last it can
_POINTWISE = Conv2dGeometry((1, 1))
_OUTPUTS = {torch.float32: "float32", torch.int8: "int8", torch.int32: "int32"}


def module_file() -> str:
    """Return the path of the compiled module, or why there is none."""
    return unavailable_reason() or str(compiled.module.__file__)


def default_isa() -> str:
    """Return the fastest instruction set that this processor runs, such as ``avx2``."""
    return compiled.module.best_isa()


def isa_unavailable_reason(isa: str) -> str | None:
    """Return why an instruction set cannot run here, or None if it can; see ``ISAS``."""
    try:
        compiled.module.check_isa(isa)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def is_compiled(isa: str) -> bool:
    """Return whether the compiled module holds an instruction set, whatever this processor runs."""
    return compiled.module.is_compiled(isa)


def limit_isa(isa: str) -> None:
    """Hold every kernel of this process to an instruction set: for comparisons.

    Args:
        isa: one of ``ISAS``, or ``auto`` for the fastest again.

    Raises:
        RuntimeError: if the processor lacks it.
        ValueError: if the name is unknown.
    """
    compiled.module.set_auto_isa(isa)


def threading() -> str:
    """Return what the compiled module spreads its work with: ``OpenMP`` or ``std::thread``."""
    return compiled.module.threading()


def linear(call: Matmul, isa: str = "auto") -> Tensor:
    """Run ``reference.linear`` natively; ``qweight`` in the cpu order."""
    check_available(call.x_q)
    shape = linear_shape(call, NAME)
    return _matmul(call, _POINTWISE, shape, isa)


def conv2d(call: Matmul, geometry: Conv2dGeometry, isa: str = "auto") -> Tensor:
    """Run ``reference.conv2d`` natively; ``qweight`` in the cpu order."""
    check_available(call.x_q)
    shape = conv2d_shape(call, geometry, NAME)
    return _matmul(call, geometry, shape, isa)


def accumulate_linear(call: Matmul, isa: str = "auto") -> list[Tensor]:
    """Return the int32 accumulators of ``linear``, one a K segment, before any scale."""
    check_available(call.x_q)
    return _accumulate(call, _POINTWISE, linear_shape(call, NAME), isa)


def accumulate_conv2d(call: Matmul, geometry: Conv2dGeometry, isa: str = "auto") -> list[Tensor]:
    """Return the int32 accumulators of ``conv2d``, one a K segment, before any scale."""
    check_available(call.x_q)
    return _accumulate(call, geometry, conv2d_shape(call, geometry, NAME), isa)


def _matmul(call: Matmul, geometry: Conv2dGeometry, shape: tuple[int, ...], isa: str) -> Tensor:
    options = call.options
    # the kernel gates whole panels of 16 channels
    is_gated = options.geglu and shape[-1] % (2 * PANEL_N) == 0
    is_gated_here = options.geglu and not is_gated
    is_int8 = options.out_scale is not None and not is_gated_here
    shape = (*shape[:-1], shape[-1] // 2) if is_gated else shape
    out = torch.empty(shape, dtype=torch.int8 if is_int8 else torch.float32)
    check_finite(_run(call, geometry, (out,), isa, is_gated=is_gated))
    if is_gated_here:
        out = gated_gelu(out)
        if options.out_scale is not None:
            x_scale, step = options.out_scale, options.step
            return quantize_int8(out, x_scale=x_scale, step=step, isa=isa)[0]
    return out if is_int8 else out.to(options.out_dtype)


def _accumulate(
    call: Matmul, geometry: Conv2dGeometry, shape: tuple[int, ...], isa: str
) -> list[Tensor]:
    segments = 1 if call.options.x2_q is None else 2
    accumulators = tuple(torch.empty(shape, dtype=torch.int32) for _ in range(segments))
    _run(call, geometry, accumulators, isa)
    return list(accumulators)


def _run(
    call: Matmul,
    geometry: Conv2dGeometry,
    out: tuple[Tensor, ...],
    isa: str,
    *,
    is_gated: bool = False,
) -> bool:
    """Call the kernel."""
    options, x_q = call.options, call.x_q
    tensors = _Addresses(options.step)
    x2_q = options.x2_q
    size = (x_q.shape[0], 1, 1) if x_q.dim() == 2 else tuple(x_q.shape[:3])
    channels = (x_q.shape[-1], 0 if x2_q is None else x2_q.shape[-1])
    is_int8 = out[0].dtype is torch.int8
    return compiled.module.matmul(
        _shape_object(geometry, size, channels, call.w_scale.shape[0]),
        call.bits,
        tensors.plain(x_q),
        tensors.plain(x2_q),
        tensors.plain(call.qweight),
        tensors.plain(options.w_mult),
        tensors.plain(call.w_scale),
        *tensors.scale(call.x_scale),
        *tensors.scale(options.x2_scale),
        tensors.float32(options.bias),
        tensors.float32(options.temb),
        0 if options.temb is None else options.temb.shape[0],
        tensors.float32(options.residual),
        is_gated,
        tensors.scale(options.out_scale)[0] if is_int8 else 0,
        out[0].data_ptr(),
        out[1].data_ptr() if len(out) == 2 else 0,
        _OUTPUTS[out[0].dtype],
        isa,
        torch.get_num_threads(),
    )


class _Addresses:
    """Addresses of tensors as the kernel wants them; keeps every converted copy alive.

    Args:
        step: the row in use of scale tables.
    """

    __slots__ = ("copies", "step")

    def __init__(self, step: Tensor | None) -> None:
        self.step = step
        self.copies: list[Tensor] = []

    def plain(self, tensor: Tensor | None) -> int:
        """Address of contiguous memory; 0 for no tensor."""
        if tensor is None:
            return 0
        if not tensor.is_cpu:
            check_available(tensor)
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            self.copies.append(tensor)
        return tensor.data_ptr()

    def float32(self, tensor: Tensor | None) -> int:
        """Address of contiguous float32 memory; 0 for no tensor."""
        if tensor is not None and tensor.dtype is not torch.float32:
            tensor = tensor.float()
            self.copies.append(tensor)
        return self.plain(tensor)

    def scale(self, scale: Tensor | None) -> tuple[int, bool]:
        """Address of the scale in use, and whether there is one a row."""
        if scale is None:
            return 0, False
        if self.step is None or scale.numel() == 1:
            return self.plain(scale), scale.numel() > 1
        scale = select_scale(scale, self.step)
        self.copies.append(scale)
        return self.plain(scale), False


@lru_cache(maxsize=4096)
def _shape_object(
    geometry: Conv2dGeometry,
    size: tuple[int, int, int],
    channels: tuple[int, int],
    out_channels: int,
) -> compiled.module.Conv2dShape:
    """Build the kernel's description of a shape once; a model has a few dozen."""
    return compiled.module.Conv2dShape(
        size=size,
        channels=channels,
        out_channels=out_channels,
        kernel_size=geometry.kernel_size,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        upsample=geometry.upsample or size[1:],
        out_size=geometry.output_size(size[1], size[2]),
    )
