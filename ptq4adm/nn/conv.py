"""Two-dimensional convolutions with packed int4 or int8 weights and int8 activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from ptq4adm import ops
from ptq4adm.errors import ShapeError, UnsupportedLayerError
from ptq4adm.nn.base import QuantizedLayer
from ptq4adm.nn.gradient import channel_scales, needs_gradient, straight_through
from ptq4adm.nn.options import LayerOptions, activation_buckets
from ptq4adm.nn.storage import check_float_layer
from ptq4adm.nn.timestep import StepIndex
from ptq4adm.ops.arguments import Conv2dKeywords
from ptq4adm.packing.layout import KLayout
from ptq4adm.quant.layers import conv_padding

Self = TypeVar("Self", bound="QuantizedConv2d")
Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvShape:
    """Sizes of one zero-padded convolution.

    Args:
        in_channels: C.
        out_channels: N.
        kernel_size: rows, columns.
        stride: rows, columns.
        padding: zeros added above and below, left and right.
        dilation: rows, columns.
        groups: parts of the channels that do not see each other; 1 for quantized layers.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Conv2d) -> ConvShape:
        """Sizes of a float convolution.

        Raises:
            UnsupportedLayerError: for padding that is not zeros, or uneven "same" padding.
        """
        reason = padding_reason(layer)
        if reason is not None:
            raise UnsupportedLayerError(f"Conv2d: {reason}; leave this layer as it is")
        return cls(
            layer.in_channels,
            layer.out_channels,
            _pair(layer.kernel_size),
            _pair(layer.stride),
            conv_padding(layer),
            _pair(layer.dilation),
            layer.groups,
        )

    def float_layer(self, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
        """The `nn.Conv2d` of these sizes that holds the given tensors."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias is not None,
            device="meta",  # its initialisation would only be overwritten
        )
        conv.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            conv.bias = nn.Parameter(bias, requires_grad=False)
        return conv

    def __str__(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name, default in (
            ("stride", (1, 1)),
            ("padding", (0, 0)),
            ("dilation", (1, 1)),
            ("groups", 1),
        ):
            value = getattr(self, name)
            text += f", {name}={value}" if value != default else ""
        return text


def padding_reason(layer: nn.Module) -> str | None:
    """Why the padding of a convolution cannot be kept, or None."""
    if not isinstance(layer, nn.Conv2d):
        return None
    if layer.padding_mode != "zeros":
        return f"padding mode {layer.padding_mode!r}, only zeros is exact in int8"
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same" and any(span % 2 for span in spans):
        return "'same' padding of an even kernel, which pads one side more"
    return None


def unsupported_reason(layer: nn.Module) -> str | None:
    """Why a layer has no quantized form, or None if it has one, as every linear does."""
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"grouped convolution ({layer.groups} groups)"
    return padding_reason(layer)


def measured_kind(shape: ConvShape) -> str | None:
    """What tables of measured times call a convolution, or None if they hold none like it."""
    if shape.dilation != (1, 1) or shape.groups != 1:
        return None
    kinds = {
        ((1, 1), (1, 1)): "conv1x1",
        ((3, 3), (1, 1)): "conv3x3",
        ((3, 3), (2, 2)): "conv3x3-stride2",
    }
    return kinds.get((shape.kernel_size, shape.stride))


class QuantizedConv2d(QuantizedLayer):
    """Drop-in for `nn.Conv2d`; use `W4A8Conv2d` or `W8A8Conv2d`.

    Takes [B, C, H, W] of any float dtype, contiguous or channels_last, and returns the same dtype
    in channels_last memory. Activations have one scale a tensor and segment.

    Args:
        shape: sizes.
        bias: whether a bias is added.
        segments: parts of C with their own activation scales; None for one.
        options: storage, activation scales, backend.
    """

    def __init__(
        self,
        shape: ConvShape,
        *,
        bias: bool = True,
        segments: tuple[int, ...] | None = None,
        options: LayerOptions | None = None,
    ) -> None:
        if shape.groups != 1:
            raise UnsupportedLayerError(
                f"{type(self).__name__}: grouped convolution ({shape.groups} groups) has no packed "
                "form; "
                "keep it in float"
            )
        layout = KLayout(segments or (shape.in_channels,), shape.kernel_size)
        super().__init__(
            layout,
            shape.out_channels,
            has_bias=bias,
            options=options or LayerOptions(),
            kind=measured_kind(shape),
        )
        self.shape = shape
        # under the names that nn.Conv2d has, for code that asks
        self.in_channels, self.out_channels = shape.in_channels, shape.out_channels
        self.kernel_size, self.stride = shape.kernel_size, shape.stride
        self.padding, self.dilation = shape.padding, shape.dilation

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
        """Quantize an `nn.Conv2d`; it is not changed.

        Args:
            layer: the float layer.
            x_scale: None for dynamic activations, one scale, or float32 [segments, buckets].
            step: which bucket is in use; needed with more than one.
            segments: parts of C with their own activation scales; None for one.
            group_size: None, or 64 (4 bits only).
            weight_observer: "squared_error", "p2.4" or "absmax".
            backend: "auto" or a backend's name.

        Raises:
            UnsupportedLayerError: if `layer` is not an `nn.Conv2d`, or is one of a kind without a
                quantized form.
            NonFiniteError: if its weight holds NaN or infinite values.
        """
        check_float_layer(layer, nn.Conv2d, cls.__name__)
        assert isinstance(layer, nn.Conv2d)
        buckets = activation_buckets(x_scale, len(segments or (0,)))
        options = LayerOptions(group_size, buckets, step, backend, layer.weight.device)
        quantized = cls(
            ConvShape.of(layer), bias=layer.bias is not None, segments=segments, options=options
        )
        quantized.set_weight(layer.weight, observer=weight_observer)
        if layer.bias is not None:
            quantized.bias = layer.bias.detach().to(torch.float32, copy=True)
        if x_scale is not None:
            quantized.set_activation_scale(x_scale)
        return quantized

    def dequantize(self) -> nn.Conv2d:
        """The `nn.Conv2d`, float32, whose weight is what the integers stand for."""
        bias = None if self.bias is None else self.bias.clone()
        return self.shape.float_layer(self.float_weight(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] or [C, H, W] to the same with N channels."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if x.dim() != 4:
            raise ShapeError(
                f"{type(self).__name__}: got input {list(x.shape)}, needs [B, C, H, W]"
            )
        self.check_input(x, 1)
        if self.is_float:
            x = x.contiguous(memory_format=torch.channels_last)
            s = self.shape
            return functional.conv2d(
                x, *self.float_tensors(x.dtype), s.stride, s.padding, s.dilation
            )
        return straight_through(self, x) if needs_gradient(x) else self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """`forward` of a checked input [B, C, H, W], without a gradient."""
        nhwc = x.permute(0, 2, 3, 1)
        if len(self.layout.segments) == 1:
            y = self.convolve(*self.quantize_input(nhwc, 0, "tensor"), out_dtype=x.dtype)
        else:
            first, second = (
                self.quantize_input(part, i, "tensor")
                for i, part in enumerate(nhwc.split(self.layout.segments, dim=3))
            )
            y = self.convolve(*first, second=second, out_dtype=x.dtype)
        return y.permute(0, 3, 1, 2)

    def input_gradient(self, x_shape: torch.Size, dy: Tensor) -> Tensor:
        """Gradient [B, C, H, W] for `dy` float32 [B, N, H', W']."""
        s = self.shape
        return conv2d_input(x_shape, self.float_weight(), dy, s.stride, s.padding, s.dilation)

    def clip_limits(self) -> Tensor | None:
        """Static scales [C, 1, 1]; None if dynamic."""
        scales = channel_scales(self)
        return None if scales is None else scales[:, None, None]

    def convolve(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        *,
        out_dtype: torch.dtype,
        second: tuple[Tensor, Tensor] | None = None,
        temb: Tensor | None = None,
        residual: Tensor | None = None,
        upsample: Pair | None = None,
    ) -> Tensor:
        """Convolve an input that is quantized already.

        Args:
            x_q: int8 NHWC [B, H, W, C], or the first segment's channels.
            x_scale: float32 [].
            out_dtype: float32, float16 or bfloat16.
            second: the same two of the second segment.
            temb: float [B, N] or [1, N], added to every pixel of a sample.
            residual: float NHWC [B, Ho, Wo, N], added in float32.
            upsample: size (H', W') to which the input is enlarged, nearest, before the convolution.

        Returns:
            NHWC [B, Ho, Wo, N] with bias.
        """
        qweight, w_scale, w_mult, bias = self.weight_tensors()
        keywords: Conv2dKeywords = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "bias": bias,
            "temb": temb,
            "residual": residual,
            "upsample": upsample,
            "out_dtype": out_dtype,
        }
        if second is not None:
            keywords["x2_q"], keywords["x2_scale"] = second
        if w_mult is not None:
            keywords["w_mult"] = w_mult
        return ops.conv2d(
            x_q,
            x_scale,
            qweight,
            w_scale,
            bits=self.bits,
            kernel_size=self.kernel_size,
            backend=self.backend,
            **keywords,
        )

    def extra_repr(self) -> str:
        """Shape, bits, activation mode and backend."""
        return f"{self.shape}, {self.describe_storage()}"


class W4A8Conv2d(QuantizedConv2d):
    """`nn.Conv2d` with packed 4-bit weights and int8 activations; see `QuantizedConv2d`."""

    bits: ClassVar[int] = 4


class W8A8Conv2d(QuantizedConv2d):
    """`nn.Conv2d` with 8-bit weights and int8 activations; see `QuantizedConv2d`."""

    bits: ClassVar[int] = 8


def _pair(values: tuple[int, ...]) -> Pair:
    rows, columns = values
    return rows, columns
