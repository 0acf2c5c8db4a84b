"""Float attention of backend ``triton``: PyTorch's, whose fused kernels a GPU runs.

PyTorch picks flash or memory-efficient attention by shape, dtype and GPU; a kernel of our own would
be a worse copy of them.
"""

from __future__ import annotations

from torch import Tensor

from ptq4adm.ops import reference
from ptq4adm.ops.triton_matmul import check_device


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Run ``reference.attention``, in the dtype of ``q``, on the device of this backend."""
    check_device(q, k, v, bias)
    return reference.attention(q, k, v, heads, bias=bias, scale=scale)
