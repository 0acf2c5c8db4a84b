"""What all fused blocks share: the record of what is fused, and the check that it still may be.

A fused block is the diffusers block with another class: same children under the same names, same
state dict, same hooks. Before each call it looks at the children whose work the operators do in
their place; if one was replaced, hooked or patched, the ordinary forward runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ptq4adm.errors import BackendUnavailableError
from ptq4adm.nn.base import QuantizedLayer
from ptq4adm.nn.conv import QuantizedConv2d
from ptq4adm.nn.forwards import are_all_watched, find_watcher
from ptq4adm.nn.linear import QuantizedLinear
from ptq4adm.nn.replace import scheme_of
from ptq4adm.ops import quantizers_of

logger = logging.getLogger(__name__)

_operators = torch.ops.ptq4adm


class Fusion:
    """What of one block is fused, and whether that still holds.

    Args:
        name: the block's name in its model, for messages.
        reasons: name of each part of the block to why it is not fused; "" if it is.
        children: dotted names, below the block, of the modules whose forward is not called.
    """

    def __init__(
        self, block: nn.Module, name: str, reasons: Mapping[str, str], children: Iterable[str]
    ) -> None:
        self.name = name
        self.reasons = dict(reasons)
        self._said: set[str] = set()
        self._children: list[tuple[nn.Module, str, str, nn.Module, type]] = []
        self._processors: list[tuple[nn.Module, str, type]] = []
        for path in children:
            parent_path, _, key = path.rpartition(".")
            child = block.get_submodule(path)
            self._children.append((block.get_submodule(parent_path), key, path, child, type(child)))
            if hasattr(child, "processor"):
                self._processors.append((child, path, type(child.processor)))

    @property
    def fused(self) -> tuple[str, ...]:
        """Names of the fused parts."""
        return tuple(part for part, reason in self.reasons.items() if not reason)

    def is_fused(self, part: str) -> bool:
        """Whether a part runs on the operators."""
        return not self.reasons[part]

    def is_broken(self) -> bool:
        """Whether a child changed since the block was fused; the first time, a warning says so."""
        found = self.find_change()
        if found is None:
            return False
        if found not in self._said:
            self._said.add(found)
            logger.warning("block %r: %s: it runs unfused as long as that is so", self.name, found)
        return True

    def describe(self) -> str:
        """Fused parts, and why the others are not, or why none is at present."""
        change = self.find_change()
        if change is not None:
            return f"unfused: {change}"
        parts = ", ".join(self.fused) or "nothing"
        others = "; ".join(f"{part}: {why}" for part, why in self.reasons.items() if why)
        return f"fused: {parts}" + (f" (unfused: {others})" if others else "")

    def find_change(self) -> str | None:
        """What happened to a child since the block was fused; None if nothing did."""
        # a few dictionary lookups a child: about 0.2 us, against some 20 us of an operator's call
        for parent, key, path, child, cls in self._children:
            if parent._modules.get(key) is not child or type(child) is not cls:
                return f"child {path!r} was replaced"
            if (found := find_watcher(child, path)) is not None:
                return found
        for module, path, cls in self._processors:
            if type(module.processor) is not cls:
                return f"the attention processor of child {path!r} was replaced"
        if are_all_watched():
            return "hooks on all modules are registered"
        return None


class FusedBlock:
    """Mixin of the fused blocks; comes before the diffusers class.

    Attributes:
        fusion: what is fused.
    """

    fusion: Fusion

    def extra_repr(self) -> str:
        """What is fused, and why the rest is not."""
        inherited: str = super().extra_repr()  # type: ignore[misc]
        return "\n".join(filter(None, (inherited, self.fusion.describe())))


def is_dropping(dropout: nn.Module) -> bool:
    """Whether a dropout changes what passes through it now."""
    return dropout.training and getattr(dropout, "p", 1.0) > 0.0


def is_quantized_linear(layer: object) -> TypeGuard[QuantizedLinear]:
    """Whether a layer is a W4A8 or W8A8 linear."""
    return isinstance(layer, QuantizedLinear)


# --- reasons ------------------------------------------------------------------------------------


def layer_reason(layer: nn.Module | None, operator: str) -> str:
    """Why a layer cannot take its input from a fused quantizer; "" if it can.

    Args:
        layer: the linear or convolution after the norm or activation.
        operator: the quantizing operator that would run before it.
    """
    if not isinstance(layer, (QuantizedLinear, QuantizedConv2d)):
        scheme = None if layer is None else scheme_of(layer)
        return f"it is {type(layer).__name__ if scheme is None else scheme}, not W4A8 or W8A8"
    if layer.is_float:
        return f"it runs in float16 ({layer.backend_reason})"
    if len(layer.layout.segments) != 1:
        return f"its input has {len(layer.layout.segments)} activation scales"
    return missing_operator(operator, layer.backend, layer.w_scale.device.type)


def layers_reason(layers: Mapping[str, nn.Module | None], operator: str) -> str:
    """The first `layer_reason` of several layers, with the layer's name; "" if there is none."""
    for name, layer in layers.items():
        reason = layer_reason(layer, operator)
        if reason:
            return f"{name}: {reason}"
    return ""


