"""BasicTransformerBlock and Transformer2DModel of diffusers with int8 between norms and linears.

    h = x + to_out(attention(to_q(n), to_k(c), to_v(c)))    n = int8(norm(x)), c = n or the context
    y = h + net.2(int8(geglu(net.0.proj(int8(norm3(h))))))

Queries, keys and values see one int8 tensor where their scale tables are equal; attention itself
is float. Keys and values of a text may come from layers with float activations: they are computed
once a prompt. Tokens are the rows of the NHWC image, so no permutation copies anything.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm import ops
from ptq4adm.nn.conv import QuantizedConv2d
from ptq4adm.nn.forwards import recall
from ptq4adm.nn.fusing import (
    FusedBlock,
    Fusion,
    feed_forward,
    groupnorm_quantize,
    is_dropping,
    is_quantized_linear,
    layer_reason,
    layernorm_project,
    layers_reason,
    norm_reason,
)
from ptq4adm.nn.gradient import needs_gradient

_NORM = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}


class FusedBasicTransformerBlock(FusedBlock, BasicTransformerBlock):
    """A `BasicTransformerBlock` whose norms, quantizers, GEGLU and residuals are fused."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """[B, T, C] to the same; arguments as in diffusers."""
        if (
            cross_attention_kwargs
            or self._chunk_size is not None
            or not _fits(hidden_states, encoder_hidden_states)
            or self._is_dropping()
            or needs_gradient(hidden_states, encoder_hidden_states)
            or self.fusion.is_broken()
        ):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        context = encoder_hidden_states if self.only_cross_attention else None
        hidden = self._attend("attn1", hidden_states, context, attention_mask)
        if self.attn2 is not None:
            hidden = self._attend("attn2", hidden, encoder_hidden_states, encoder_attention_mask)
        if self.fusion.is_fused("ff"):
            return _feed_forward(self.norm3, self.ff, hidden)
        return self.ff(self.norm3(hidden)) + hidden

    def _attend(
        self, part: str, hidden: Tensor, context: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        norm, attention = getattr(self, _NORM[part]), getattr(self, part)
        is_text = context is not None
        if self.fusion.is_fused(part) and (is_text or is_quantized_linear(attention.to_k)):
            return _attention(norm, attention, hidden, context, mask)
        attended = attention(norm(hidden), encoder_hidden_states=context, attention_mask=mask)
        return attended + hidden

    def _is_dropping(self) -> bool:
        return self.training and any(
            is_dropping(module) for module in self.modules() if isinstance(module, nn.Dropout)
        )


class FusedTransformer2DModel(FusedBlock, Transformer2DModel):
    """A `Transformer2DModel` whose first norm and projections are fused; tokens are NHWC rows."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        """[B, C, H, W] to tokens [B, H W, inner] and the channels that diffusers asks for."""
        layer = self.proj_in
        is_dynamic_linear = is_quantized_linear(layer) and not layer.is_static
        # a dynamic linear measures each row, the norm's operator only the tensor
        if (
            not self.fusion.is_fused("proj_in")
            or is_dynamic_linear
            or needs_gradient(hidden_states)
            or self.fusion.is_broken()
        ):
            return super()._operate_on_continuous_inputs(hidden_states)
        batch, channels, height, width = hidden_states.shape
        x_q, scale = groupnorm_quantize(self.norm, layer, hidden_states, silu=False)
        dtype = hidden_states.dtype
        if is_quantized_linear(layer):
            tokens = layer.matmul(x_q.flatten(0, 2), scale, out_dtype=dtype)
            return tokens.view(batch, height * width, -1), channels
        tokens = layer.convolve(x_q, scale, out_dtype=dtype)
        return tokens.view(batch, height * width, -1), tokens.shape[3]

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        """Tokens [B, H W, inner] to [B, C, H, W], projected, plus the residual."""
        layer = self.proj_out
        if (
            not self.fusion.is_fused("proj_out")
            or needs_gradient(hidden_states, residual)
            or self.fusion.is_broken()
        ):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        nhwc, dtype = residual.permute(0, 2, 3, 1), hidden_states.dtype
        if is_quantized_linear(layer):
            x_q, scale = layer.quantize_input(hidden_states.flatten(0, 1), 0, "row")
            y = layer.matmul(x_q, scale, out_dtype=dtype, residual=nhwc.flatten(0, 2))
            y = y.view(batch_size, height, width, -1)
        else:
            tokens = hidden_states.view(batch_size, height, width, -1)
            x_q, scale = layer.quantize_input(tokens, 0, "tensor")
            y = layer.convolve(x_q, scale, out_dtype=dtype, residual=nhwc)
        return y.permute(0, 3, 1, 2)


# --- attention and feed-forward -----------------------------------------------------------------


def _attention(
    norm: nn.Module, attention: Any, x: Tensor, context: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Norm, attention over itself or a context, output projection, residual: [B, T, C]."""
    batch, _, channels = x.shape
    rows = x.reshape(-1, channels)
    to_q, to_k, to_v, to_out = (
        attention.to_q,
        attention.to_k,
        attention.to_v,
        attention.to_out[0],
    )
    if context is None:
        query, key, value = layernorm_project(norm, (to_q, to_k, to_v), rows)
        length = x.shape[1]
    else:
        (query,) = layernorm_project(norm, (to_q,), rows)
        key, value = _project_context(to_k, to_v, context)
        length = context.shape[1]
    query, key, value = (t.view(batch, -1, t.shape[-1]) for t in (query, key, value))
    if mask is None or _is_key_bias(mask, length, batch):
        bias = None if mask is None else mask[:, 0]
        backend = to_out.backend
        attended = ops.attention(query, key, value, attention.heads, bias=bias, backend=backend)
    else:
        attended = _masked_attention(attention, query, key, value, mask)
    x_q, scale = to_out.quantize_input(attended.view(rows.shape[0], -1), 0, "row")
    return to_out.matmul(x_q, scale, out_dtype=x.dtype, residual=rows).view(x.shape)


