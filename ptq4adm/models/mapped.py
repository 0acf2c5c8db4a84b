"""Loads a component whose weights stay in their file: mapped, and read when they are used.

The libraries' own loading makes a model and copies a file into it. Here the model is made without
memory, and its tensors are those of the mapped file where the dtype is the one that is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def load_mapped(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module | None:
    """Load a model of diffusers or transformers.

    Args:
        cls: its class.
        folder: with config.json and one file of weights.
        dtype: floating point tensors are converted to it.

    Returns:
        The model; None if it takes more than this to load it: several files, other names in the
        file than in the model, or tensors that are in no file. The library then does it, and says
        what is missing.

    Raises:
        SafetensorError: if the file is damaged.
        OSError: if a file cannot be read.
        ValueError: if the model cannot be made from its config.
    """
    # here, as kernels are benchmarked on machines without it
    from safetensors import safe_open

    found = [folder / name for name in _FILES if (folder / name).is_file()]
    if len(found) != 1:
        return None
    with torch.device("meta"):
        module = _make(cls, folder)
    if module is None or any(part._non_persistent_buffers_set for part in module.modules()):
        return None
    with safe_open(found[0], framework="pt") as file:
        names = set(file.keys())
        needed = module.state_dict()
        if not names <= needed.keys():
            return None
        state = {name: _converted(file.get_tensor(name), dtype) for name in names}
    if any(state[name].shape != needed[name].shape for name in names):
        return None
    module.load_state_dict(state, strict=False, assign=True)
    if hasattr(module, "tie_weights"):
        # transformers leaves out the second name of a tensor
        module.tie_weights()
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return None
    return module


def _make(cls: Any, folder: Path) -> Any:
    """The model without memory; None if its library has another way to make one."""
    if hasattr(cls, "load_config"):
        return cls.from_config(cls.load_config(folder, local_files_only=True))
    config_class = getattr(cls, "config_class", None)
    if config_class is None:
        return None
    return cls(config_class.from_pretrained(folder, local_files_only=True))


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
