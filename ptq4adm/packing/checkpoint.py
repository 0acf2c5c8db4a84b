"""A quantized denoiser on disk: one folder in diffusers' layout.

    config.json                            the model's config, and `quantization_config`
    diffusion_pytorch_model.safetensors    its state dict; weights canonical, as `packing.layout`
    says

`quantization_config` names the scheme of every replaced layer, so the model is rebuilt from it
alone; everything is compared with the file's header before a tensor is read, and nothing is
half-loaded. It holds no prompt.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ptq4adm.config import QuantConfig, Scheme
from ptq4adm.errors import (
    CheckpointError,
    CheckpointShapeError,
    CheckpointVersionError,
    ConfigError,
    MissingComponentError,
    OutputError,
    TruncatedCheckpointError,
    UnknownBackendError,
)
from ptq4adm.nn import QuantizedLayer, StepIndex, StorageLayer, attach_step_hook, find_step
from ptq4adm.nn.fuse import fuse_blocks
from ptq4adm.nn.replace import empty_layer, replace_layers, scheme_of
from ptq4adm.nn.timestep import TimestepBuckets
from ptq4adm.packing.portions import fill

METHOD = "ptq4adm"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
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
    """Remember how a denoiser was quantized, in its diffusers config too, if it has one.

    With that entry, a folder written by diffusers' own `save_pretrained` is refused by a diffusers
    that does not know the method, and not loaded with random weights.
    """
    setattr(denoiser, _STATE, state)
    register = getattr(denoiser, "register_to_config", None)
    if register is not None:
        register(quantization_config=quantization_config(denoiser))


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


def save_denoiser(denoiser: nn.Module, folder: str | Path) -> None:
    """Write a quantized denoiser into a folder, which is made if it is missing.

    Raises:
        ConfigError: if the denoiser is not quantized, or has no config.
        OutputError: if the folder cannot be written.
    """
    described = quantization_config(denoiser)
    config = getattr(denoiser, "config", None)
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"{type(denoiser).__name__} has no config to save; it must be a diffusers model"
        )
    content = {k: v for k, v in config.items() if k not in ("_use_default_values", "_name_or_path")}
    content = {"_class_name": type(denoiser).__name__, **content, "quantization_config": described}
    # copies: two names of one tensor are stored twice rather than refused
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in denoiser.state_dict().items()
    }
    metadata = {"format": "pt", "quant_method": METHOD, "format_version": str(FORMAT_VERSION)}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
        # safetensors makes files that only their owner can read, whatever the umask says
        shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{folder}: cannot be written ({error}); choose another output"
        ) from error


def load_denoiser(
    folder: str | Path,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Read a quantized denoiser.

    Args:
        folder: as written by `save_denoiser`.
        backend: "auto" or a backend's name.
        device: where it goes.
        dtype: of the tensors that are not part of a replaced layer.

    Returns:
        The model in evaluation mode.

    Raises:
        MissingComponentError: if a file is missing.
        CheckpointVersionError: if the method or version is unknown.
        TruncatedCheckpointError: if a file is cut short.
        CheckpointShapeError: if a tensor has another shape or dtype than the config asks for.
        CheckpointError: if tensors are missing or unexpected, or the config is inconsistent.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    described = config.pop("quantization_config", None)
    _check_version(folder, described)
    denoiser = _build(folder, config)
    try:
        _replace_with_empty(denoiser, described, backend, device)
        state = QuantState(QuantConfig.from_dict(described["config"]), described.get("calibration"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # the backend is the caller's word, not the file's
        if isinstance(error, (CheckpointError, UnknownBackendError)):
            raise
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: broken quantization_config ({error!r})"
        ) from error
    _load_tensors(folder / WEIGHTS_FILE, denoiser, dtype, device)
    mark_quantized(denoiser, state)
    fuse_blocks(denoiser)
    return denoiser.requires_grad_(False).eval()


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingComponentError(f"{path}: missing; copy the whole model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TruncatedCheckpointError(
            f"{path}: cut short or not JSON ({error}); copy the model again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: got a {type(config).__name__}, needs a JSON object")
    return config


def _check_version(folder: Path, described: Any) -> None:
    if not isinstance(described, dict):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: no quantization_config; this model is not quantized"
        )
    method, version = described.get("quant_method"), described.get("format_version")
    if method != METHOD:
        raise CheckpointVersionError(
            f"{folder}: quantized by {method!r}, this package reads {METHOD!r}; load it with its "
            "own package"
        )
    if version != FORMAT_VERSION:
        raise CheckpointVersionError(
            f"{folder}: checkpoint format {version!r}, this version of ptq4adm reads "
            f"{FORMAT_VERSION}; "
            "upgrade ptq4adm, or quantize the float model again"
        )


def _build(folder: Path, config: dict[str, Any]) -> nn.Module:
    """The model without memory for its tensors."""
    import diffusers

    name = config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "from_config")):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: class {name!r} is not a model of the installed diffusers"
        )
    try:
        with torch.device("meta"):
            denoiser: nn.Module = cls.from_config(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: {name} cannot be made from it ({error})"
        ) from error
    return denoiser


def _replace_with_empty(
    denoiser: nn.Module, described: dict[str, Any], backend: str, device: torch.device | str
) -> None:
    step = None
    if described["buckets"] is not None:
        buckets = TimestepBuckets(
            int(described["buckets"]["num_train_timesteps"]),
            tuple(bool(c) for c in described["buckets"]["calibrated"]),
        )
        step = StepIndex(buckets, device)
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


def _expected_tensors(denoiser: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape of every tensor of the state dict, and its dtype if that is fixed."""
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for prefix, module in denoiser.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, StorageLayer):
            expected.update({dot + name: spec for name, spec in module.stored_tensors().items()})
            continue
        own = dict(module.named_parameters(recurse=False))
        own.update(
            (name, buffer)
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        )
        expected.update({dot + name: (tuple(tensor.shape), None) for name, tensor in own.items()})
    return expected


def _load_tensors(
    path: Path, denoiser: nn.Module, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Fill the model from the file, after its header was compared with what the model needs."""
    if not path.is_file():
        raise MissingComponentError(f"{path}: missing; copy the whole model folder")
    expected = _expected_tensors(denoiser)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            _check_tensors(path, {name: file.get_slice(name) for name in file.keys()}, expected)
        fill(denoiser, expected, dict.fromkeys(expected, path), dtype=dtype, device=device)
    except (SafetensorError, OSError) as error:
        raise TruncatedCheckpointError(
            f"{path}: cut short or damaged ({error}); copy the model again"
        ) from error


_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def _check_tensors(
    path: Path,
    stored: dict[str, Any],
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]],
) -> None:
    missing, unexpected = (
        sorted(expected.keys() - stored.keys()),
        sorted(stored.keys() - expected.keys()),
    )
    if missing or unexpected:
        what = (
            f"lacks {missing[0]!r}"
            if missing
            else f"holds {unexpected[0]!r}, which the model does not have"
        )
        raise CheckpointError(
            f"{path}: {what} ({len(missing)} tensors missing, {len(unexpected)} unexpected); "
            "weights and config.json belong to different models"
        )
    for name, (shape, fixed) in expected.items():
        found, code = tuple(stored[name].get_shape()), stored[name].get_dtype()
        if found != shape or (fixed is not None and code != _DTYPES[fixed]):
            wanted = "" if fixed is None else f" {_DTYPES[fixed]}"
            raise CheckpointShapeError(
                f"{path}: {name} is {code} {list(found)}, needs{wanted} {list(shape)}; "
                "weights and config.json belong to different models"
            )
