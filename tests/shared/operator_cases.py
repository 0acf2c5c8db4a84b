"""Builders of operator calls, the exact oracle, and where calls run."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm.ops.arguments import Conv2dGeometry, Matmul, MatmulOptions
from ptq4adm.ops.prepack import prepack
from ptq4adm.packing.layout import BLOCK_K, KLayout, pack_int4, weight_to_rows

WEIGHT_RANGE = {4: (-8, 7), 8: (-127, 127)}

# image size, channels and geometry of each kind
CONVOLUTIONS = {
    "3x3": ((2, 5, 6), 64, Conv2dGeometry((3, 3), padding=(1, 1))),
    "3x3 odd channels": ((1, 7, 5), 70, Conv2dGeometry((3, 3), padding=(1, 1))),
    "stride 2": ((2, 7, 8), 33, Conv2dGeometry((3, 3), stride=(2, 2), padding=(1, 1))),
    "stride 2, 1 and no padding": ((1, 9, 7), 16, Conv2dGeometry((3, 2), stride=(2, 1))),
    "padding larger than the kernel": ((1, 3, 3), 5, Conv2dGeometry((3, 3), padding=(4, 5))),
    "dilation": ((1, 9, 8), 20, Conv2dGeometry((3, 3), padding=(2, 3), dilation=(2, 3))),
    "1x1": ((2, 3, 5), 130, Conv2dGeometry((1, 1))),
    "1x1 stride 2": ((2, 5, 5), 64, Conv2dGeometry((1, 1), stride=(2, 2))),
    "5x1": ((1, 6, 3), 12, Conv2dGeometry((5, 1), padding=(2, 0))),
    "one pixel": ((3, 1, 1), 64, Conv2dGeometry((3, 3), padding=(1, 1))),
    "upsample 2": ((1, 3, 4), 64, Conv2dGeometry((3, 3), padding=(1, 1), upsample=(6, 8))),
    "upsample odd": ((2, 3, 5), 30, Conv2dGeometry((3, 3), padding=(1, 1), upsample=(7, 9))),
    "upsample smaller": ((1, 7, 5), 8, Conv2dGeometry((3, 3), padding=(1, 1), upsample=(4, 3))),
    "upsample, stride": (
        (1, 5, 3),
        17,
        Conv2dGeometry((3, 3), stride=(2, 2), padding=(1, 1), upsample=(11, 7)),
    ),
}


@dataclass
class Case:
    """One product: its call in canonical order and in the cpu order, and the decoded weight."""

    call: Matmul  # canonical order
    native: Matmul  # cpu order
    geometry: Conv2dGeometry | None
    layout: KLayout
    weight: Tensor  # int64 [N, C, kh, kw], multipliers applied
    x: Tensor  # int64 NHWC or [M, K], segments side by side

    def with_options(self, **options: object) -> Case:
        call = replace(self.call, options=replace(self.call.options, **options))
        native = replace(self.native, options=replace(self.native.options, **options))
        return replace(self, call=call, native=native)

    def with_scales(self, x_scale: Tensor, w_scale: Tensor) -> Case:
        call = replace(self.call, x_scale=x_scale, w_scale=w_scale)
        native = replace(self.native, x_scale=x_scale, w_scale=w_scale)
        return replace(self, call=call, native=native)

    def oracle(self) -> list[Tensor]:
        """int32 accumulators of each segment, by float64 convolution: every sum is exact."""
        geometry = self.geometry or Conv2dGeometry((1, 1))
        image = self.x if self.x.dim() == 4 else self.x[None, :, None]
        if geometry.upsample is not None:
            height, width = image.shape[1:3]
            rows = [i * height // geometry.upsample[0] for i in range(geometry.upsample[0])]
            columns = [i * width // geometry.upsample[1] for i in range(geometry.upsample[1])]
            image = image[:, rows][:, :, columns]
        accumulators, first = [], 0
        for channels in self.layout.segments:
            acc = functional.conv2d(
                image[..., first : first + channels].permute(0, 3, 1, 2).double(),
                self.weight[:, first : first + channels].double(),
                stride=geometry.stride,
                padding=geometry.padding,
                dilation=geometry.dilation,
            ).permute(0, 2, 3, 1)
            acc = acc if self.x.dim() == 4 else acc[0, :, 0]
            accumulators.append(acc.to(torch.int64))
            first += channels
        return [acc.to(torch.int32) for acc in accumulators]


def build_case(
    bits: int,
    shape: tuple[int, ...],
    segments: tuple[int, ...],
    out_features: int,
    geometry: Conv2dGeometry | None = None,
    *,
    is_grouped: bool = False,
    w_value: int | None = None,
    x_value: int | None = None,
) -> Case:
    """Make a product of random integers, or of constants where a value is given.

    ``shape`` is (M,) for a linear layer or (B, H, W); scales are 1.
    """
    layout = KLayout(segments, geometry.kernel_size if geometry else (1, 1))
    low, high = WEIGHT_RANGE[bits]
    weight_shape = (out_features, layout.in_channels, *layout.kernel_size)
    w_q = torch.randint(low, high + 1, weight_shape, dtype=torch.int8)
    if w_value is not None:
        w_q.fill_(w_value)
    rows = weight_to_rows(w_q, layout)
    w_mult = None
    weight = w_q.long()
    if is_grouped:
        size = (out_features, layout.k_padded // BLOCK_K)
        w_mult = torch.randint(1, 16, size, dtype=torch.uint8)
        if w_value is not None:
            w_mult.fill_(15)
        taps = w_mult.long().repeat_interleave(BLOCK_K, dim=1)
        weight = _unpad(rows.long() * taps, layout)
    x = torch.randint(-128, 128, (*shape, layout.in_channels), dtype=torch.int8)
    if x_value is not None:
        x.fill_(x_value)
    parts = [part.contiguous() for part in x.split(segments, dim=-1)]
    one = torch.ones(())
    options = MatmulOptions(w_mult=w_mult)
    if len(parts) == 2:
        options = replace(options, x2_q=parts[1], x2_scale=one)
    qweight = pack_int4(rows) if bits == 4 else rows
    call = Matmul(bits, parts[0], one, qweight, torch.ones(out_features), options)
    native = replace(call, qweight=prepack(qweight, bits=bits, layout=layout, backend="cpu"))
    return Case(call, native, geometry, layout, weight, x.long())


def _unpad(rows: Tensor, layout: KLayout) -> Tensor:
    """Weight [N, C, kh, kw] out of canonical rows, written from the drawing in layout.py."""
    weight = rows.new_zeros(rows.shape[0], layout.in_channels, *layout.kernel_size)
    first_k = first_channel = 0
    for channels in layout.segments:
        padded = -(-channels // BLOCK_K) * BLOCK_K
        for row in range(layout.kernel_size[0]):
            for column in range(layout.kernel_size[1]):
                part = rows[:, first_k : first_k + channels]
                weight[:, first_channel : first_channel + channels, row, column] = part
                first_k += padded
        first_channel += channels
    return weight


def call_on(call: Matmul, device: str) -> Matmul:
    """The call with its tensors on a device."""

    def move(value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    options = {f.name: move(getattr(call.options, f.name)) for f in fields(MatmulOptions)}
    moved = {f.name: move(getattr(call, f.name)) for f in fields(Matmul)}
    return Matmul(**{**moved, "options": MatmulOptions(**options)})


def triton_devices() -> list[object]:
    """Parameters of a test: the GPU if there is one, else the CPU, which interprets kernels."""
    on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
    return [on_gpu] if torch.cuda.is_available() else ["cpu"]
