"""Linear layers with int8 weights and float activations: projections that run once a step.

Their speed does not matter, their size does (time projections are about 5 % of an AudioLDM UNet's
weights), and every layer after them sees their error.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.nn.decoded import DecodedWeight
from ptq4adm.nn.storage import StorageLayer, check_float_layer
from ptq4adm.quant.affine import QuantizedRows, quantize_rows

Self = TypeVar("Self", bound="W8Linear")


class W8Linear(StorageLayer, nn.Linear):
    """`nn.Linear` with int8 weights, one float32 scale an output feature; activations stay float.

    Buffers: `qweight` int8 [N, K] (not padded: no kernel reads it), `w_scale` float32 [N], `bias`
        float32 [N].

    Args:
        in_features: K.
        out_features: N.
        bias: whether a bias is added.
        device: where the weight lives.
    """

    qweight: Tensor
    w_scale: Tensor
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
        self.register_buffer(
            "qweight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        )
        self.register_buffer("w_scale", torch.ones(out_features, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)

    @classmethod
    def from_float(
        cls: type[Self], layer: nn.Module, *, weight_observer: str = "squared_error"
    ) -> Self:
        """Quantize the weight of an `nn.Linear`; the layer is not changed.

        Raises:
            UnsupportedLayerError: if `layer` is not an `nn.Linear`.
            NonFiniteError: if its weight holds NaN or infinite values.
        """
        check_float_layer(layer, nn.Linear, cls.__name__)
        assert isinstance(layer, nn.Linear)
        quantized = cls(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        rows = quantize_rows(layer.weight, bits=8, observer=weight_observer)
        quantized.qweight, quantized.w_scale = rows.w_q, rows.w_scale
        if layer.bias is not None:
            quantized.bias = layer.bias.detach().to(torch.float32, copy=True)
        return quantized

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the integers stand for, float32 [N, K]: made when asked for, read-only."""
        return self._float_weight().as_subclass(DecodedWeight)

    def dequantize(self) -> nn.Linear:
        """The `nn.Linear`, float32, whose weight is what the integers stand for."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self._float_weight(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        # the scale is applied to the product, N numbers instead of N times K; in float32, because
        # the integers' sums leave the range of float16
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = functional.linear(x.to(dtype), self.qweight.to(dtype)) * self.w_scale.to(dtype)
        return (y if self.bias is None else y + self.bias.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and storage."""
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, int8 weight only"

    def _float_weight(self) -> Tensor:
        return QuantizedRows(self.qweight, self.w_scale).dequantize()
