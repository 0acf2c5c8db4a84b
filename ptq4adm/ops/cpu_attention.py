"""Float attention of backend ``cpu``: checked tensors go to ``ptq4adm._cpu`` as addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4adm.ops import compiled
from ptq4adm.ops.compiled import check_available
from ptq4adm.ops.schema import check_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    isa: str = "auto",
) -> Tensor:
    """Run ``reference.attention`` natively, in float32 whatever the dtype."""
    for x in (q, k, v) if bias is None else (q, k, v, bias):
        check_available(x)
    check_attention(q, k, v, heads, bias)
    inputs = [_rows(x) for x in (q, k, v)]
    mask = None if bias is None else bias.float().contiguous()
    out = torch.empty(q.shape, dtype=torch.float32)
    head_dim = q.shape[2] // heads
    strides = [(x.stride(0), x.stride(1), head_dim) for x in (*inputs, out)]
    compiled.module.attention(
        q=inputs[0].data_ptr(),
        k=inputs[1].data_ptr(),
        v=inputs[2].data_ptr(),
        bias=0 if mask is None else mask.data_ptr(),
        out=out.data_ptr(),
        q_strides=strides[0],
        k_strides=strides[1],
        v_strides=strides[2],
        out_strides=strides[3],
        sizes=(q.shape[0], heads, q.shape[1], k.shape[1], head_dim),
        scale=head_dim**-0.5 if scale is None else scale,
        isa=isa,
        threads=torch.get_num_threads(),
    )
    return out.to(q.dtype)


def _rows(x: Tensor) -> Tensor:
    """Return float32 rows whose channels lie side by side; a slice of wider rows is no copy."""
    x = x.float()
    return x if x.stride(2) == 1 else x.contiguous()
