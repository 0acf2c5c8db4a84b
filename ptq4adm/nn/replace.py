"""From scheme to module and back: the one table of which class stands for which scheme."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ptq4adm.config import Scheme
from ptq4adm.errors import NonFiniteError, UnsupportedLayerError
from ptq4adm.nn.conv import ConvShape, W4A8Conv2d, W8A8Conv2d
from ptq4adm.nn.forwards import find_watcher, is_hoisted
from ptq4adm.nn.half import HalfConv2d, HalfLinear
from ptq4adm.nn.linear import W4A8Linear, W8A8Linear
from ptq4adm.nn.options import LayerOptions
from ptq4adm.nn.storage import StorageLayer
from ptq4adm.nn.timestep import StepHook, StepIndex
from ptq4adm.nn.weight_only import W8Linear

_CLASSES: dict[tuple[type[nn.Module], Scheme], type[StorageLayer]] = {
    (nn.Linear, Scheme.W4A8): W4A8Linear,
    (nn.Linear, Scheme.W8A8): W8A8Linear,
    (nn.Linear, Scheme.W8): W8Linear,
    (nn.Linear, Scheme.FLOAT): HalfLinear,
    (nn.Conv2d, Scheme.W4A8): W4A8Conv2d,
    (nn.Conv2d, Scheme.W8A8): W8A8Conv2d,
    (nn.Conv2d, Scheme.FLOAT): HalfConv2d,
}
_SCHEMES = {cls: scheme for (_, scheme), cls in _CLASSES.items()}


def scheme_of(module: nn.Module) -> Scheme | None:
    """Scheme of a replaced layer, or None for any other module."""
    return _SCHEMES.get(type(module))  # type: ignore[arg-type]


def quantized_layer(
    layer: nn.Module,
    scheme: Scheme,
    *,
    x_scale: Tensor | None,
    step: StepIndex | None,
    segments: tuple[int, ...] | None,
    group_size: int | None,
    weight_observer: str,
    backend: str,
) -> StorageLayer:
    """The module that takes the place of a float layer.

    Args:
        layer: `nn.Linear` or `nn.Conv2d`.
        scheme: how it is stored and run.
        x_scale: float32 [segments, buckets], or None for dynamic activations.
        step: which bucket is in use.
        segments: parts of the input with their own scales; None for one.
        group_size: None or 64; for W4A8 only.
        weight_observer: how weight scales are chosen.
        backend: "auto" or a backend's name.

    Raises:
        UnsupportedLayerError: if the scheme has no form for this layer.
        NonFiniteError: if its weight cannot be stored.
    """
    cls = _class_of(layer, scheme)
    if issubclass(cls, (W4A8Linear, W8A8Linear, W4A8Conv2d, W8A8Conv2d)):
        return cls.from_float(
            layer,
            x_scale=x_scale,
            step=step if x_scale is not None else None,
            segments=segments,
            group_size=group_size if scheme is Scheme.W4A8 else None,
            weight_observer=weight_observer,
            backend=backend,
        )
    if issubclass(cls, W8Linear):
        return cls.from_float(layer, weight_observer=weight_observer)
    assert issubclass(cls, (HalfLinear, HalfConv2d))
    return cls.from_float(layer)


def empty_layer(
    layer: nn.Module,
    scheme: Scheme,
    *,
    segments: tuple[int, ...] | None,
    step: StepIndex | None,
    group_size: int | None,
    backend: str,
    device: torch.device | str,
) -> StorageLayer:
    """The module of `quantized_layer`, before its tensors are loaded.

    Args:
        layer: `nn.Linear` or `nn.Conv2d`, for its sizes; may be on the meta device.
        scheme: how it is stored and run.
        segments: parts of the input with their own scales; None for one.
        step: which bucket is in use; None for dynamic activations.
        group_size: None or 64.
        backend: "auto" or a backend's name.
        device: where the new module's tensors are.

    Raises:
        UnsupportedLayerError: if the scheme has no form for this layer.
    """
    cls = _class_of(layer, scheme)
    buckets = 0 if step is None else step.buckets.count
    options = LayerOptions(group_size, buckets, step, backend, device)
    if isinstance(layer, nn.Linear):
        has_bias = layer.bias is not None
        if issubclass(cls, (W4A8Linear, W8A8Linear)):
            return cls(
                layer.in_features,
                layer.out_features,
                bias=has_bias,
                segments=segments,
                options=options,
            )
        assert issubclass(cls, (W8Linear, HalfLinear))
        return cls(layer.in_features, layer.out_features, bias=has_bias, device=device)
    assert isinstance(layer, nn.Conv2d)
    shape = ConvShape.of(layer)
    if issubclass(cls, (W4A8Conv2d, W8A8Conv2d)):
        return cls(shape, bias=layer.bias is not None, segments=segments, options=options)
    assert issubclass(cls, HalfConv2d)
    return cls(shape, bias=layer.bias is not None, device=device)


def dequantize_layers(module: nn.Module, dtype: torch.dtype) -> None:
    """Put float layers in the place of all replaced ones, and take back what was added to run them.

    Args:
        module: a quantized denoiser.
        dtype: of the new layers.
    """
    layers = {name: m for name, m in module.named_modules() if scheme_of(m) is not None}
    # nn.Module.to of the float layer: diffusers' models refuse a dtype while they are quantized
    replace_layers(module, {name: layer.dequantize().to(dtype) for name, layer in layers.items()})
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, StepHook):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def check_finite(denoiser: nn.Module) -> None:
    """Refuse a model with broken weights.

    Raises:
        NonFiniteError: if a parameter or buffer holds NaN or infinite values; names it.
    """
    for name, tensor in (*denoiser.named_parameters(), *denoiser.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"weight {name!r} {list(tensor.shape)} holds NaN or infinite values; repair or "
                "reload the model"
            )


def check_hooks(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers that someone changed in a way that their replacement would undo.

    Raises:
        UnsupportedLayerError: if a layer has hooks, or a forward of its own.
    """
    for name, layer in layers.items():
        if find_watcher(layer) is not None or is_hoisted(layer):
            raise UnsupportedLayerError(
                f"layer {name!r} has hooks or a replaced forward, which its packed form would "
                "lose; "
                "remove them, or quantize before they are added"
            )


def replace_layers(module: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put new layers in the place of old ones, under every name they have."""
    names = dict(module.named_modules())
    by_identity = {id(names[name]): new for name, new in replacements.items()}
    for parent in list(module.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in by_identity:
                setattr(parent, child_name, by_identity[id(child)])


def _class_of(layer: nn.Module, scheme: Scheme) -> type[StorageLayer]:
    cls = _CLASSES.get((type(layer), scheme))
    if cls is None:
        raise UnsupportedLayerError(f"{type(layer).__name__} has no {scheme.value} form")
    return cls
