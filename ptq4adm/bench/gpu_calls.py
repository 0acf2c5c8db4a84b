"""One product of a layer as a backend takes it, with a tile of one's choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4adm.bench.gpu_shapes import GpuLayer
from ptq4adm.bench.shapes import LINEAR
from ptq4adm.kernels.tuning import Problem, TileConfig
from ptq4adm.ops import cuda_matmul, triton_matmul
from ptq4adm.ops.arguments import Conv2dGeometry, Matmul, MatmulOptions
from ptq4adm.ops.cuda_tiles import CudaTile
from ptq4adm.packing.layout import BLOCK_K, KLayout

Tile = TileConfig | CudaTile
_MODULES: dict[str, Any] = {"triton": triton_matmul, "cuda": cuda_matmul}


@dataclass(frozen=True)
class ProductCall:
    """A call and, for a convolution, its geometry.

    Attributes:
        call: tensors and options.
        geometry: None for rows.
        backend: whose kernel, and whose order the weight has.
    """

    call: Matmul
    geometry: Conv2dGeometry | None
    backend: str = "triton"

    def problem(self) -> Problem:
        """What its tile is chosen by."""
        module = _MODULES[self.backend]
        found: Problem = (
            module.linear_problem(self.call)
            if self.geometry is None
            else module.conv2d_problem(self.call, self.geometry)
        )
        return found

    def run(self, tile: Tile | None = None) -> Tensor:
        """Launch it with a tile of its backend; None for the one that is looked up."""
        module = _MODULES[self.backend]
        y: Tensor = (
            module.linear(self.call, tile)
            if self.geometry is None
            else module.conv2d(self.call, self.geometry, tile)
        )
        return y

    def accumulate(self, tile: Tile | None = None) -> list[Tensor]:
        """Launch it and return the int32 sums of each K segment."""
        module = _MODULES[self.backend]
        sums: list[Tensor] = (
            module.accumulate_linear(self.call, tile)
            if self.geometry is None
            else module.accumulate_conv2d(self.call, self.geometry, tile)
        )
        return sums


def layer_geometry(layer: GpuLayer) -> Conv2dGeometry | None:
    """Kernel, stride, padding and enlargement of a layer; None for rows."""
    shape = layer.shape
    if shape.kind == LINEAR:
        return None
    return Conv2dGeometry(
        (shape.kernel, shape.kernel),
        (shape.stride, shape.stride),
        (shape.kernel // 2, shape.kernel // 2),
        upsample=shape.out_size if shape.is_upsampled else None,
    )


def layer_layout(layer: GpuLayer) -> KLayout:
    """Order of a layer's packed weight."""
    return KLayout((layer.shape.in_channels,), (layer.shape.kernel, layer.shape.kernel))


def make_call(
    layer: GpuLayer,
    bits: int,
    *,
    x_q: Tensor,
    qweight: Tensor,
    w_scale: Tensor,
    options: MatmulOptions,
    backend: str = "triton",
) -> ProductCall:
    """A layer's product, with a scale of 1 of its activations.

    Args:
        layer: the sizes.
        bits: 4 or 8, of the weight.
        x_q: int8 [M, K], or NHWC.
        qweight: in the backend's order.
        w_scale: float32 [N].
        options: everything else.
        backend: whose kernel.
    """
    x_scale = torch.ones(1, device=x_q.device)
    call = Matmul(bits, x_q, x_scale, qweight, w_scale, options)
    return ProductCall(call, layer_geometry(layer), backend)


def layer_options(
    bias: Tensor, *, w_mult: Tensor | None = None, is_gated: bool = False, is_int8: bool = False
) -> MatmulOptions:
    """What a layer of a UNet's step has.

    Args:
        bias: float32 [N].
        w_mult: uint8 [N, Kp / 64], multipliers of groups; None for none.
        is_gated: with GEGLU.
        is_int8: int8 output; else float16.
    """
    return MatmulOptions(
        w_mult=w_mult,
        bias=bias,
        geglu=is_gated,
        out_dtype=torch.float16,
        out_scale=torch.ones(1, device=bias.device) if is_int8 else None,
    )


def empty_call(
    layer: GpuLayer,
    bits: int,
    device: torch.device,
    *,
    is_gated: bool = False,
    is_int8: bool = False,
    is_grouped: bool = False,
    backend: str = "triton",
) -> ProductCall:
    """The same of memory without content: to plan, or to compile."""
    shape = layer.shape
    is_linear = shape.kind == LINEAR
    size = (shape.batch, shape.height, shape.width, shape.in_channels)
    k_padded = layer_layout(layer).k_padded
    columns = k_padded // (2 if bits == 4 else 1)
    groups = (shape.N, k_padded // BLOCK_K)
    dtype = torch.uint8 if bits == 4 else torch.int8
    options = layer_options(
        torch.empty(shape.N, device=device),
        w_mult=torch.empty(groups, dtype=torch.uint8, device=device) if is_grouped else None,
        is_gated=is_gated,
        is_int8=is_int8,
    )
    return make_call(
        layer,
        bits,
        x_q=torch.empty((shape.M, shape.K) if is_linear else size, dtype=torch.int8, device=device),
        qweight=torch.empty((shape.N, columns), dtype=dtype, device=device),
        w_scale=torch.empty(shape.N, device=device),
        options=options,
        backend=backend,
    )
