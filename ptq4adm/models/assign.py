"""Puts the tensors of a checkpoint into a model that was made without memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ptq4adm.errors import CheckpointError, CheckpointShapeError
from ptq4adm.models.pickled import few

_Module = TypeVar("_Module", bound=nn.Module)


def build(
    make: Callable[[], _Module],
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    dtype: torch.dtype,
    file_name: Callable[[str], str] = str,
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> _Module:
    """Make a model whose tensors are those of a checkpoint, without a second copy of them.

    Args:
        make: makes the model; it is called on the meta device.
        tensors: all tensors of the file that belong to the model, under the file's names.
        source: file and part, for messages.
        dtype: floating point tensors are converted to it; those that have it stay where they are.
        file_name: name in the model to name in the file. A 1x1 convolution of the file may be a
            linear of the model.
        convert: gives the state dict of the model, where that is someone else's work.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        CheckpointError: if a tensor is missing, or one too many.
        CheckpointShapeError: if one has another shape.
    """
    with torch.device("meta"):
        module = make()
    needed = module.state_dict()
    names = {name: file_name(name) for name in needed}
    _check_names(set(names.values()), tensors, source)
    for name, in_file in names.items():
        _check_shape(in_file, tensors[in_file], needed[name], source)
    if convert is not None:
        state = dict(convert(tensors))
    else:
        state = {name: tensors[in_file] for name, in_file in names.items()}
    for name, tensor in state.items():
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        state[name] = tensor.reshape(needed[name].shape).to(wanted)
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def _check_names(needed: set[str], tensors: Mapping[str, Tensor], source: str) -> None:
    missing, unknown = needed - tensors.keys(), tensors.keys() - needed
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} tensors ({few(missing)})")
    if unknown:
        parts.append(f"holds {len(unknown)} unknown tensors ({few(unknown)})")
    if parts:
        raise CheckpointError(
            f"{source}: {' and '.join(parts)}; it is another model, or not the whole of it"
        )


def _check_shape(name: str, found: Tensor, needed: Tensor, source: str) -> None:
    shape = list(found.shape)
    if needed.dim() == 2:
        while len(shape) > 2 and shape[-1] == 1:
            shape.pop()
    if shape != list(needed.shape):
        raise CheckpointShapeError(
            f"{source}: {name} is {list(found.shape)}, needs {list(needed.shape)}; "
            "weights and configuration belong to different models"
        )
