"""A quantized denoiser on disk: one folder in diffusers' layout.

    config.json                            the model's config, and `quantization_config`
    diffusion_pytorch_model.safetensors    its state dict; weights canonical, as `packing.layout`
    says; diffusers' `save_pretrained` may write shards and variants of it

`quantization_config` names the scheme of every replaced layer, so the model is rebuilt from it
alone; everything is compared with the file's header before a tensor is read, and nothing is
half-loaded. It holds no prompt.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ptq4adm.config import FORMAT_VERSION, METHOD
from ptq4adm.errors import (
    CheckpointError,
    CheckpointShapeError,
    ConfigError,
    MissingComponentError,
    OutputError,
    TruncatedCheckpointError,
)
from ptq4adm.nn import StorageLayer
from ptq4adm.nn.fuse import fuse_blocks
from ptq4adm.packing.description import (
    QuantState,
    build_layers,
    check_no_adapters,
    check_version,
    is_quantized,
    mark_quantized,
    quantization_config,
)
from ptq4adm.packing.portions import fill
from ptq4adm.packing.weight_files import WEIGHTS_FILE, find_weight_files

__all__ = [
    "CONFIG_FILE",
    "METADATA",
    "WEIGHTS_FILE",
    "QuantState",
    "check_names",
    "empty_model",
    "expected_tensors",
    "is_quantized",
    "load_denoiser",
    "mark_quantized",
    "quantization_config",
    "read_config",
    "save_denoiser",
]

CONFIG_FILE = "config.json"
# of the file's header, beside the format
METADATA = {"quant_method": METHOD, "format_version": str(FORMAT_VERSION)}
# entries of a live diffusers config that say where it came from, not what it is
_UNSAVED = ("_use_default_values", "_name_or_path", "_pre_quantization_dtype")


def save_denoiser(denoiser: nn.Module, folder: str | Path) -> None:
    """Write a quantized denoiser into a folder, which is made if it is missing.

    Raises:
        ConfigError: if the denoiser is not quantized, or has no config.
        OutputError: if the folder cannot be written.
    """
    check_no_adapters(denoiser)
    described = quantization_config(denoiser)
    config = getattr(denoiser, "config", None)
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"{type(denoiser).__name__} has no config to save; it must be a diffusers model"
        )
    content = {k: v for k, v in config.items() if k not in _UNSAVED}
    content = {"_class_name": type(denoiser).__name__, **content, "quantization_config": described}
    # copies: two names of one tensor are stored twice rather than refused
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in denoiser.state_dict().items()
    }
    metadata = {"format": "pt", **METADATA}
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
    variant: str | None = None,
) -> nn.Module:
    """Read a quantized denoiser.

    Args:
        folder: as written by `save_denoiser`, or by diffusers' `save_pretrained`.
        backend: "auto" or a backend's name.
        device: where it goes.
        dtype: of the tensors that are not part of a replaced layer.
        variant: of the weights' file names; None for the plain name.

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
    config = read_config(folder / CONFIG_FILE)
    described = config.pop("quantization_config", None)
    check_version(str(folder / CONFIG_FILE), described)
    denoiser = empty_model(folder, config)
    state = build_layers(
        denoiser, described, where=str(folder / CONFIG_FILE), backend=backend, device=device
    )
    _load_tensors(find_weight_files(folder, variant), denoiser, dtype, device)
    mark_quantized(denoiser, state)
    fuse_blocks(denoiser)
    return denoiser.requires_grad_(False).eval()


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        MissingComponentError: if there is none.
        TruncatedCheckpointError: if it is cut short.
        CheckpointError: if it is not an object.
    """
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


def empty_model(folder: Path, config: dict[str, Any]) -> nn.Module:
    """The float model of a config, without memory for its tensors.

    Raises:
        CheckpointError: if the installed diffusers has no such model.
    """
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


def expected_tensors(
    denoiser: nn.Module,
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
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
    paths: Sequence[Path], denoiser: nn.Module, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Fill the model from the files, after their headers were compared with what it needs."""
    expected = expected_tensors(denoiser)
    path = paths[0]
    try:
        stored: dict[str, Any] = {}
        places: dict[str, Path] = {}
        with ExitStack() as stack:
            for path in paths:
                file = stack.enter_context(safe_open(path, framework="pt", device=str(device)))
                names = list(file.keys())
                stored.update((name, file.get_slice(name)) for name in names)
                places.update(dict.fromkeys(names, path))
            _check_tensors(paths[0], stored, expected)
        fill(denoiser, expected, places, dtype=dtype, device=device)
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


def check_names(where: str, expected: Iterable[str], stored: Iterable[str]) -> None:
    """Compare the names of a file's tensors with the model's.

    Raises:
        CheckpointError: naming the first that is missing or unexpected, with their numbers.
    """
    needed, found = set(expected), set(stored)
    missing, unexpected = sorted(needed - found), sorted(found - needed)
    if missing or unexpected:
        what = (
            f"lacks {missing[0]!r}"
            if missing
            else f"holds {unexpected[0]!r}, which the model does not have"
        )
        raise CheckpointError(
            f"{where}: {what} ({len(missing)} tensors missing, {len(unexpected)} unexpected); "
            "weights and config.json belong to different models"
        )


def _check_tensors(
    path: Path,
    stored: dict[str, Any],
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]],
) -> None:
    check_names(str(path), expected, stored)
    for name, (shape, fixed) in expected.items():
        found, code = tuple(stored[name].get_shape()), stored[name].get_dtype()
        if found != shape or (fixed is not None and code != _DTYPES[fixed]):
            wanted = "" if fixed is None else f" {_DTYPES[fixed]}"
            raise CheckpointShapeError(
                f"{path}: {name} is {code} {list(found)}, needs{wanted} {list(shape)}; "
                "weights and config.json belong to different models"
            )