def norm_reason(norm: Any, kind: type[nn.Module]) -> str:
    """Why a norm cannot be fused; "" if it can."""
    found = type(norm)
    if found is not kind:
        return f"its norm is {found.__name__}, not {kind.__name__}"
    if norm.weight is None or norm.bias is None:
        return "its norm has no weight and bias"
    return ""


@cache
def missing_operator(operator: str, backend: str, device_type: str) -> str:
    """Why a backend cannot run an operator between layers, in its own words; "" if it can.

    The operator is asked once, with the smallest input there is.
    """
    x = torch.zeros(1, 2, 1, 1, device=device_type)
    rows = x.reshape(1, 2)
    ones = torch.ones(2, device=device_type)
    arguments: dict[str, tuple[Any, ...]] = {
        "groupnorm_silu_quantize": (x, 1, ones, ones, 1e-5),
        "layernorm_quantize": (rows, ones, ones, 1e-5),
        "geglu_quantize": (rows,),
        "quantize_int8": (rows,),
        "attention": (rows[None], rows[None], rows[None], 1),
    }
    try:
        getattr(_operators, operator)(*arguments[operator], backend=backend)
    except BackendUnavailableError as error:
        return str(error)
    return ""


# --- operators ----------------------------------------------------------------------------------


def groupnorm_quantize(
    norm: Any, layer: QuantizedLayer, x: Tensor, *, silu: bool
) -> tuple[Tensor, Tensor]:
    """Group norm of NCHW `x`, SiLU if asked, int8 NHWC with the scale of `layer`."""
    x_scale, step = layer.static_scale()
    parameters = norm._parameters
    return _operators.groupnorm_silu_quantize(
        x,
        norm.num_groups,
        parameters["weight"],
        parameters["bias"],
        norm.eps,
        x_scale=x_scale,
        step=step,
        silu=silu,
        backend=layer.backend,
    )


def layernorm_project(
    norm: Any,
    layers: Iterable[QuantizedLinear],
    x: Tensor,
    *,
    gated_for: QuantizedLinear | None = None,
) -> list[Tensor]:
    """Layer norm of rows [M, K] and the products of several layers, quantized once where it can be.

    Layers whose calibrated tables differ, as of different layers they may, get int8 of their own.
    """
    parameters = norm._parameters
    results: list[Tensor] = []
    first: QuantizedLinear | None = None
    for layer in layers:
        if first is None or not first.quantizes_like(layer):
            x_scale, step = layer.static_scale()
            x_q, scale = _operators.layernorm_quantize(
                x,
                parameters["weight"],
                parameters["bias"],
                norm.eps,
                x_scale=x_scale,
                step=step,
                backend=layer.backend,
            )
            first = layer
        results.append(layer.matmul(x_q, scale, out_dtype=x.dtype, gated_for=gated_for))
    return results


def feed_forward(norm: Any, gate: QuantizedLinear, project: QuantizedLinear, x: Tensor) -> Tensor:
    """Layer norm of rows [M, K], gated projection, projection, residual: [M, K].

    With static scales the gate, and the quantization for `project`, are in the first product's
    epilogue; measured scales need whole rows, which a tile does not have.
    """
    table, step = project.static_scale()
    dtype = x.dtype
    is_shared = quantizers_of(gate.backend) == quantizers_of(project.backend)
    if table is not None and is_shared:
        (x_q,) = layernorm_project(norm, (gate,), x, gated_for=project)
        return project.matmul(x_q, table, step=step, out_dtype=dtype, residual=x)
    (gated,) = layernorm_project(norm, (gate,), x)
    x_q, scale = _operators.geglu_quantize(gated, x_scale=table, step=step, backend=project.backend)
    return project.matmul(x_q, scale, out_dtype=dtype, residual=x)
