"""One matrix product's tensors on a GPU, and what it must compute, exactly, for some rows of it.

The whole result in float64 would take longer than all timing, so `ROWS` rows are computed: their
patches are gathered and multiplied in float64, which holds every partial sum of integers exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm import ops
from ptq4adm.bench.gpu_calls import layer_layout
from ptq4adm.bench.gpu_shapes import GpuLayer
from ptq4adm.bench.problem import convolve
from ptq4adm.bench.shapes import LINEAR
from ptq4adm.packing.layout import pack_int4, weight_to_rows

ROWS = 64
FLOAT16_EXACT = 2048  # float16 holds every integer up to here
SMALL = 2.0**-10  # a scale with which sums of full-range activations fit into float16
_DEVIATION = 250.0  # of the sums of sparse activations: the largest is about five times that


@dataclass(frozen=True)
class PackedWeight:
    """What an operator takes; one of several equal copies, each in memory of its own.

    Attributes:
        qweight: uint8 or int8, in the backend's order.
        w_scale: float32 [N].
        bias: float32 [N].
    """

    qweight: Tensor
    w_scale: Tensor
    bias: Tensor

    def clone(self) -> PackedWeight:
        """The same numbers elsewhere."""
        return PackedWeight(self.qweight.clone(), self.w_scale.clone(), self.bias.clone())


class GpuProblem:
    """Activations, weights and the exact result for some rows of one layer.

    Args:
        layer: the sizes.
        device: where.
        seed: of the numbers: normal weights, activations as a layer sees them.

    Attributes:
        x: float16 [M, K], or NHWC [B, H, W, C].
        x_scale: float32 [1], static.
        x_q: int8 of the shape of `x`.
    """

    def __init__(self, layer: GpuLayer, device: torch.device, *, seed: int = 0) -> None:
        self.layer, self.shape, self.device = layer, layer.shape, device
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        shape = self.shape
        self.is_linear = shape.kind == LINEAR
        kernel = (shape.kernel, shape.kernel)
        if self.is_linear:
            self.x = normal(shape.M, shape.K).half()
        else:
            size = (shape.batch, shape.height, shape.width, shape.in_channels)
            self.x = functional.silu(normal(*size)).half()
        weight = normal(shape.N, shape.in_channels, *kernel) * shape.K**-0.5
        self.weight = weight.half().float()
        self.bias = (0.1 * normal(shape.N)).half()
        self.x_scale = (self.x.float().abs().amax() / 127).reshape(1)
        self.x_q, _ = ops.quantize_int8(self.x, x_scale=self.x_scale, backend="reference")
        self._floats: list[Tensor] = []
        self._packed: dict[tuple[int, str], list[PackedWeight]] = {}

    def float_weight(self, copy: int) -> Tensor:
        """float16 [N, K], or [N, C, kh, kw] in channels_last memory."""
        while len(self._floats) <= copy:
            weight = self.weight.half()
            weight = (
                weight.flatten(1)
                if self.is_linear
                else weight.contiguous(memory_format=torch.channels_last)
            )
            self._floats.append(weight.clone(memory_format=torch.preserve_format))
        return self._floats[copy]

    def packed(self, bits: int, copy: int, backend: str) -> PackedWeight:
        """The weight as the operators of a backend take it."""
        copies = self._packed.setdefault((bits, backend), [])
        if not copies:
            rows = weight_to_rows(self.quantized(bits), layer_layout(self.layer))
            canonical = pack_int4(rows) if bits == 4 else rows
            layout = layer_layout(self.layer)
            qweight = ops.prepack(canonical, bits=bits, layout=layout, backend=backend)
            copies.append(PackedWeight(qweight, self.w_scale(bits), self.bias.float()))
        while len(copies) <= copy:
            copies.append(copies[0].clone())
        return copies[copy]

    def w_scale(self, bits: int) -> Tensor:
        """float32 [N]: the largest weight of a channel is the largest integer."""
        return self.weight.abs().amax(dim=(1, 2, 3)) / (7 if bits == 4 else 127)

    def quantized(self, bits: int) -> Tensor:
        """int8 [N, C, kh, kw]."""
        scale = self.w_scale(bits)[:, None, None, None]
        return torch.round(self.weight / scale).to(torch.int8).contiguous()

    # --- what must come out ---------------------------------------------------------------------

    @cached_property
    def rows(self) -> Tensor:
        """Rows of the product that are checked: the first, the last and some between."""
        M = self.shape.M
        if M <= ROWS:
            return torch.arange(M, device=self.device)
        generator = torch.Generator().manual_seed(M)
        some = torch.randperm(M - 2, generator=generator)[: ROWS - 2] + 1
        return torch.cat([torch.tensor([0]), some, torch.tensor([M - 1])]).to(self.device)

    def exact_rows(self, bits: int, x_q: Tensor | None = None) -> Tensor:
        """int64 [R, N]: integer sums of the checked rows.

        Args:
            bits: of the weight.
            x_q: activations; None for those of the problem.
        """
        weight = self.quantized(bits).permute(0, 2, 3, 1).flatten(1).double()
        return (self.patches(self.x_q if x_q is None else x_q) @ weight.T).round().long()

    def sparse(self, bits: int) -> Tensor:
        """int8 like `x_q`, of -1, 0 and 1: so few that float16 holds all integer sums exactly."""
        power = float(self.quantized(bits).double().square().mean()) * self.shape.K
        share = min(1.0, _DEVIATION**2 / max(power, 1e-9))
        generator = torch.Generator(self.device).manual_seed(1)
        draws = torch.rand(self.x_q.shape, generator=generator, device=self.device)
        signs = torch.where(draws < share / 2, -1, 1)
        return torch.where(draws < share, signs, 0).to(torch.int8)

    @cached_property
    def float_rows(self) -> Tensor:
        """float64 [R, N]: the float layer's result, with bias."""
        weight = self.weight.permute(0, 2, 3, 1).flatten(1).double()
        return self.patches(self.x) @ weight.T + self.bias.double()

    def pick(self, y: Tensor) -> Tensor:
        """The checked rows of a result, [R, N]."""
        return y.reshape(-1, y.shape[-1])[self.rows]

    def patches(self, x: Tensor) -> Tensor:
        """float64 [R, kh kw C]: what the checked rows multiply with the weight."""
        if self.is_linear:
            return x[self.rows].double()
        shape, (out_h, out_w) = self.shape, self.shape.out_size
        sample = self.rows // (out_h * out_w)
        row, column = self.rows % (out_h * out_w) // out_w, self.rows % out_w
        zoom = 2 if shape.is_upsampled else 1
        taps = []
        for dy in range(shape.kernel):
            for dx in range(shape.kernel):
                y = row * shape.stride + dy - shape.kernel // 2
                z = column * shape.stride + dx - shape.kernel // 2
                is_inside = (y >= 0) & (y < zoom * shape.height)
                is_inside &= (z >= 0) & (z < zoom * shape.width)
                found = x[
                    sample,
                    (y // zoom).clamp(0, shape.height - 1),
                    (z // zoom).clamp(0, shape.width - 1),
                ]
                taps.append(found.double() * is_inside[:, None])
        return torch.cat(taps, dim=1)

    # --- calls that several variants share ------------------------------------------------------

    def multiply(self, x_q: Tensor, weight: PackedWeight, bits: int, **keywords: Any) -> Tensor:
        """The operator of this layer on quantized activations; `backend` is among the keywords."""
        x_scale = keywords.pop("x_scale", self.x_scale)
        call = {"out_dtype": torch.float16, **keywords, "bits": bits}
        if self.is_linear:
            return ops.linear(x_q, x_scale, weight.qweight, weight.w_scale, **call)
        shape = self.shape
        kernel = (shape.kernel, shape.kernel)
        return ops.conv2d(
            x_q,
            x_scale,
            weight.qweight,
            weight.w_scale,
            kernel_size=kernel,
            stride=(shape.stride, shape.stride),
            padding=(shape.kernel // 2, shape.kernel // 2),
            upsample=shape.out_size if shape.is_upsampled else None,
            **call,
        )

    def float_layer(self, copy: int) -> Tensor:
        """The float16 layer: [M, N], or NHWC as a view of a channels_last result."""
        weight = self.float_weight(copy)
        if self.is_linear:
            return functional.linear(self.x, weight, self.bias)
        y = convolve(self.shape, self.x.permute(0, 3, 1, 2), weight, self.bias)
        return y.permute(0, 2, 3, 1)
