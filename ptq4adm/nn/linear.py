"""Linear layers with packed int4 or int8 weights and int8 activations."""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm import ops
from ptq4adm.nn.base import QuantizedLayer
from ptq4adm.nn.decoded import DecodedWeight
from ptq4adm.nn.gradient import channel_scales, needs_gradient, straight_through
from ptq4adm.nn.options import LayerOptions, activation_buckets
from ptq4adm.nn.storage import check_float_layer
from ptq4adm.nn.timestep import StepIndex
from ptq4adm.ops.arguments import LinearKeywords
from ptq4adm.packing.layout import KLayout

Self = TypeVar("Self", bound="QuantizedLinear")


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """Drop-in for `nn.Linear`; use `W4A8Linear` or `W8A8Linear`.

    Takes [..., K] of any float dtype and returns [..., N] of the same. Activations are quantized
    per row if dynamic, per tensor with the table's scale if static.

    Args:
        in_features: K.
        out_features: N.
        bias: whether a bias is added.
        segments: parts of K with their own activation scales; None for one.
        options: storage, activation scales, backend.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        segments: tuple[int, ...] | None = None,
        options: LayerOptions | None = None,
    ) -> None:
        layout = KLayout(segments or (in_features,))
        super().__init__(
            layout, out_features, has_bias=bias, options=options or LayerOptions(), kind="linear"
        )
        self.in_features = in_features

    @classmethod
    def from_float(
        cls: type[Self],
        layer: nn.Module,
        *,
        x_scale: Tensor | None = None,
        step: StepIndex | None = None,
        segments: tuple[int, ...] | None = None,
        group_size: int | None = None,
        weight_observer: str = "squared_error",
        backend: str = "auto",
    ) -> Self:
        """Quantize an `nn.Linear`; it is not changed.

        Args:
            layer: the float layer.
            x_scale: None for dynamic activations, one scale, or float32 [segments, buckets].
            step: which bucket is in use; needed with more than one.
            segments: parts of K with their own activation scales; None for one.
            group_size: None, or 64 (4 bits only).
            weight_observer: "squared_error", "p2.4" or "absmax".
            backend: "auto" or a backend's name.

        Raises:
            UnsupportedLayerError: if `layer` is not an `nn.Linear`.
            NonFiniteError: if its weight holds NaN or infinite values.
        """
        check_float_layer(layer, nn.Linear, cls.__name__)
        assert isinstance(layer, nn.Linear)
        buckets = activation_buckets(x_scale, len(segments or (0,)))
        options = LayerOptions(group_size, buckets, step, backend, layer.weight.device)
        quantized = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            segments=segments,
            options=options,
        )
        quantized.set_weight(layer.weight, observer=weight_observer)
        if layer.bias is not None:
            quantized.bias = layer.bias.detach().to(torch.float32, copy=True)
        if x_scale is not None:
            quantized.set_activation_scale(x_scale)
        return quantized

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the integers stand for, float32 [N, K]: made when asked for, read-only."""
        return self.float_weight().flatten(1).as_subclass(DecodedWeight)

    def dequantize(self) -> nn.Linear:
        """The `nn.Linear`, float32, whose weight is what the integers stand for."""
        # made on meta: its initialisation would only be overwritten
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.float_weight().flatten(1), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        self.check_input(x, -1)
        if self.is_float:
            weight, bias = self.float_tensors(x.dtype)
            return functional.linear(x, weight.flatten(1), bias)
        return straight_through(self, x) if needs_gradient(x) else self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """`forward` of a checked input, without a gradient."""
        rows = x.reshape(-1, self.in_features)
        if len(self.layout.segments) == 1:
            y = self.matmul(*self.quantize_input(rows, 0, "row"), out_dtype=x.dtype)
        else:
            first, second = (
                self.quantize_input(part, i, "row")
                for i, part in enumerate(rows.split(self.layout.segments, dim=1))
            )
            y = self.matmul(*first, second=second, out_dtype=x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def input_gradient(self, x_shape: torch.Size, dy: Tensor) -> Tensor:
        """`dy W` [..., K] for `dy` float32 [..., N]."""
        return (dy @ self.float_weight().flatten(1)).reshape(x_shape)

    def clip_limits(self) -> Tensor | None:
        """Static scales [K]; None if dynamic."""
        return channel_scales(self)

    def matmul(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        *,
        out_dtype: torch.dtype,
        second: tuple[Tensor, Tensor] | None = None,
        residual: Tensor | None = None,
        step: Tensor | None = None,
        gated_for: QuantizedLinear | None = None,
    ) -> Tensor:
        """Multiply an input that is quantized already.

        Args:
            x_q: int8 [M, K], or the first segment's columns.
            x_scale: float32 [] or [M], or a table with `step`.
            out_dtype: float32, float16 or bfloat16.
            second: the same two of the second segment.
            residual: float [M, N], added in float32.
            step: int64, the row of scale tables.
            gated_for: a layer with static activation scales: gate the result with GELU and quantize
                it as that layer's input.

        Returns:
            [M, N] with bias; int8 [M, N / 2] with `gated_for`.
        """
        qweight, w_scale, w_mult, bias = self.weight_tensors()
        keywords: LinearKeywords = {"bias": bias, "out_dtype": out_dtype}
        if second is not None:
            keywords["x2_q"], keywords["x2_scale"] = second
        if w_mult is not None:
            keywords["w_mult"] = w_mult
        if residual is not None:
            keywords["residual"] = residual
        if gated_for is not None:
            keywords["geglu"] = True
            keywords["out_scale"], step = gated_for.static_scale()
        if step is not None:
            keywords["step"] = step
        return ops.linear(
            x_q,
            x_scale,
            qweight,
            w_scale,
            bits=self.bits,
            backend=self.backend,
            **keywords,
        )

    def extra_repr(self) -> str:
        """Shape, bits, activation mode and backend."""
        return f"{self.in_features}, {self.out_features}, {self.describe_storage()}"


class W4A8Linear(QuantizedLinear):
    """`nn.Linear` with packed 4-bit weights and int8 activations; see `QuantizedLinear`."""

    bits: ClassVar[int] = 4


class W8A8Linear(QuantizedLinear):
    """`nn.Linear` with 8-bit weights and int8 activations; see `QuantizedLinear`."""

    bits: ClassVar[int] = 8
