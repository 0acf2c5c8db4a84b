"""Fills a model from safetensors files, a portion at a time.

What was read of a mapped file counts as memory as long as the file is mapped. Here it is mapped
anew for every portion, and by then the model has its own copy, in the order of its backend: at no
time is there a second copy of all weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ptq4adm.nn.packed import PackedLayer

PORTION_ELEMENTS = 1 << 24  # mapped at once; nearly all of them are bytes

# name to shape, and dtype if that is fixed
_Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]


def fill(
    model: nn.Module,
    expected: _Expected,
    files: Mapping[str, Path],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Put the tensors of files, which were compared with the model before, into it.

    Args:
        model: where they go; a replaced layer brings its weight into its backend's order.
        expected: every tensor of the state dict: its shape, and its dtype if that is fixed.
        files: name of every tensor to the file that holds it.
        dtype: of the tensors whose dtype is not fixed.
        device: where they go.

    Raises:
        SafetensorError: if a file is damaged.
        OSError: if a file cannot be read.
    """
    for path, portion in _portions(expected, files):
        with safe_open(path, framework="pt", device=str(device)) as file:
            for prefix, parts in portion.items():
                layer = model.get_submodule(prefix)
                # one tensor that stays would keep the whole portion mapped; a packed layer copies
                copy = not isinstance(layer, PackedLayer)
                tensors = {}
                for part in parts:
                    name = f"{prefix}.{part}" if prefix else part
                    tensors[part] = file.get_tensor(name).to(expected[name][1] or dtype, copy=copy)
                layer.load_state_dict(tensors, strict=False, assign=True)


def _portions(
    expected: _Expected, files: Mapping[str, Path]
) -> Iterator[tuple[Path, dict[str, list[str]]]]:
    """A file and modules with their tensors in it; all tensors of a replaced layer together."""
    by_file: dict[Path, dict[str, list[str]]] = {}
    for name in expected:
        prefix, _, part = name.rpartition(".")
        by_file.setdefault(files[name], {}).setdefault(prefix, []).append(part)
    for path, modules in by_file.items():
        portion: dict[str, list[str]] = {}
        elements = 0
        for prefix, parts in modules.items():
            names = (f"{prefix}.{part}" if prefix else part for part in parts)
            count = sum(math.prod(expected[name][0]) for name in names)
            if portion and elements + count > PORTION_ELEMENTS:
                yield path, portion
                portion, elements = {}, 0
            portion[prefix] = parts
            elements += count
        yield path, portion
