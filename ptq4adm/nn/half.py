"""Layers that stay float: stored in float16, converted to the input's dtype at each call.

On a CPU, which computes in float32, this halves what such layers occupy for a conversion that costs
little beside their product. A layer that already is float16 loses nothing.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.errors import NonFiniteError
from ptq4adm.nn.conv import ConvShape
from ptq4adm.nn.storage import StorageLayer, check_float_layer

LinearSelf = TypeVar("LinearSelf", bound="HalfLinear")
ConvSelf = TypeVar("ConvSelf", bound="HalfConv2d")


class HalfLinear(StorageLayer, nn.Linear):
    """`nn.Linear` stored in float16.

    Args:
        in_features: K.
        out_features: N.
        bias: whether a bias is added.
        device: where the weight lives.
    """

    weight: Tensor
    bias: Tensor | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        _allocate(self, (out_features, in_features), bias, device)

    @classmethod
    def from_float(cls: type[LinearSelf], layer: nn.Module) -> LinearSelf:
        """Store an `nn.Linear` in float16; it is not changed.

        Raises:
            NonFiniteError: if a weight is not finite, or too large for float16.
        """
        check_float_layer(layer, nn.Linear, cls.__name__)
        assert isinstance(layer, nn.Linear)
        half = cls(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        half.weight, half.bias = _to_half(layer.weight), _to_half_or_none(layer.bias)
        return half

    def dequantize(self) -> nn.Linear:
        """The same layer as a float32 `nn.Linear`."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.weight.to(torch.float32), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(torch.float32), requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        """Shape and storage."""
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, stored in float16"


class HalfConv2d(StorageLayer):
    """Zero-padded `nn.Conv2d`, grouped or not, stored in float16.

    Args:
        shape: sizes.
        bias: whether a bias is added.
        device: where the weight lives.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, shape: ConvShape, *, bias: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.shape = shape
        self.in_channels, self.out_channels = shape.in_channels, shape.out_channels
        weight_shape = (shape.out_channels, shape.in_channels // shape.groups, *shape.kernel_size)
        _allocate(self, weight_shape, bias, device)

    @classmethod
    def from_float(cls: type[ConvSelf], layer: nn.Module) -> ConvSelf:
        """Store an `nn.Conv2d` in float16; it is not changed.

        Raises:
            UnsupportedLayerError: if it pads with something else than zeros.
            NonFiniteError: if a weight is not finite, or too large for float16.
        """
        check_float_layer(layer, nn.Conv2d, cls.__name__)
        assert isinstance(layer, nn.Conv2d)
        half = cls(ConvShape.of(layer), bias=layer.bias is not None, device="meta")
        half.weight, half.bias = _to_half(layer.weight), _to_half_or_none(layer.bias)
        return half

    def dequantize(self) -> nn.Conv2d:
        """The same layer as a float32 `nn.Conv2d`."""
        bias = None if self.bias is None else self.bias.to(torch.float32)
        return self.shape.float_layer(self.weight.to(torch.float32), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, N, H', W'] in channels_last memory, as the packed layers give."""
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        s = self.shape
        return functional.conv2d(
            x, self.weight.to(x.dtype), bias, s.stride, s.padding, s.dilation, s.groups
        )

    def extra_repr(self) -> str:
        """Shape and storage."""
        return f"{self.shape}, bias={self.bias is not None}, stored in float16"


def _allocate(
    layer: nn.Module, weight_shape: tuple[int, ...], has_bias: bool, device: torch.device | str
) -> None:
    half = torch.float16
    layer.register_buffer("weight", torch.zeros(weight_shape, dtype=half, device=device))
    layer.register_buffer(
        "bias", torch.zeros(weight_shape[0], dtype=half, device=device) if has_bias else None
    )


def _to_half(values: Tensor) -> Tensor:
    half = values.detach().to(torch.float16, copy=True)
    if not bool(torch.isfinite(half).all()):
        raise NonFiniteError(
            f"weight {list(values.shape)} holds values that are not finite in float16 (largest: "
            "65504); "
            "repair the model first"
        )
    return half


def _to_half_or_none(values: Tensor | None) -> Tensor | None:
    return None if values is None else _to_half(values)
