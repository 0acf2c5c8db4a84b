"""Layers that keep the dtypes they store, and what is asked of modules and tensors around them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from ptq4adm.errors import UnsupportedLayerError

Self = TypeVar("Self", bound="StorageLayer")
TensorSpec = tuple[tuple[int, ...], torch.dtype]


class StorageLayer(nn.Module):
    """A layer whose buffers keep their dtypes, whatever `.half()`, `.float()` or `.to(dtype)` asks.

    A float32 scale rounded to float16 would change the model; computation follows the input's
    dtype. Those that stand for an `nn.Linear` are one, so that PEFT adapts them.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a weight

    def stored_tensors(self) -> dict[str, TensorSpec]:
        """Name, shape and dtype of each tensor of the state dict."""
        return {
            name: (tuple(buffer.shape), buffer.dtype)
            for name, buffer in self._buffers.items()
            if buffer is not None
        }

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                # from the original: a detour over the smaller dtype would lose digits
                self._buffers[name] = buffer.to(moved.device)
        return self


def tensor_version(tensor: Tensor) -> int | None:
    """Number of changes in place; None where torch does not count them."""
    return None if tensor.is_inference() else tensor._version


def check_float_layer(layer: nn.Module, kind: type[nn.Module], name: str) -> None:
    """Refuse anything but a plain layer of the kind.

    Raises:
        UnsupportedLayerError: for another class, a subclass included: its forward may differ.
    """
    if type(layer) is not kind:
        raise UnsupportedLayerError(
            f"{name}.from_float: got {type(layer).__name__}, needs a torch.nn.{kind.__name__}"
        )


def resident_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module, each storage counted once."""
    storages = {}
    for tensor in chain(module.parameters(), module.buffers()):
        storage = tensor.untyped_storage()
        # storages without memory (meta tensors) have no address: count them one by one
        storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())