def _project_context(to_k: Any, to_v: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B L, inner] of a context [B, L, D], or what was kept of them."""
    key, value = recall(to_k, context), recall(to_v, context)
    if key is not None and value is not None:
        return key, value
    if not is_quantized_linear(to_k):
        return to_k(context), to_v(context)
    rows = context.reshape(-1, context.shape[-1])
    x_q, scale = to_k.quantize_input(rows, 0, "row")
    key = to_k.matmul(x_q, scale, out_dtype=context.dtype)
    if not to_k.quantizes_like(to_v):
        x_q, scale = to_v.quantize_input(rows, 0, "row")
    return key, to_v.matmul(x_q, scale, out_dtype=context.dtype)


def _is_key_bias(mask: Tensor, length: int, batch: int) -> bool:
    """Whether a mask is float [B, 1, L]: one number a key to add, for every head and query.

    A boolean one says which keys to keep: as a number it would be another mask.
    """
    return mask.is_floating_point() and tuple(mask.shape) == (batch, 1, length)


def _masked_attention(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> Tensor:
    """Attention under a mask of another form, as diffusers prepares it: [B, T, C]."""
    batch, length = query.shape[0], key.shape[1]
    bias = attention.prepare_attention_mask(mask, length, batch)
    query, key, value = (
        t.unflatten(2, (attention.heads, -1)).transpose(1, 2) for t in (query, key, value)
    )
    bias = bias.view(batch, attention.heads, -1, bias.shape[-1])
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attended.transpose(1, 2).flatten(2)


def _feed_forward(norm: nn.Module, layers: Any, x: Tensor) -> Tensor:
    """Norm, gated projection, projection, residual: [B, T, C]."""
    rows = x.reshape(-1, x.shape[-1])
    return feed_forward(norm, layers.net[0].proj, layers.net[2], rows).view(x.shape)


def _fits(x: Tensor, context: Any) -> bool:
    if x.dim() != 3:
        return False
    return context is None or (
        isinstance(context, Tensor) and context.dim() == 3 and context.shape[0] == x.shape[0]
    )


# --- plans --------------------------------------------------------------------------------------


def plan_transformer_block(block: Any, name: str) -> Fusion:
    """What of a `BasicTransformerBlock` can be fused, and why not the rest."""
    whole = _block_reason(block)
    reasons = {"attn1": whole or _attention_reason(block.norm1, block.attn1)}
    if block.attn2 is not None:
        reasons["attn2"] = whole or _attention_reason(block.norm2, block.attn2, is_cross=True)
    reasons["ff"] = whole or _feed_forward_reason(getattr(block, "norm3", None), block.ff)
    children: list[str] = []
    for part in ("attn1", "attn2"):
        if not reasons.get(part, "no such part"):
            inner = ("to_q", "to_k", "to_v", "to_out", "to_out.0", "to_out.1")
            children += [_NORM[part], part, *(f"{part}.{child}" for child in inner)]
    if not reasons["ff"]:
        net = ("net", "net.0.proj", *(f"net.{i}" for i in range(len(block.ff.net))))
        children += [_NORM["ff"], "ff", *(f"ff.{child}" for child in net)]
    return Fusion(block, name, reasons, children)


def plan_transformer(model: Any, name: str) -> Fusion:
    """What of a `Transformer2DModel` can be fused, besides its blocks, and why not the rest."""
    whole = ""
    if not model.is_input_continuous:
        whole = "its input is not an image"
    elif not hasattr(Transformer2DModel, "_operate_on_continuous_inputs"):
        whole = "this diffusers has another structure"
    reasons = {
        "proj_in": whole
        or norm_reason(model.norm, nn.GroupNorm)
        or _projection_reason(model.proj_in, "groupnorm_silu_quantize"),
        "proj_out": whole or _projection_reason(model.proj_out, "quantize_int8"),
    }
    children = {"proj_in": ["norm", "proj_in"], "proj_out": ["proj_out"]}
    fused = [child for part, inner in children.items() if not reasons[part] for child in inner]
    return Fusion(model, name, reasons, fused)


def _projection_reason(layer: Any, operator: str) -> str:
    if isinstance(layer, QuantizedConv2d) and (layer.kernel_size, layer.stride, layer.padding) != (
        (1, 1),
        (1, 1),
        (0, 0),
    ):
        return "it is not a 1x1 convolution"
    return layer_reason(layer, operator)


def _block_reason(block: Any) -> str:
    if block.norm_type != "layer_norm":
        return f"its norm_type is {block.norm_type!r}, not 'layer_norm'"
    if block.pos_embed is not None:
        return "it adds positional embeddings"
    if hasattr(block, "fuser"):
        return "its attention is gated"
    return ""


def _attention_reason(norm: Any, attention: Any, *, is_cross: bool = False) -> str:
    if type(attention) is not Attention:
        return f"it is {type(attention).__name__}, not Attention"
    if type(attention.processor) is not AttnProcessor2_0:
        return f"its processor is {type(attention.processor).__name__}, not AttnProcessor2_0"
    extra = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    for name in extra:
        if getattr(attention, name, None) is not None:
            return f"it has {name}"
    if attention.residual_connection or attention.rescale_output_factor != 1.0:
        return "it adds or rescales its own residual"
    if attention.to_out is None or attention.to_k is None:
        return "it lacks a projection"
    layers = {
        "to_q": attention.to_q,
        "to_k": attention.to_k,
        "to_v": attention.to_v,
        "to_out.0": attention.to_out[0],
    }
    if is_cross and not any(map(is_quantized_linear, (attention.to_k, attention.to_v))):
        del layers["to_k"], layers["to_v"]
    reason = layers_reason(layers, "layernorm_quantize") or norm_reason(norm, nn.LayerNorm)
    reason = reason or layers_reason({"to_out.0": layers["to_out.0"]}, "attention")
    if not reason and attention.to_k.out_features != attention.to_q.out_features:
        reason = "its keys have other sizes than its queries"
    if not reason:
        # compared now, so that a traced call finds the answers
        projections = filter(is_quantized_linear, (attention.to_q, attention.to_k, attention.to_v))
        for first, second in combinations(projections, 2):
            first.quantizes_like(second)
    return reason


def _feed_forward_reason(norm: Any, feed_forward: Any) -> str:
    if type(feed_forward) is not FeedForward or type(feed_forward.net[0]) is not GEGLU:
        return "it is not a GEGLU feed-forward"
    layers = {"net.0.proj": feed_forward.net[0].proj}
    return (
        norm_reason(norm, nn.LayerNorm)
        or layers_reason(layers, "layernorm_quantize")
        or layers_reason({"net.2": feed_forward.net[2]}, "geglu_quantize")
    )
