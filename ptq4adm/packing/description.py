"""What a quantized denoiser says of itself: the entry `quantization_config`, and back from it.

The entry names the scheme of every replaced layer, so the layers are rebuilt from it alone. It
holds no prompt. Files are `ptq4adm.packing.checkpoint`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptq4adm.config import FORMAT_VERSION, METHOD, QuantConfig, Scheme
from ptq4adm.errors import (
    CheckpointError,
    CheckpointVersionError,
    ConfigError,
    UnknownBackendError,
)
from ptq4adm.nn import QuantizedLayer, StepIndex, StorageLayer, attach_step_hook, find_step
from ptq4adm.nn.fuse import unfuse_blocks
from ptq4adm.nn.replace import dequantize_layers, empty_layer, replace_layers, scheme_of
from ptq4adm.nn.timestep import TimestepBuckets

_STATE = "_ptq4adm_state"


@dataclass(frozen=True)
class QuantState:
    """What a quantized denoiser remembers beside its layers.

    Attributes:
        config: what was asked for.
        calibration: digest of the calibration; None if activations are dynamic.
    """

    config: QuantConfig
    calibration: str | None


def mark_quantized(denoiser: nn.Module, state: QuantState) -> None:
    """Remember how a denoiser was quantized, as diffusers' own quantizers do it too.

    Its config gets the entry without which a folder written by diffusers' `save_pretrained` would
    be loaded with random weights, and the model `hf_quantizer` and `quantization_method`. It is not
    given `is_quantized`: with it, diffusers refuses `.half()`, `.to(dtype)` and
    `save_lora_adapter`, all of which these layers take, for their tensors keep their dtypes.
    """
    setattr(denoiser, _STATE, state)
    register = getattr(denoiser, "register_to_config", None)
    if register is None:
        return
    described = quantization_config(denoiser)
    register(quantization_config=described)
    registry = sys.modules.get("diffusers.quantizers.auto")
    if registry is not None and METHOD in registry.AUTO_QUANTIZER_MAPPING:
        quantizer = registry.DiffusersAutoQuantizer.from_config(described, pre_quantized=True)
        denoiser.hf_quantizer = quantizer
        denoiser.__dict__.pop("is_quantized", None)
        denoiser.quantization_method = quantizer.quantization_config.quant_method


def dequantize(denoiser: nn.Module) -> nn.Module:
    """Give a quantized denoiser its float layers back, in place.

    They hold the weights that the integers stand for, not those from before, in the dtype of the
    model's other parameters. What is saved afterwards is an ordinary float model.

    Raises:
        ConfigError: if the denoiser is not quantized, or adapters are attached to it.
    """
    if not is_quantized(denoiser):
        raise ConfigError(f"{type(denoiser).__name__} is not quantized; there is nothing to undo")
    check_no_adapters(denoiser)
    unfuse_blocks(denoiser)
    parameters = (p.dtype for p in denoiser.parameters() if p.is_floating_point())
    dequantize_layers(denoiser, next(parameters, torch.float32))
    for name in (_STATE, "hf_quantizer", "quantization_method"):
        denoiser.__dict__.pop(name, None)
    config = getattr(denoiser, "_internal_dict", None)
    if isinstance(config, Mapping):
        rest = {key: value for key, value in config.items() if key != "quantization_config"}
        denoiser._internal_dict = type(config)(rest)  # type: ignore[call-arg, assignment]
    return denoiser


def check_no_adapters(denoiser: nn.Module) -> None:
    """Refuse a model whose layers somebody wrapped: their names are not the model's.

    Raises:
        ConfigError: naming the first.
    """
    wrapped = [n for n, module in denoiser.named_modules() if n.endswith(".base_layer")]
    if wrapped:
        raise ConfigError(
            f"{type(denoiser).__name__} has adapters ({len(wrapped)} layers, such as "
            f"{wrapped[0].removesuffix('.base_layer')!r}); save them with save_lora_adapter and "
            "remove them (unload_lora) first"
        )


def is_quantized(denoiser: nn.Module) -> bool:
    """Whether the layers of a denoiser were replaced."""
    return any(isinstance(module, StorageLayer) for module in denoiser.modules())


def quantization_config(denoiser: nn.Module) -> dict[str, Any]:
    """The JSON-safe description from which `load_denoiser` rebuilds the layers.

    Raises:
        ConfigError: if the denoiser was not quantized by `ptq4adm.quantize`.
    """
    state = getattr(denoiser, _STATE, None)
    if state is None:
        raise ConfigError(
            f"{type(denoiser).__name__} is not quantized; call ptq4adm.quantize first"
        )
    schemes: dict[str, list[str]] = {}
    segments: dict[str, list[int]] = {}
    dynamic: list[str] = []
    rows: dict[str, int] = {}
    for name, module in denoiser.named_modules():
        scheme = scheme_of(module)
        if scheme is None:
            continue
        schemes.setdefault(scheme.value, []).append(name)
        layout = getattr(module, "layout", None)
        if layout is not None and len(layout.segments) > 1:
            segments[name] = list(layout.segments)
        if scheme in (Scheme.W4A8, Scheme.W8A8) and not getattr(module, "is_static", False):
            dynamic.append(name)
        if isinstance(module, QuantizedLayer) and module.rows is not None:
            rows[name] = module.rows
    step = find_step(denoiser)
    buckets = None
    if step is not None:
        buckets = {
            "num_train_timesteps": step.buckets.num_train_timesteps,
            "calibrated": list(step.buckets.calibrated),
        }
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "config": state.config.to_dict(),
        "schemes": schemes,
        "segments": segments,
        "dynamic": dynamic,
        "buckets": buckets,
        "calibration": state.calibration,
        **({"rows": rows} if rows else {}),
    }


def check_version(where: str, described: Any) -> None:
    """Refuse a `quantization_config` that this version does not read.

    Args:
        where: for the message, a file's name.
        described: the entry.

    Raises:
        CheckpointVersionError: if its method or version is another.
        CheckpointError: if it is not an object.
    """
    if not isinstance(described, Mapping):
        raise CheckpointError(f"{where}: no quantization_config; this model is not quantized")
    method, version = described.get("quant_method"), described.get("format_version")
    if method != METHOD:
        raise CheckpointVersionError(
            f"{where}: quantized by {method!r}, this package reads {METHOD!r}; load it with its "
            "own package"
        )
    if version != FORMAT_VERSION:
        raise CheckpointVersionError(
            f"{where}: checkpoint format {version!r}, this version of ptq4adm reads "
            f"{FORMAT_VERSION}; "
            "upgrade ptq4adm, or quantize the float model again"
        )


def build_layers(
    denoiser: nn.Module,
    described: Mapping[str, Any],
    *,
    where: str,
    backend: str,
    device: torch.device | str,
) -> QuantState:
    """Put the layers of a `quantization_config` into a float model, before their tensors are read.

    Args:
        denoiser: the model, which may be on the meta device.
        described: the entry, of a version that is read here.
        where: for messages, a file's name.
        backend: "auto" or a backend's name.
        device: of the new layers; "meta" makes them without memory.

    Returns:
        What the denoiser is to remember.

    Raises:
        CheckpointError: if the entry is inconsistent, or another model's.
        UnknownBackendError: if the backend is unknown.
    """
    try:
        _replace_with_empty(denoiser, described, backend, torch.device(device))
        return QuantState(QuantConfig.from_dict(described["config"]), described.get("calibration"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # the backend is the caller's word, not the file's
        if isinstance(error, (CheckpointError, UnknownBackendError)):
            raise
        raise CheckpointError(f"{where}: broken quantization_config ({error!r})") from error


def _replace_with_empty(
    denoiser: nn.Module, described: Mapping[str, Any], backend: str, device: torch.device
) -> None:
    step = None
    if described["buckets"] is not None:
        buckets = TimestepBuckets(
            int(described["buckets"]["num_train_timesteps"]),
            tuple(bool(c) for c in described["buckets"]["calibrated"]),
        )
        # it is no tensor of the file: it must exist, wherever the layers will be
        step = StepIndex(buckets, "cpu" if device.type == "meta" else device)
        attach_step_hook(denoiser, step)
    group_size = described["config"].get("group_size")
    dynamic = set(described["dynamic"])
    modules = dict(denoiser.named_modules())
    rows = described.get("rows", {})
    replacements = {}
    for scheme, names in described["schemes"].items():
        for name in names:
            if name not in modules:
                raise CheckpointError(
                    f"quantization_config names layer {name!r}, which the model does not have"
                )
            segments = described["segments"].get(name)
            replacements[name] = empty_layer(
                modules[name],
                Scheme(scheme),
                segments=None if segments is None else tuple(int(s) for s in segments),
                step=None if name in dynamic else step,
                group_size=group_size if scheme == Scheme.W4A8.value else None,
                backend=backend,
                device=device,
            )
            if name in rows:
                _expect_rows(name, replacements[name], rows[name])
    unknown = sorted(set(rows) - set(replacements))
    if unknown:
        raise CheckpointError(
            f"quantization_config: rows of layer {unknown[0]!r}, which `schemes` does not name"
        )
    replace_layers(denoiser, replacements)


def _expect_rows(name: str, layer: nn.Module, rows: Any) -> None:
    if not isinstance(layer, QuantizedLayer) or type(rows) is not int or rows < 1:
        raise CheckpointError(
            f"quantization_config: rows of layer {name!r} = {rows!r}, needs a whole number of at "
            "least 1 of a W4A8 or W8A8 layer"
        )
    layer.expect_rows(rows)
