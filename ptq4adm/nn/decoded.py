"""The float weight of a packed linear, for code that asks an `nn.Linear` for one; it cannot be set.

PEFT reads its device and dtype to make an adapter. It also merges by assigning to `weight.data`,
which would be lost here without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4adm.errors import UnsupportedLayerError

__all__ = ["DecodedWeight"]


class DecodedWeight(Tensor):
    """A copy of what the integers stand for; assigning to its `data` raises.

    Results of operations on it are ordinary tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The values, as an ordinary tensor."""
        return self.as_subclass(Tensor)

    @data.setter
    def data(self, values: Tensor) -> None:
        raise UnsupportedLayerError(
            f"the weight of a packed layer cannot be assigned: got {list(values.shape)} for its "
            "decoded copy; to merge an adapter, call model.dequantize() first, or leave the "
            "adapter beside the layer"
        )
