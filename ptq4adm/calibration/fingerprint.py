"""Which model a calibration belongs to: config, names and shapes of tensors, sampled values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ptq4adm.errors import CalibrationMismatchError

# elements hashed of each tensor, evenly spaced: changes of training or of another seed touch nearly
# all of them
_SAMPLES = 64


def fingerprint(denoiser: nn.Module) -> str:
    """SHA-256 of a float model, 32 hex digits.

    Values enter as float16, so the same checkpoint has one fingerprint whether it was loaded in
    float32 or float16.

    Args:
        denoiser: not quantized.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_config(denoiser), sort_keys=True, default=str).encode())
    for name, tensor in sorted(denoiser.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel() == 0:
            continue
        index = torch.linspace(
            0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64
        )
        sample = flat[index.round().to(flat.device, torch.int64)].to("cpu", torch.float16)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def check_fingerprint(denoiser: nn.Module, recorded: str, what: str, remedy: str) -> None:
    """Refuse another model than the one that something was recorded on.

    Args:
        denoiser: the model at hand, not quantized.
        recorded: fingerprint of the other.
        what: was recorded, with its verb, for the message.
        remedy: what to do about it.

    Raises:
        CalibrationMismatchError: if the fingerprints differ.
    """
    given = fingerprint(denoiser)
    if given != recorded:
        raise CalibrationMismatchError(
            f"{what} on model {recorded[:12]}, this one is {given[:12]}: config, layers or weights "
            f"differ; {remedy}"
        )


def _config(denoiser: nn.Module) -> dict[str, Any]:
    """The model's config without private entries, which name folders and library versions.

    Nor is what is asked for: diffusers puts it there before it quantizes.
    """
    config = getattr(denoiser, "config", None)
    if not isinstance(config, Mapping):
        return {"class": type(denoiser).__name__}
    return {
        str(key): value
        for key, value in config.items()
        if not str(key).startswith("_") and key != "quantization_config"
    }
