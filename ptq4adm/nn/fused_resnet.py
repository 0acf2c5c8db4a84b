"""ResnetBlock2D of diffusers with int8 between its norms and its convolutions.

    x_q = int8(silu(norm1(x)));  h = conv1(x_q) + bias + time_emb_proj(silu(temb))
    h_q = int8(silu(norm2(h)));  y = conv2(h_q) + bias + residual

where residual is x, or conv_shortcut(x): a shortcut sees the raw skip concatenation, each half
quantized with its own scale. Everything between is channels_last.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ptq4adm.nn.conv import QuantizedConv2d
from ptq4adm.nn.fusing import (
    FusedBlock,
    Fusion,
    groupnorm_quantize,
    is_dropping,
    layer_reason,
    norm_reason,
)
from ptq4adm.nn.gradient import needs_gradient

_OPERATOR = "groupnorm_silu_quantize"


class FusedResnetBlock2D(FusedBlock, ResnetBlock2D):
    """A `ResnetBlock2D` whose norms, SiLUs, quantizers, shift and residual are fused."""

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """[B, C, H, W] to [B, N, H, W] in channels_last memory; arguments as in diffusers."""
        if (
            args
            or kwargs
            or not _fits(self, input_tensor, temb)
            or is_dropping(self.dropout)
            or needs_gradient(input_tensor, temb)
            or self.fusion.is_broken()
        ):
            return super().forward(input_tensor, temb, *args, **kwargs)
        shift = None
        if temb is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        hidden = self._first(input_tensor, shift)
        residual = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return self._second(hidden, residual)

    def _first(self, x: Tensor, shift: Tensor | None) -> Tensor:
        if not self.fusion.is_fused("conv1"):
            hidden = self.conv1(self.nonlinearity(self.norm1(x)))
            return hidden if shift is None else hidden + shift[:, :, None, None]
        x_q, scale = groupnorm_quantize(self.norm1, self.conv1, x, silu=True)
        y = self.conv1.convolve(x_q, scale, out_dtype=x.dtype, temb=shift)
        return y.permute(0, 3, 1, 2)

    def _second(self, x: Tensor, residual: Tensor) -> Tensor:
        if not self.fusion.is_fused("conv2"):
            return residual + self.conv2(self.nonlinearity(self.norm2(x)))
        x_q, scale = groupnorm_quantize(self.norm2, self.conv2, x, silu=True)
        nhwc = residual.permute(0, 2, 3, 1)
        y = self.conv2.convolve(x_q, scale, out_dtype=x.dtype, residual=nhwc)
        return y.permute(0, 3, 1, 2)


def plan_resnet(block: nn.Module, name: str) -> Fusion:
    """What of a `ResnetBlock2D` can be fused, and why not the rest."""
    whole = _whole_reason(block)
    reasons = {
        f"conv{i}": whole
        or norm_reason(getattr(block, f"norm{i}"), nn.GroupNorm)
        or _conv_reason(getattr(block, f"conv{i}"))
        for i in (1, 2)
    }
    children = ["nonlinearity", "dropout"]
    for i in (1, 2):
        if not reasons[f"conv{i}"]:
            children += [f"norm{i}", f"conv{i}"]
    return Fusion(block, name, reasons, children)


def _whole_reason(block: Any) -> str:
    if block.up or block.down:
        return "it resamples between norm and convolution"
    if block.time_embedding_norm != "default":
        return f"its time_embedding_norm is {block.time_embedding_norm!r}, not 'default'"
    if block.output_scale_factor != 1.0:
        return f"its output_scale_factor is {block.output_scale_factor}, not 1"
    if type(block.nonlinearity) is not nn.SiLU:
        return f"its nonlinearity is {type(block.nonlinearity).__name__}, not SiLU"
    return ""


def _conv_reason(conv: nn.Module) -> str:
    if not isinstance(conv, QuantizedConv2d):
        return layer_reason(conv, _OPERATOR)
    if (conv.kernel_size, conv.padding, conv.stride) != ((3, 3), (1, 1), (1, 1)):
        return "it does not keep the size"
    return layer_reason(conv, _OPERATOR)


def _fits(block: Any, x: Tensor, temb: Tensor | None) -> bool:
    """Whether the arguments are the usual ones; diffusers' forward answers for all others."""
    if x.dim() != 4:
        return False
    if temb is None or block.time_emb_proj is None:
        return temb is None and block.time_emb_proj is None
    # the operator would spread two rows over four samples, where broadcasting refuses
    return temb.dim() == 2 and temb.shape[0] in (1, x.shape[0])
